// The table of SNMF features, of one level of a hierarchy or of all.

const FEATURE_COLUMNS = [
  { key: "id", name: "Feature", value: (data, id) => id, ascending: true },
  { key: "token", name: "Strongest on", value: (data, id) => wordOf(data, data.top_token[id]), ascending: true },
  { key: "promoted", name: "Promotes", value: (data, id) => wordOf(data, data.promoted[id]?.[0]), ascending: true },
  { key: "activity", name: "Fraction", value: (data, id) => data.activity[id], ascending: false },
  { key: "firing", name: "Active on", value: (data, id) => data.firing[id], ascending: false },
];

// A token as it is sorted: by its letters, or whole where it has none but spaces.
function wordOf(data, v) {
  if (v === null || v === undefined) return null;
  const token = data.vocabulary[v];
  return token.trim().toLowerCase() || token;
}

// "17", or with several levels "0.17".
function featureLabel(data, id) {
  return data.sizes.length > 1 ? `${data.level[id]}.${data.index[id]}` : String(data.index[id]);
}

function featureToken(data, id, longest) {
  return data.top_token[id] === null ? make("small", {}, "never active") : tokenChip(data.vocabulary[data.top_token[id]], longest);
}

// The first two arguments of contextText for the example number i, and whether the text goes on beyond what is known of it.
function exampleContext(data, id, i) {
  const list = data.examples[id];
  const [tokens, mark, reach] = [list.tokens[i].map((v) => data.vocabulary[v]), list.mark[i], data.context[data.level[id]]];
  return [tokens, mark, { cutBefore: mark === reach, cutAfter: tokens.length - mark - 1 === reach }];
}

class FeatureTable extends ExploreTable {
  constructor(data, listeners) {
    super(data, { noun: "feature", prefix: "feature-", columns: FEATURE_COLUMNS, sortedBy: "activity", ...listeners });
    this.levels = byId("feature-level");
    this.levels.append(...data.sizes.map((size, level) => make("option", { value: level }, `Level ${level}: ${formatCount(size)}`)));
    if (data.sizes.length > 1) this.levels.append(make("option", { value: "all" }, "All levels"));
    this.levels.value = "0";
    this.levels.addEventListener("change", () => this.update());
  }

  // Show a feature's level, unless all are shown.
  showLevelOf(id) {
    if (this.levels.value === "all" || this.levels.value === String(this.data.level[id])) return;
    this.levels.value = String(this.data.level[id]);
    this.update();
  }

  all() {
    const chosen = this.levels.value;
    return this.data.index.map((_, id) => id).filter((id) => chosen === "all" || this.data.level[id] === Number(chosen));
  }

  label(id) {
    return featureLabel(this.data, id);
  }

  // A bare number is looked for within the level.
  isNumber(id, query) {
    const number = query.replace(/^#/, "");
    return number === this.label(id) || number === String(this.data.index[id]);
  }

  textsOf(id) {
    const { data } = this;
    const lens = [data.promoted[id], data.suppressed[id]].flatMap((tokens) => tokens ?? []).map((v) => data.vocabulary[v]);
    const contexts = data.examples[id].tokens.slice(0, 3).map((tokens) => tokens.map((v) => data.vocabulary[v]).join(""));
    return [labelOf(data, id)?.text ?? "", ...contexts, ...lens, ...lens.map((token) => tokenLabel(token))];
  }

  cells(id) {
    const { data } = this;
    const active = data.top_token[id] !== null;
    const largest = Math.max(...this.ids.map((other) => data.activity[other]));
    const promoted = data.promoted[id]?.[0];
    return {
      token: [labelChip(data, id), featureToken(data, id, 32), active ? contextText(...exampleContext(data, id, 0).slice(0, 2), { before: 30, after: 60 }) : null],
      promoted: [promoted === undefined ? "–" : tokenChip(data.vocabulary[promoted], 18)],
      activity: [formatPercentage(data.activity[id]), this.bar(data.activity[id], largest)],
      firing: [formatPercentage(data.firing[id])],
    };
  }
}
