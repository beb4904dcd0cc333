// The live page: what is read and said comes from the server as text and is shown as text.

const about = readData("data");
const byName = Object.fromEntries(about.dictionaries.map((one) => [one.name, one]));
const state = { reading: null, chosen: null, latent: null, changes: [], job: null };

async function ask(path, body, onLine = null) {
  let response;
  try {
    response = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  } catch {
    throw new Error("The server does not answer; start it again with saelens-ext serve.");
  }
  if (!response.ok || onLine === null) {
    const answer = await response.json().catch(() => ({ error: `The server answered with status ${response.status}.` }));
    if (!response.ok) throw new Error(answer.error);
    return answer;
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    const lines = (rest + (value ?? "")).split("\n");
    rest = lines.pop();
    for (const line of lines) onLine(JSON.parse(line));
    if (done) return null;
  }
}

// Answers may come in another order than they were asked for: of each kind of request only the latest one's counts.
const numbers = { read: 0, latent: 0, find: 0 };
function latest(kind) {
  const number = ++numbers[kind];
  return () => number === numbers[kind];
}

function say(id, text) {
  byId(id).textContent = text;
  byId(id).hidden = !text;
}

function dictionary() {
  return byName[byId("dictionary").value];
}

function named(one, latent) {
  return `${one.noun} ${latent}`;
}

function capital(text) {
  return text[0].toUpperCase() + text.slice(1);
}

// --- a text or a conversation ---

function isTalk() {
  return byId("kind")?.value === "talk";
}

function turns() {
  return [...byId("turns").children].map((turn) => ({ role: turn.querySelector("select").value, content: turn.querySelector("textarea").value }));
}

function addTurn(role, content = "") {
  const roles = make("select", { "aria-label": "Role" }, ...["system", "user", "assistant"].map((one) => make("option", { value: one }, one)));
  roles.value = role;
  const remove = make("button", { type: "button", class: "remove" }, "remove");
  const said = make("textarea", { rows: "2", maxlength: about.limits.characters, "aria-label": "Message", spellcheck: "false" });
  said.value = content;
  said.addEventListener("keydown", readOnEnter);
  const turn = make("li", {}, roles, remove, said);
  remove.addEventListener("click", () => turn.remove());
  byId("turns").append(turn);
  return said;
}

function enterKind() {
  byId("text").hidden = isTalk();
  byId("talk").hidden = !isTalk();
  byId("text-title").textContent = isTalk() ? "Conversation" : "Text";
  if (isTalk() && !byId("turns").children.length) addTurn("user", byId("text").value);
}

function given() {
  if (!isTalk()) return { text: byId("text").value };
  const options = byId("template-options").value.trim();
  try {
    return { messages: turns(), chat_template_options: options ? JSON.parse(options) : null };
  } catch {
    throw new Error('The template options must be a JSON object, such as {"enable_thinking": false}.');
  }
}

function readOnEnter(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) read();
}

// --- reading ---

function strongest(token) {
  return token.region ?? token.latents[0]?.latent ?? null;
}

function colourOf(token, by, largest) {
  if (token.special) return "";
  const value = by === "novelty" ? token.novelty : by === "latent" ? valueOf(token, state.latent) : token.latents[0]?.value;
  if (!value || !largest) return "";
  const colour = by === "novelty" ? "200,80,0" : value > 0 ? "230,120,0" : "0,110,230";
  return `rgba(${colour},${(0.08 + 0.5 * Math.min(1, Math.abs(value) / largest)).toFixed(2)})`;
}

function valueOf(token, latent) {
  return token.latents.find((one) => one.latent === latent)?.value ?? 0;
}

function showTokens() {
  const one = dictionary();
  const read = state.reading?.[one.name];
  const by = byId("colour").value;
  const values = (read?.tokens ?? []).filter((token) => !token.special).map((token) => Math.abs((by === "novelty" ? token.novelty : by === "latent" ? valueOf(token, state.latent) : token.latents[0]?.value) ?? 0));
  const largest = Math.max(0, ...values);
  byId("tokens").replaceChildren(
    ...(read?.tokens ?? []).map((token, number) => {
      const label = read.labels[strongest(token)]?.text;
      const title = strongest(token) === null ? "nothing is active here" : `${named(one, strongest(token))}${label ? `: ${label}` : ""}`;
      const novel = !token.special && token.novelty !== null && token.novelty > one.threshold;
      const node = make("button", { type: "button", title, "aria-pressed": String(state.chosen === number), class: `${token.special ? "special" : ""} ${novel ? "novel" : ""}` }, token.text.replaceAll("\n", "↵\n"));
      node.style.backgroundColor = colourOf(token, by, largest);
      node.addEventListener("click", () => choose(number));
      return node;
    }),
  );
  const hasNovel = one.threshold !== null ? " A wavy line: farther from every region than the partition's threshold." : "";
  byId("tokens-hint").textContent = read ? `Choose a token to see what is active there.${hasNovel}` : "Press Read, then choose a token to see what is active there.";
}

function showToken() {
  const one = dictionary();
  const read = state.reading?.[one.name];
  const token = read?.tokens[state.chosen];
  byId("token-panel").hidden = !token;
  if (!token) return;
  byId("token-title").replaceChildren("Token ", tokenChip(token.text));
  const facts = [];
  if (token.region !== null) {
    facts.push(make("dt", {}, "Nearest region"), make("dd", {}, latentButton(one, token.region, read.labels[token.region])));
    const beyond = token.novelty > one.threshold ? "beyond" : "within";
    facts.push(make("dt", {}, "Novelty"), make("dd", {}, `${token.novelty.toFixed(3)}, ${beyond} the threshold of ${one.threshold.toFixed(3)}`));
  }
  const active = token.latents.map((found) => make("li", {}, latentButton(one, found.latent, read.labels[found.latent]), make("span", { class: "number" }, formatFixed(found.value, 2))));
  const note = token.special ? make("p", { class: "hint" }, "This token is structure, not text; most dictionaries were not built on such tokens.") : null;
  const list = active.length ? make("ul", { class: "active" }, ...active) : make("p", { class: "hint" }, `No ${one.noun} is active here.`);
  byId("token-body").replaceChildren(...[make("dl", {}, ...facts), note, list].filter(Boolean));
}

function latentButton(one, latent, label) {
  const text = label?.text ? [": ", make("bdi", { class: label.sure ? "" : "weak", title: label.sure ? "" : "may be chance" }, label.text)] : [];
  const button = make("button", { type: "button" }, capital(named(one, latent)), ...text);
  button.addEventListener("click", () => showLatent(one.name, latent));
  return button;
}

async function read() {
  const isLatest = latest("read");
  say("read-message", "");
  setUsable(byId("read"), false);
  let found = null, message = "";
  try {
    found = await ask("read", given());
  } catch (error) {
    message = error.message;
  }
  if (!isLatest()) return;
  state.reading = found;
  state.chosen = null;
  say("read-message", message);
  setUsable(byId("read"), true);
  showTokens();
  showToken();
}

function choose(number) {
  state.chosen = number;
  showTokens();
  showToken();
  byId("tokens").children[number]?.focus();
  const token = state.reading[dictionary().name].tokens[number];
  if (strongest(token) !== null) showLatent(dictionary().name, strongest(token));
}

// --- one latent ---

async function showLatent(name, latent) {
  const isLatest = latest("latent");
  const one = byName[name];
  state.latent = latent;
  byId("latent-panel").hidden = false;
  byId("latent-title").textContent = capital(named(one, latent));
  byId("add").onclick = () => addChange(name, latent, "");
  say("latent-message", "");
  try {
    const found = await ask("latent", { dictionary: name, latent });
    if (!isLatest()) return;
    byId("add").onclick = () => addChange(name, latent, found.label.text);
    // Made by the server from escaped text.
    if (found.html) byId("latent-body").innerHTML = found.html;
    else byId("latent-body").textContent = "No profile lies beside this dictionary, so nothing more is known. Make one with saelens-ext profile FOLDER.";
  } catch (error) {
    if (!isLatest()) return;
    byId("latent-body").replaceChildren();
    say("latent-message", error.message);
  }
  if (byId("colour").value === "latent") showTokens();
}

async function find() {
  const isLatest = latest("find");
  const one = dictionary();
  const answer = await ask("find", { dictionary: one.name, query: byId("query").value }).catch((error) => ({ error: error.message, latents: [] }));
  if (!isLatest()) return;
  const rows = answer.latents.map((found) => make("li", {}, latentButton(one, found.latent, found)));
  byId("found").replaceChildren(...(rows.length ? rows : [make("li", {}, answer.error ?? `No ${one.noun} is labelled so.`)]));
}

// --- steering ---

function addChange(name, latent, label) {
  const known = state.changes.some((change) => change.dictionary === name && change.latent === latent);
  if (known) return;
  if (state.changes.length >= about.limits.changes) {
    say("steer-message", `At most ${about.limits.changes} latents are changed at once; remove one first.`);
    return;
  }
  state.changes.push({ dictionary: name, latent, label, nats: 0.5, ablate: false, note: "" });
  showChanges();
}

function showChanges() {
  byId("no-changes").hidden = state.changes.length > 0;
  byId("changes").replaceChildren(...state.changes.map(changeRow));
}

function changeRow(change) {
  const one = byName[change.dictionary];
  const name = capital(named(one, change.latent)) + (about.dictionaries.length > 1 ? ` of ${one.name}` : "");
  const remove = make("button", { type: "button", class: "remove", "aria-label": `Remove ${name}` }, "remove");
  remove.addEventListener("click", () => {
    state.changes = state.changes.filter((other) => other !== change);
    showChanges();
  });
  const output = make("output", {});
  const slider = make("input", { type: "range", min: -SLIDER, max: SLIDER, step: 0.05, value: change.nats, "aria-label": `${name}: nats of divergence` });
  const show = () => {
    output.textContent = change.nats === 0 ? "off" : `${formatFixed(change.nats, 2, true)} nats`;
  };
  slider.addEventListener("input", () => {
    change.nats = Number(slider.value);
    show();
  });
  show();
  const box = make("input", { type: "checkbox" });
  box.checked = change.ablate;
  box.addEventListener("change", () => {
    change.ablate = box.checked;
    if (box.checked) {
      change.nats = 0;
      slider.value = 0;
      show();
    }
  });
  const note = change.note ? make("span", { class: "note" }, change.note) : null;
  return make("li", {}, make("span", { class: "name" }, make("span", {}, name, ...(change.label ? [": ", make("bdi", {}, change.label)] : [])), remove), slider, output, make("label", { class: "check" }, box, "ablate"), note);
}

const SLIDER = Math.min(3, about.limits.nats);

function showUpdate(update, changes) {
  if (update.error) {
    say("steer-message", update.error);
    byId("status").textContent = "";
    return;
  }
  if (update.stage === "stopped") {
    byId("status").textContent = "Stopped.";
    return;
  }
  byId("unsteered").textContent = update.unsteered;
  byId("steered").textContent = update.steered;
  const moved = update.divergence === null ? "" : `; the next token's prediction moved by ${update.divergence.toFixed(2)} nats in all`;
  byId("status").textContent = `${capital(update.stage)}${update.n_tokens ? `: ${update.n_tokens} tokens` : "…"}${moved}.`;
  update.strengths.forEach((strength, number) => {
    if (strength === null || !changes[number]) return;
    const sign = formatFixed(strength.coefficient, 1, true);
    changes[number].note = strength.reached ? `coefficient ${sign}` : `${Math.abs(strength.target)} nats cannot be reached: coefficient ${sign} moves ${strength.kl.toFixed(2)} nats`;
  });
  if (update.strengths.length && update.n_tokens === 1) showChanges();
}

async function steer() {
  if (state.job !== null) return;
  const job = String(crypto.getRandomValues(new Uint32Array(2)).join("-"));
  const changes = [...state.changes];
  state.job = job;
  say("steer-message", "");
  byId("unsteered").textContent = byId("steered").textContent = "";
  byId("status").textContent = "Waiting for its turn…";
  setUsable(byId("continue"), false);
  setUsable(byId("stop"), true);
  const body = {
    job,
    changes: changes.map(({ dictionary: name, latent, nats, ablate }) => ({ dictionary: name, latent, nats, ablate })),
    options: { max_new_tokens: Number(byId("n-new").value), temperature: Number(byId("temperature").value), seed: Number(byId("seed").value) },
  };
  try {
    await ask("steer", { ...given(), ...body }, (update) => showUpdate(update, changes));
  } catch (error) {
    byId("status").textContent = "";
    say("steer-message", error.message);
  }
  state.job = null;
  setUsable(byId("continue"), true);
  setUsable(byId("stop"), false);
}

async function stop() {
  const job = state.job;
  try {
    // The server may not have had the request yet that is to be stopped.
    while (job !== null && state.job === job && !(await ask("stop", { job })).stopped) await new Promise((resolve) => setTimeout(resolve, 100));
  } catch (error) {
    say("steer-message", error.message);
  }
}

// --- begin ---

function offerColours() {
  const ways = [["strongest", `strongest ${dictionary().noun}`], ["latent", `the ${dictionary().noun} shown`]];
  if (dictionary().threshold !== null) ways.unshift(["novelty", "novelty"]);
  byId("colour").replaceChildren(...ways.map(([value, text]) => make("option", { value }, text)));
  byId("colour").value = "strongest";
}

function changeDictionary() {
  offerColours();
  byId("latent-panel").hidden = true;
  latest("latent"); // no answer about the other dictionary counts
  state.latent = null;
  showTokens();
  showToken();
  find();
}

byId("dictionary").append(...about.dictionaries.map((one) => make("option", { value: one.name }, one.name)));
byId("dictionary-choice").hidden = about.dictionaries.length < 2;
byId("dictionary").addEventListener("change", changeDictionary);
byId("colour").addEventListener("change", showTokens);
byId("read").addEventListener("click", read);
byId("continue").addEventListener("click", steer);
byId("stop").addEventListener("click", stop);
byId("query").addEventListener("input", find);
byId("text").addEventListener("keydown", readOnEnter);
byId("kind")?.addEventListener("change", enterKind);
byId("add-turn")?.addEventListener("click", () => addTurn(turns().at(-1)?.role === "user" ? "assistant" : "user").focus());
document.documentElement.classList.add("scripted");
changeDictionary();
