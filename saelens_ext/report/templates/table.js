// The table of regions: search, sort by any column, one page at a time.

const PAGE_ROWS = 25;
const NARROW_PAGE_ROWS = 10;

// `ascending` is the direction of the first click: nearest first, but largest mass first.
const COLUMNS = [
  { key: "id", name: "Region", value: (data, id) => id, ascending: true },
  { key: "token", name: "Exemplar", value: (data, id) => tokenText(data, id).trim().toLowerCase() || tokenText(data, id), ascending: true },
  { key: "mass", name: "Mass", value: (data, id) => data.members[id], ascending: false },
  { key: "coherence", name: "Coherence", value: (data, id) => data.coherence[id], ascending: false },
  { key: "mean", name: "Mean distance", value: (data, id) => data.mean_distance[id], ascending: true },
  { key: "farthest", name: "Farthest member", value: (data, id) => data.max_distance[id], ascending: false },
  { key: "nearest", name: "Nearest region", value: nearestOther, ascending: true },
];

// --- what several parts ask of a region ---

function tokenText(data, id) {
  return data.vocabulary[data.exemplars.token[id]];
}

function massOf(data, id) {
  return data.n_profiled > 0 ? data.members[id] / data.n_profiled : 0;
}

function nearestOther(data, id) {
  return data.neighbour_distances[id][0] ?? null;
}

// First two arguments of contextText for an exemplar.
function exemplarContext(data, id) {
  return [data.exemplars.tokens[id].map((v) => data.vocabulary[v]), data.exemplars.mark[id]];
}

class RegionTable {
  constructor(data, { onSelect, onOrder }) {
    this.data = data;
    this.onSelect = onSelect;
    this.onOrder = onOrder;
    this.column = COLUMNS.find(({ key }) => key === "mass");
    this.ascending = false;
    this.ids = [];
    this.page = 0;
    this.selected = 0;
    this.largest = Math.max(1, data.members[largestOf(data.members)]);
    this.narrow = matchMedia("(max-width: 45rem)");
    this.collator = new Intl.Collator("en");
    this.searched = [];
    this.listen();
  }

  listen() {
    for (const column of COLUMNS) byId("sort").append(make("option", { value: column.key }, column.name));
    byId("sort").addEventListener("change", () => {
      const column = COLUMNS.find(({ key }) => key === byId("sort").value);
      this.sortBy(column, column.ascending);
    });
    byId("sort-direction").addEventListener("click", () => this.sortBy(this.column, !this.ascending));
    byId("search").addEventListener("input", () => this.update());
    byId("page-first").addEventListener("click", () => this.turnTo(0));
    byId("page-back").addEventListener("click", () => this.turnTo(this.page - 1));
    byId("page-on").addEventListener("click", () => this.turnTo(this.page + 1));
    byId("page-last").addEventListener("click", () => this.turnTo(Infinity));
    this.narrow.addEventListener("change", () => this.select(this.selected));
  }

  // --- what other parts call ---

  // Turn to the page that holds the region, unless the search hides it.
  select(id) {
    this.selected = id;
    const at = this.ids.indexOf(id);
    this.turnTo(at >= 0 ? Math.floor(at / this.pageRows) : this.page);
  }

  // The region `step` rows on in the present order, or null at its ends.
  beside(id, step) {
    const at = this.ids.indexOf(id);
    return (at < 0 ? this.ids[0] : this.ids[at + step]) ?? null;
  }

  // Search and sort anew, and go to the first page.
  update() {
    const query = byId("search").value.trim().toLowerCase();
    this.ids = this.found(query);
    this.renderHead();
    this.turnTo(0);
    this.onOrder(query === "" ? null : new Set(this.ids));
  }

  // --- order ---

  found(query) {
    const all = this.data.members.map((_, id) => id);
    const number = /^#?\d+$/.test(query) ? Number(query.replace("#", "")) : null;
    const ids = query === "" ? all : all.filter((id) => id === number || this.searchText(id).includes(query));
    // Whoever types a number wants that region first.
    return ids.sort((a, b) => (b === number) - (a === number) || this.compare(a, b));
  }

  searchText(id) {
    const token = tokenText(this.data, id);
    this.searched[id] ??= [exemplarContext(this.data, id)[0].join(""), token, tokenLabel(token)].join("\n").toLowerCase();
    return this.searched[id];
  }

  // What has no figure comes last either way.
  compare(a, b) {
    const [x, y] = [this.column.value(this.data, a), this.column.value(this.data, b)];
    if (x === null || y === null) return (x === null) - (y === null) || a - b;
    const order = typeof x === "string" ? this.collator.compare(x, y) : x - y;
    return (this.ascending ? order : -order) || a - b;
  }

  sortBy(column, ascending) {
    this.column = column;
    this.ascending = ascending;
    this.update();
  }

  // --- pages ---

  get pageRows() {
    return this.narrow.matches ? NARROW_PAGE_ROWS : PAGE_ROWS;
  }

  turnTo(page) {
    const lastPage = Math.max(0, Math.ceil(this.ids.length / this.pageRows) - 1);
    this.page = Math.min(lastPage, Math.max(0, page));
    const first = this.page * this.pageRows;
    const shown = this.ids.slice(first, first + this.pageRows);
    byId("region-rows").replaceChildren(...shown.map((id) => this.row(id)));
    byId("region-count").textContent = this.countText(first, shown.length);
    for (const id of ["page-first", "page-back"]) setUsable(byId(id), this.page > 0);
    for (const id of ["page-on", "page-last"]) setUsable(byId(id), this.page < lastPage);
  }

  countText(first, n) {
    const all = formatCount(this.data.members.length);
    if (n === 0) return `None of ${all} regions matches.`;
    const some = this.ids.length < this.data.members.length;
    return `${formatCount(first + 1)}–${formatCount(first + n)} of ${formatCount(this.ids.length)}${some ? ` matching, ${all} in all` : ""}`;
  }

  // --- drawing ---

  renderHead() {
    byId("region-head").replaceChildren(...COLUMNS.map((column) => this.heading(column)));
    byId("sort").value = this.column.key;
    byId("sort-direction").textContent = this.ascending ? "Ascending ▲" : "Descending ▼";
  }

  heading(column) {
    const active = column === this.column;
    const arrow = active ? (this.ascending ? " ▲" : " ▼") : "";
    const button = make("button", { type: "button", "data-column": column.key }, column.name, make("span", { "aria-hidden": "true" }, arrow));
    button.addEventListener("click", () => {
      this.sortBy(column, active ? !this.ascending : column.ascending);
      byId("region-head").querySelector(`[data-column=${column.key}]`).focus();
    });
    const direction = active ? (this.ascending ? "ascending" : "descending") : "none";
    return make("th", { scope: "col", "aria-sort": direction, class: `column-${column.key}` }, button);
  }

  row(id) {
    const { data } = this;
    const current = id === this.selected;
    const cells = {
      token: [tokenChip(tokenText(data, id), 32), contextText(...exemplarContext(data, id), { before: 30, after: 60 })],
      mass: [formatShare(massOf(data, id)), this.massBar(id)],
      coherence: [formatDistance(data.coherence[id])],
      mean: [formatDistance(data.mean_distance[id])],
      farthest: [formatDistance(data.max_distance[id])],
      nearest: [formatDistance(nearestOther(data, id))],
    };
    const link = make("a", { href: `#region-${id}`, "aria-current": current ? "true" : null }, String(id));
    const row = make(
      "tr",
      { "data-region": id, class: current ? "selected" : null },
      make("th", { scope: "row", class: "column-id" }, link),
      ...COLUMNS.slice(1).map(({ key, name }) => make("td", { class: `column-${key}`, "data-label": name }, ...cells[key])),
    );
    row.addEventListener("click", (event) => {
      // A click that ends the marking of some text is not a choice.
      if (event.target.closest("a") === null && String(getSelection()) === "") this.onSelect(id);
    });
    return row;
  }

  massBar(id) {
    const bar = draw("rect", { width: (100 * this.data.members[id]) / this.largest, height: 4 });
    return draw("svg", { class: "mass-bar", viewBox: "0 0 100 4", preserveAspectRatio: "none", "aria-hidden": "true" }, bar);
  }
}
