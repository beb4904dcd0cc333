// Building blocks: elements made from text only, tokens made visible, figures as report/format.py writes them.

const SVG = "http://www.w3.org/2000/svg";

function byId(id) {
  return document.getElementById(id);
}

function readData(id) {
  return JSON.parse(byId(id).textContent);
}

// Children are nodes or strings; strings become text nodes, never markup.
function make(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function draw(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// A button that leads nowhere just now. Not "disabled", which would throw the keyboard's focus off the page.
function setUsable(button, usable) {
  button.setAttribute("aria-disabled", String(!usable));
}

// --- tokens ---

const NAMED = { "\n": "↵", "\r": "␍", "\t": "⇥", "\u00a0": "⍽", "\u007f": "␡" };
const INVISIBLE = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}\u00a0]/gu;
const JOINERS = /^[\u200c\u200d]$/;

// Text with a sign for every character that would not show. Joiners inside emoji and scripts that need them stay.
function visible(text) {
  return text.replace(INVISIBLE, (character) => {
    if (character in NAMED) return NAMED[character];
    const code = character.codePointAt(0);
    if (code < 0x20) return String.fromCodePoint(0x2400 + code);
    if (JOINERS.test(character) && text.length > 1) return character;
    return `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
}

// A token on its own, where the space at its edge matters as well; cut if long.
function tokenLabel(token, longest = 48) {
  if (token === "") return "∅";
  const spaces = (run) => (run.length > 4 ? `␣×${run.length}` : "␣".repeat(run.length));
  const label = /^ +$/.test(token) ? spaces(token) : visible(token).replace(/^ +| +$/g, spaces);
  const characters = Array.from(label);
  return characters.length > longest ? `${characters.slice(0, longest - 1).join("")}…` : label;
}

// bdi keeps right-to-left text from reordering its neighbours.
function tokenChip(token, longest) {
  return make("bdi", { class: "token", title: `token ${JSON.stringify(visible(token)).slice(0, 200)}` }, tokenLabel(token, longest));
}

const LONGEST_TOKEN = 80;
const RIGHT_TO_LEFT = /[\p{Script=Hebrew}\p{Script=Arabic}\p{Script=Syriac}\p{Script=Thaana}]/gu;

function shortened(token) {
  return token.length > LONGEST_TOKEN ? `${Array.from(token).slice(0, LONGEST_TOKEN / 2).join("")}…` : token;
}

// Which way most letters run; going by the first letter, as browsers do, would turn whole lines around for one word.
function direction(texts) {
  const text = texts.join("");
  const count = (letters) => text.match(letters)?.length ?? 0;
  return 2 * count(RIGHT_TO_LEFT) > count(/\p{L}/gu) ? "rtl" : "ltr";
}

// Running text with one token marked, all of it or as many whole tokens as fit `before` and `after` characters.
function contextText(tokens, mark, { before = Infinity, after = Infinity, cutBefore = false, cutAfter = false } = {}) {
  const texts = tokens.map(shortened);
  const marked = texts[mark] ?? "";
  let first = mark;
  for (let room = before; first > 0 && texts[first - 1].length <= room; first--) room -= texts[first - 1].length;
  let last = mark + 1;
  for (let room = after; last < texts.length && texts[last].length <= room; last++) room -= texts[last].length;
  return make(
    "bdi",
    { class: "context", dir: direction(texts) },
    first > 0 || cutBefore ? "… " : null,
    visible(texts.slice(first, mark).join("")),
    make("mark", {}, /^\s*$/.test(marked) ? tokenLabel(marked) : visible(marked)),
    visible(texts.slice(mark + 1, last).join("")),
    last < texts.length || cutAfter ? " …" : null,
  );
}

// --- labels ---

// A latent's label, or null; one that is not distinguishable from chance is marked as such.
function labelOf(data, id) {
  return data.labels?.[id]?.text ? data.labels[id] : null;
}

function labelChip(data, id) {
  const label = labelOf(data, id);
  if (label === null) return null;
  const doubt = label.sure ? null : make("small", {}, label.auroc === null ? " not scored" : " may be chance");
  return make("div", { class: label.sure ? "label" : "label weak", title: label.score }, make("bdi", {}, label.text), doubt);
}

// The label with its score, for the details.
function labelPart(data, id) {
  const label = labelOf(data, id);
  if (label === null) return null;
  const output = label.output ? make("p", {}, "Makes the model say: ", make("bdi", {}, label.output)) : null;
  return make("div", { class: "labelled" }, labelChip(data, id), output, make("p", { class: "hint" }, `Held-out score of the label: ${label.score}.`));
}

// --- figures ---

// Index of the largest entry, the first of equal ones.
function largestOf(values) {
  return values.reduce((best, value, i) => (value > values[best] ? i : best), 0);
}

function formatCount(n) {
  return n.toLocaleString("en-US");
}

function formatDistance(x) {
  return x === null ? "–" : x.toFixed(3);
}

function formatPercentage(x) {
  const percent = 100 * x;
  if (percent === 0) return "0%";
  return `${percent >= 10 ? percent.toFixed(1) : percent >= 1 ? percent.toFixed(2) : Number(percent.toPrecision(2))}%`;
}

// With a real minus sign, and never "minus nothing".
function formatFixed(x, decimals, plus = false) {
  if (x === null) return "–";
  const text = Math.abs(x).toFixed(decimals);
  if (Number(text) === 0) return text;
  return `${x < 0 ? "−" : plus ? "+" : ""}${text}`;
}
