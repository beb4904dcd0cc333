// A table with details beside it. The address names what is selected (#region-12), so that a link, a reload and the Back
// button work.

class Explorer {
  // Subclasses make `table` and `detail`, then call `start`.
  constructor(noun, prefix) {
    this.noun = noun;
    this.prefix = prefix;
    this.wide = matchMedia("(min-width: 64rem)");
    this.listeners = {
      onSelect: (id) => {
        this.go(id);
        this.reveal();
      },
      onOrder: (matching) => this.ordered(matching),
    };
  }

  element(name) {
    return byId(this.prefix + name);
  }

  start(selected) {
    this.selected = selected;
    this.listen();
    this.table.update();
    this.show(selected);
    if (this.follow()) this.element("detail").scrollIntoView();
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
    super("region", "");
    this.data = data;
    this.map = new RegionMap(data, (id) => this.go(id));
    this.table = new RegionTable(data, this.listeners);
    this.detail = new RegionDetail(data, "region", "", (id, step) => this.table.beside(id, step));
    this.start(largestOf(data.members));
  }

  find(name) {
    const id = /^\d+$/.test(name) ? Number(name) : -1;
    return id >= 0 && id < this.data.members.length ? id : null;
  }

}

class FeatureExplorer extends Explorer {
  constructor(data) {
    super("feature", "feature-");
    this.data = data;
    this.map = new FeatureMap(data, (id) => this.go(id));
    this.table = new FeatureTable(data, this.listeners);
    this.detail = new FeatureDetail(data, "feature", "feature-", (id, step) => this.table.beside(id, step));
    this.start(largestOf(data.activity.slice(0, data.sizes[0])));
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
