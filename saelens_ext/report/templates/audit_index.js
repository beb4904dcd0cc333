// The lines of the prompts that hold all words looked for.

function shownLines(words, lines) {
  return lines.filter(({ text }) => words.every((word) => text.includes(word)));
}

const lines = [...document.querySelectorAll("#prompt-table tbody tr")].map((row) => {
  return { row, text: [...row.querySelectorAll("bdi")].map((one) => one.textContent.toLowerCase()).join("\n") };
});

byId("search").addEventListener("input", (event) => {
  const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = new Set(shownLines(words, lines));
  for (const line of lines) line.row.hidden = !shown.has(line);
  byId("n-shown").textContent = words.length ? `${shown.size} of ${lines.length}` : "";
});

document.documentElement.classList.add("scripted");
