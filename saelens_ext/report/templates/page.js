// Joins the parts. The address names the selected region (#region-12), so that a link, a reload and the Back button work.

class Page {
  constructor(data) {
    this.data = data;
    this.selected = largestOf(data.members);
    this.wide = matchMedia("(min-width: 64rem)");
    this.map = new RegionMap(data, (id) => this.go(id));
    this.table = new RegionTable(data, {
      onSelect: (id) => {
        this.go(id);
        this.reveal();
      },
      onOrder: (matching) => {
        this.map.match(matching);
        this.detail.steps(this.selected);
      },
    });
    this.detail = new RegionDetail(data, (id, step) => this.table.beside(id, step));
    this.listen();
    this.table.update();
    this.show(this.selected);
    if (this.follow()) byId("detail").scrollIntoView();
  }

  listen() {
    addEventListener("hashchange", () => this.follow());
    byId("detail-back").addEventListener("click", () => this.step(-1));
    byId("detail-on").addEventListener("click", () => this.step(1));
    document.addEventListener("click", (event) => {
      const link = event.target.closest("a[href^='#region-']");
      if (link !== null && !event.ctrlKey && !event.metaKey) setTimeout(() => this.reveal());
    });
  }

  // Select by way of the address; `follow` does the rest.
  go(id) {
    if (location.hash === `#region-${id}`) this.follow();
    else location.hash = `region-${id}`;
  }

  step(by) {
    const next = this.table.beside(this.selected, by);
    if (next !== null) this.go(next);
  }

  // Show the region that the address names; false if it names none.
  follow() {
    const named = /^#region-(.*)$/.exec(location.hash);
    if (named === null) return false;
    const id = /^\d+$/.test(named[1]) ? Number(named[1]) : -1;
    if (id >= 0 && id < this.data.members.length) this.show(id);
    else this.detail.missing(named[1]);
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
    byId("detail").scrollIntoView();
    byId("detail-title").focus({ preventScroll: true });
  }
}

document.documentElement.classList.add("scripted");
new GrowthChart(readData("growth-data"));
new Page(readData("region-data"));
