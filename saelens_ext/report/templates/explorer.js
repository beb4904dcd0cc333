// A table with details beside it. The address names what is selected (#region-12), so that a link, a reload and the Back
// button work.

class Explorer {
  // `parts` are the classes of its map, table and details; `selected` is shown at first.
  constructor(data, noun, prefix, parts, selected) {
    Object.assign(this, { data, noun, prefix, selected });
    this.wide = matchMedia("(min-width: 64rem)");
    const onSelect = (id) => {
      this.go(id);
      this.reveal();
    };
    this.map = new parts.Map(data, (id) => this.go(id));
    this.table = new parts.Table(data, { onSelect, onOrder: (matching) => this.ordered(matching) });
    this.detail = new parts.Detail(data, noun, prefix, (id, step) => this.table.beside(id, step));
    this.listen();
    this.table.update();
    this.show(selected);
    if (this.follow()) this.element("detail").scrollIntoView();
  }

  element(name) {
    return byId(this.prefix + name);
  }

  listen() {
    addEventListener("hashchange", () => this.follow());
    this.element("detail-back").addEventListener("click", () => this.step(-1));
    this.element("detail-on").addEventListener("click", () => this.step(1));
    document.addEventListener("click", (event) => {
      const link = event.target.closest(`a[href^='#${this.noun}-']`);
      if (link !== null && !event.ctrlKey && !event.metaKey && this.named(link.hash) !== null) setTimeout(() => this.reveal());
    });
  }

  ordered(matching) {
    this.map.match(matching);
    this.detail.steps(this.selected);
  }

  // Select by way of the address; `follow` does the rest.
  go(id) {
    const hash = `#${this.noun}-${this.table.label(id)}`;
    if (location.hash === hash) this.follow();
    else location.hash = hash;
  }

  step(by) {
    const next = this.table.beside(this.selected, by);
    if (next !== null) this.go(next);
  }

  // What an address calls the selected one, or null if it is about something else.
  named(hash) {
    const start = `#${this.noun}-`;
    const name = hash.startsWith(start) ? hash.slice(start.length) : null;
    return name !== null && byId(hash.slice(1)) !== null ? null : name;
  }

  // Show what the address names; false if it names none.
  follow() {
    const name = this.named(location.hash);
    if (name === null) return false;
    const id = this.find(name);
    if (id !== null) this.show(id);
    else this.detail.missing(name);
    return true;
  }

  show(id) {
    this.selected = id;
    this.map.select(id);
    this.table.select(id);
    this.detail.show(id);
  }

  // Beside the table the details are in view already; below it they have to be scrolled to.
  reveal() {
    if (this.wide.matches) return;
    this.element("detail").scrollIntoView();
    this.element("detail-title").focus({ preventScroll: true });
  }
}

class RegionExplorer extends Explorer {
  constructor(data) {
    super(data, "region", "", { Map: RegionMap, Table: RegionTable, Detail: RegionDetail }, largestOf(data.members));
  }

  find(name) {
    const id = /^\d+$/.test(name) ? Number(name) : -1;
    return id >= 0 && id < this.data.members.length ? id : null;
  }
}

class FeatureExplorer extends Explorer {
  constructor(data) {
    const first = largestOf(data.activity.slice(0, data.sizes[0]));
    super(data, "feature", "feature-", { Map: FeatureMap, Table: FeatureTable, Detail: FeatureDetail }, first);
  }

  find(name) {
    const id = this.data.index.findIndex((_, other) => this.table.label(other) === name);
    return id >= 0 ? id : null;
  }

  show(id) {
    this.selected = id;
    this.table.showLevelOf(id);
    super.show(id);
  }
}
