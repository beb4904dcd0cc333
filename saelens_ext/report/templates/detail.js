// Details of one thing beside the table, and the elements they are built from.

// Subclasses say its title, its parts, and the range of their numbers.
class Detail {
  // `beside(id, step)` gives the one that many rows on in the table, or null.
  constructor(data, noun, prefix, beside) {
    Object.assign(this, { data, noun, prefix, beside });
  }

  element(name) {
    return byId(`${this.prefix}detail${name}`);
  }

  show(id) {
    this.element("-title").replaceChildren(...this.title(id));
    this.steps(id);
    this.element("-body").replaceChildren(...this.parts(id).filter((part) => part !== null));
    this.element("").scrollTop = 0;
  }

  missing(name) {
    this.element("-title").textContent = `No such ${this.noun}`;
    this.element("-body").replaceChildren(make("p", {}, `There is no ${this.noun} ${visible(name)}: ${this.noun}s run from ${this.range()}.`));
  }

  // Which of the two buttons leads anywhere depends on how the table is sorted and searched.
  steps(id) {
    setUsable(this.element("-back"), this.beside(id, -1) !== null);
    setUsable(this.element("-on"), this.beside(id, 1) !== null);
  }

  // The tokens that a direction promotes and suppresses; `high` and `low` say which these are.
  lensLists(lens, id, high, low) {
    const list = (name, note, tokens, logits) => {
      const item = (v, i) => make("li", {}, tokenChip(this.data.vocabulary[v], 24), number(logits[i] === null ? "–" : logits[i].toFixed(2)));
      return make("div", {}, ...headed(name, note), make("ol", { class: "tokens" }, ...tokens.map(item)));
    };
    const promoted = list("Promoted tokens", high, lens.promoted[id], lens.promoted_logits[id]);
    return make("div", { class: "lens" }, promoted, list("Suppressed tokens", low, lens.suppressed[id], lens.suppressed_logits[id]));
  }
}

function headed(name, note) {
  return [make("h3", {}, name), make("p", { class: "hint" }, note)];
}

function number(text) {
  return make("span", { class: "number" }, text);
}

function measure(key, name, value, note) {
  return make("div", { id: `measure-${key}` }, make("dt", {}, name), make("dd", {}, make("b", {}, value), make("span", {}, note)));
}
