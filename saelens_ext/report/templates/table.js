// A table of things to look at: search, sort by any column, one page at a time. What its rows are, subclasses say.

const PAGE_ROWS = 25;
const NARROW_PAGE_ROWS = 10;

// Elements are found by their ids: "<noun>-rows" and the like for the table, "<prefix>search" and the like for its controls.
class ExploreTable {
  // `columns` name their values; `sortedBy` is the key of the one to begin with.
  constructor(data, { noun, prefix, columns, sortedBy, onSelect, onOrder }) {
    Object.assign(this, { data, noun, prefix, columns, onSelect, onOrder });
    this.column = columns.find(({ key }) => key === sortedBy);
    this.ascending = false;
    this.ids = [];
    this.page = 0;
    this.selected = 0;
    this.narrow = matchMedia("(max-width: 45rem)");
    this.collator = new Intl.Collator("en");
    this.searched = [];
    this.listen();
  }

  control(name) {
    return byId(this.prefix + name);
  }

  listen() {
    for (const column of this.columns) this.control("sort").append(make("option", { value: column.key }, column.name));
    this.control("sort").addEventListener("change", () => {
      const column = this.columns.find(({ key }) => key === this.control("sort").value);
      this.sortBy(column, column.ascending);
    });
    this.control("sort-direction").addEventListener("click", () => this.sortBy(this.column, !this.ascending));
    this.control("search").addEventListener("input", () => this.update());
    this.control("page-first").addEventListener("click", () => this.turnTo(0));
    this.control("page-back").addEventListener("click", () => this.turnTo(this.page - 1));
    this.control("page-on").addEventListener("click", () => this.turnTo(this.page + 1));
    this.control("page-last").addEventListener("click", () => this.turnTo(Infinity));
    this.narrow.addEventListener("change", () => this.select(this.selected));
  }

  // --- what other parts call ---

  // Turn to the page that holds it, unless the search hides it.
  select(id) {
    this.selected = id;
    const at = this.ids.indexOf(id);
    this.turnTo(at >= 0 ? Math.floor(at / this.pageRows) : this.page);
  }

  // The one `step` rows on in the present order, or null at its ends.
  beside(id, step) {
    const at = this.ids.indexOf(id);
    return (at < 0 ? this.ids[0] : this.ids[at + step]) ?? null;
  }

  // Search and sort anew, and go to the first page.
  update() {
    const query = this.control("search").value.trim().toLowerCase();
    this.ids = this.found(query);
    this.renderHead();
    this.turnTo(0);
    this.onOrder(query === "" ? null : new Set(this.ids));
  }

  // --- order ---

  found(query) {
    const all = this.all();
    const ids = query === "" ? all : all.filter((id) => this.isNumber(id, query) || this.searchText(id).includes(query));
    // Whoever types a number wants what has it first.
    return ids.sort((a, b) => this.isNumber(b, query) - this.isNumber(a, query) || this.compare(a, b));
  }

  searchText(id) {
    this.searched[id] ??= this.textsOf(id).join("\n").toLowerCase();
    return this.searched[id];
  }

  // Whether a search names this one, with or without a "#" in front.
  isNumber(id, query) {
    return query.replace(/^#/, "") === this.label(id);
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
    byId(`${this.noun}-rows`).replaceChildren(...shown.map((id) => this.row(id)));
    byId(`${this.noun}-count`).textContent = this.countText(first, shown.length);
    for (const id of ["page-first", "page-back"]) setUsable(this.control(id), this.page > 0);
    for (const id of ["page-on", "page-last"]) setUsable(this.control(id), this.page < lastPage);
  }

  countText(first, n) {
    const total = this.all().length;
    const all = formatCount(total);
    if (n === 0) return `None of ${all} ${this.noun}s matches.`;
    const some = this.ids.length < total;
    return `${formatCount(first + 1)}–${formatCount(first + n)} of ${formatCount(this.ids.length)}${some ? ` matching, ${all} in all` : ""}`;
  }

  // --- drawing ---

  renderHead() {
    byId(`${this.noun}-head`).replaceChildren(...this.columns.map((column) => this.heading(column)));
    this.control("sort").value = this.column.key;
    this.control("sort-direction").textContent = this.ascending ? "Ascending ▲" : "Descending ▼";
  }

  heading(column) {
    const active = column === this.column;
    const arrow = active ? (this.ascending ? " ▲" : " ▼") : "";
    const button = make("button", { type: "button", "data-column": column.key }, column.name, make("span", { "aria-hidden": "true" }, arrow));
    button.addEventListener("click", () => {
      this.sortBy(column, active ? !this.ascending : column.ascending);
      byId(`${this.noun}-head`).querySelector(`[data-column=${column.key}]`).focus();
    });
    const direction = active ? (this.ascending ? "ascending" : "descending") : "none";
    return make("th", { scope: "col", "aria-sort": direction, class: `column-${column.key}` }, button);
  }

  row(id) {
    const current = id === this.selected;
    const cells = this.cells(id);
    const link = make("a", { href: `#${this.noun}-${this.label(id)}`, "aria-current": current ? "true" : null }, this.label(id));
    const row = make(
      "tr",
      { [`data-${this.noun}`]: this.label(id), class: current ? "selected" : null },
      make("th", { scope: "row", class: "column-id" }, link),
      ...this.columns.slice(1).map(({ key, name }) => make("td", { class: `column-${key}`, "data-label": name }, ...cells[key])),
    );
    row.addEventListener("click", (event) => {
      // A click that ends the marking of some text is not a choice.
      if (event.target.closest("a") === null && String(getSelection()) === "") this.onSelect(id);
    });
    return row;
  }

  // A small bar below a figure, as long as the value is of the largest.
  bar(value, largest) {
    const bar = draw("rect", { width: largest > 0 ? (100 * value) / largest : 0, height: 4 });
    return draw("svg", { class: "mass-bar", viewBox: "0 0 100 4", preserveAspectRatio: "none", "aria-hidden": "true" }, bar);
  }
}
