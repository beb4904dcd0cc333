// The map: one disc per region at the projection of its exemplar, area by mass, colour by coherence.

const SHADES = 5;
const ZOOM_STEP = 1.6;
const CLOSEST_ZOOM = 40;
const MARGIN = 26;
const CROWD = 800; // regions from which on discs are drawn smaller

class RegionMap extends ItemMap {
  // `prefix` comes before the ids of its elements, `ids` are those drawn.
  constructor(data, onSelect, prefix = "", ids = data.members.map((_, id) => id)) {
    super();
    this.data = data;
    this.prefix = prefix;
    this.onSelect = onSelect;
    this.ids = ids;
    this.bySize = [...this.ids].sort((a, b) => data.members[b] - data.members[a] || a - b);
    this.crowding = Math.min(1, (CROWD / this.ids.length) ** 0.25);
    this.view = { zoom: 1, x: 0, y: 0 };
    this.selected = 0;
    this.matching = null;
    this.drag = null;
    this.fit = 1; // pixels per unit of the coordinates at zoom 1
    this.build();
    this.listen();
    onWidthChange(this.holder, () => this.resize());
  }

  element(name) {
    return byId(this.prefix + name);
  }

  // --- what is drawn; the map of features says it in its own words ---

  get noun() {
    return "region";
  }

  shades() {
    return shadeScale(this.data.coherence, "Coherence", formatDistance);
  }

  shade(id) {
    return this.data.coherence[id];
  }

  token(id) {
    return tokenText(this.data, id);
  }

  context(id) {
    return exemplarContext(this.data, id);
  }

  figures(id) {
    return `mass ${formatPercentage(massOf(this.data, id))}, coherence ${formatDistance(this.data.coherence[id])}`;
  }

  number(id) {
    return String(id);
  }

  // What an item is called on the map: the first words of a label that can be relied on, else its token.
  nameOf(id) {
    const label = labelOf(this.data, id);
    return label?.sure ? label.text.split("…")[0].trim() || label.text.replace("…", "").trim() : tokenLabel(this.token(id), 14);
  }

  build() {
    const { data } = this;
    const shades = this.shades();
    this.holder = this.element("map-chart");
    this.tooltip = make("div", { class: "tooltip", hidden: "" });
    this.labels = draw("g", { class: "map-labels" });
    this.halo = draw("circle", { class: "halo", visibility: "hidden" });
    this.ring = draw("circle", { class: "ring" });
    this.discs = this.ids.map((id) => draw("circle", { class: `disc ${shades.of(this.shade(id))}`, [`data-${this.noun}`]: id }));
    const hint = `Map of the ${this.noun}s. The arrow keys go to the next region in their direction, plus and minus zoom.`;
    // Small discs last, so that no large one hides them.
    const layer = draw("g", {}, ...this.bySize.map((id) => this.discs[id]));
    this.svg = draw("svg", { tabindex: "0", role: "group", "aria-label": hint }, layer, this.labels, this.halo, this.ring);
    this.holder.append(this.svg, this.tooltip);
    this.element("map-legend").replaceChildren(...shades.legend());
    this.element("map-projection").textContent =
      `Projection: ${data.projection.name}. ${data.projection.caution} Distances on the map are only indicative; those in the table are exact.`;
  }

  // --- what other parts call ---

  select(id) {
    this.selected = id;
    this.encircle(this.ring, this.ids.includes(id) ? id : null, 4);
    this.element("map-readout").replaceChildren(
      make("span", {}, `Selected: ${this.caption(id)}. `),
      make("a", { href: `#${this.prefix}detail`, class: "narrow-only" }, "Details ↓"),
    );
  }

  // Regions to keep bright: a Set, or null for all.
  match(ids) {
    this.matching = ids;
    for (const id of this.ids) this.discs[id].classList.toggle("faded", !this.matches(id));
    this.name();
  }

  // --- drawing ---

  resize() {
    this.width = Math.max(260, this.holder.clientWidth);
    const extent = (list) => Math.max(Math.abs(list[largestOf(list.map(Math.abs))]), 1e-9);
    const [across, along] = [extent(this.data.x), extent(this.data.y)];
    const tallest = Math.max(260, 0.33 * innerHeight); // so that the table below begins in the same view
    const wanted = across > 1e-6 ? ((this.width - 2 * MARGIN) * along) / across + 2 * MARGIN : 0;
    this.height = Math.round(Math.min(tallest, Math.max(260, wanted)));
    this.fit = Math.min((this.width / 2 - MARGIN) / across, (this.height / 2 - MARGIN) / along);
    this.svg.setAttribute("width", this.width);
    this.svg.setAttribute("height", this.height);
    this.render();
  }

  render() {
    for (const id of this.ids) this.encircle(this.discs[id], id, 0);
    this.encircle(this.ring, this.ids.includes(this.selected) ? this.selected : null, 4);
    this.name();
    this.svg.classList.toggle("zoomed", this.view.zoom > 1);
  }

  matches(id) {
    return this.matching === null || this.matching.has(id);
  }

  place(id) {
    const { zoom, x, y } = this.view;
    return [this.width / 2 + (this.data.x[id] * this.fit - x) * zoom, this.height / 2 + (-this.data.y[id] * this.fit - y) * zoom];
  }

  radius(id) {
    const fraction = this.data.members[id] / Math.max(1, this.data.members[this.bySize[0]]);
    const largest = Math.min(22, 9 + this.width / 60) * Math.min(1.8, this.view.zoom ** 0.3);
    return this.crowding * Math.max(2.6, Math.sqrt(fraction) * largest);
  }

  // Name the largest regions in view, as many as find room.
  name() {
    const taken = [];
    const most = this.width < 480 ? 14 : 36;
    for (const id of this.bySize) {
      if (taken.length >= most) break;
      const label = this.matches(id) ? this.labelArea(id) : null;
      if (label === null || taken.some((other) => overlap(label, other))) continue;
      taken.push(label);
    }
    const text = ({ left, right, top, words }) =>
      draw("text", { x: ((left + right) / 2).toFixed(1), y: (top + 12).toFixed(1), "text-anchor": "middle" }, words);
    this.labels.replaceChildren(...taken.map(text));
  }

  // Where a region's name would stand, on a large disc or beside a small one; null where it would leave the map.
  labelArea(id) {
    const words = shortName(this.nameOf(id));
    const length = 6.8 * Array.from(words).length + 6;
    const [x, y] = this.place(id);
    const r = this.radius(id);
    const left = r > 9 ? x - length / 2 : x + r + length < this.width ? x + r : x - r - length;
    const inside = left >= 0 && left + length <= this.width && y >= 8 && y + 8 <= this.height;
    return inside ? { left, right: left + length, top: y - 8, bottom: y + 8, words } : null;
  }

  caption(id) {
    const label = labelOf(this.data, id);
    const called = label === null ? tokenLabel(this.token(id), 32) : label.text;
    return `${capitalised(this.noun)} ${this.number(id)} ${called} — ${this.figures(id)}`;
  }

  hover(id) {
    this.encircle(this.halo, id, 2);
    const context = id === null ? null : contextText(...this.context(id).slice(0, 2), { before: 50, after: 50 });
    this.explain(id, ...(id === null ? [] : [make("b", {}, this.caption(id)), context]));
  }

  // --- moving about ---

  listen() {
    const { svg } = this;
    svg.addEventListener("keydown", (event) => this.onKey(event));
    svg.addEventListener("pointerdown", (event) => this.onPress(event));
    svg.addEventListener("pointermove", (event) => this.onMove(event));
    svg.addEventListener("pointerup", (event) => this.onRelease(event));
    svg.addEventListener("pointercancel", () => (this.drag = null));
    svg.addEventListener("pointerleave", () => this.hover(null));
    svg.addEventListener("wheel", (event) => this.onWheel(event), { passive: false });
    this.element("map-in").addEventListener("click", () => this.zoomBy(ZOOM_STEP));
    this.element("map-out").addEventListener("click", () => this.zoomBy(1 / ZOOM_STEP));
    this.element("map-reset").addEventListener("click", () => this.zoomBy(0));
  }

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in ARROWS) {
      const next = this.towards(this.selected, ARROWS[event.key]);
      if (next !== null) this.onSelect(next);
    } else if (event.key === "+" || event.key === "=") this.zoomBy(ZOOM_STEP);
    else if (event.key === "-") this.zoomBy(1 / ZOOM_STEP);
    else return;
    event.preventDefault();
  }

  onPress(event) {
    this.drag = { x: event.clientX, y: event.clientY, start: this.view, moved: false };
    if (this.view.zoom > 1) this.svg.setPointerCapture(event.pointerId);
  }

  onMove(event) {
    if (this.drag && this.view.zoom > 1) {
      const [dx, dy] = [event.clientX - this.drag.x, event.clientY - this.drag.y];
      const { zoom, x, y } = this.drag.start;
      this.drag.moved ||= Math.hypot(dx, dy) > 4;
      this.view = { zoom, x: x - dx / zoom, y: y - dy / zoom };
      this.hover(null);
      this.render();
    } else if (event.pointerType !== "touch") this.hover(this.regionAt(event));
  }

  onRelease(event) {
    const id = this.drag && !this.drag.moved ? this.regionAt(event) : null;
    this.drag = null;
    if (id !== null) this.onSelect(id);
  }

  // A plain wheel scrolls the page; with Ctrl or Command it zooms, as on other maps.
  onWheel(event) {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    this.zoomBy(event.deltaY < 0 ? 1.25 : 0.8, this.pointOf(event));
  }

  pointOf(event) {
    const box = this.svg.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  // Zoom about a point that stays where it is.
  zoomBy(factor, [atX, atY] = [this.width / 2, this.height / 2]) {
    const zoom = Math.min(CLOSEST_ZOOM, Math.max(1, this.view.zoom * factor));
    const shift = 1 / this.view.zoom - 1 / zoom;
    const { x, y } = this.view;
    const moved = { zoom, x: x + (atX - this.width / 2) * shift, y: y + (atY - this.height / 2) * shift };
    this.view = zoom === 1 ? { zoom, x: 0, y: 0 } : moved;
    this.hover(null);
    this.render();
  }

  // The region under the pointer or, for a finger, near it. The rim counts, so that a small disc on a large one can be hit.
  regionAt(event) {
    const [px, py] = this.pointOf(event);
    let best = null;
    let bestScore = event.pointerType === "touch" ? 22 : 9;
    for (const id of this.ids) {
      const [x, y] = this.place(id);
      const away = Math.hypot(x - px, y - py);
      const r = this.radius(id);
      const score = away <= r ? (away / r) * Math.min(r, 4) - 4 : away - r;
      if (score < bestScore) [best, bestScore] = [id, score];
    }
    return best;
  }
}

function overlap(a, b) {
  return a.left < b.right && a.right > b.left && a.top < b.bottom && a.bottom > b.top;
}

function shortName(text) {
  const characters = Array.from(text);
  return characters.length > 16 ? `${characters.slice(0, 15).join("")}…` : text;
}

function capitalised(word) {
  return word[0].toUpperCase() + word.slice(1);
}

// Five shades over the range of a figure, and a legend that names its limits.
function shadeScale(values, name, format) {
  const known = values.filter((value) => value !== null);
  const low = known.reduce((a, b) => Math.min(a, b), Infinity);
  const high = known.reduce((a, b) => Math.max(a, b), -Infinity);
  const several = high > low;
  const index = (value) => (several ? Math.min(SHADES - 1, Math.floor(((value - low) / (high - low)) * SHADES)) : SHADES - 1);
  const shades = several ? Array.from({ length: SHADES }, (_, i) => i) : [SHADES - 1];
  return {
    of: (value) => (value === null ? "shade-none" : `shade-${index(value)}`),
    legend() {
      if (known.length === 0) return [`No ${name.toLowerCase()} was measured.`];
      const swatches = shades.map((i) => make("span", { class: `swatch shade-${i}` }));
      return [`${name} ${format(low)} `, ...swatches, several ? ` ${format(high)}` : ""];
    },
  };
}
