// Two maps of the same continuations. What is pointed at or chosen on one shows on both.

const MAP_MARGIN = 20;
const LONGEST_CAPTION = 240;
const MAP_HELP = "The arrow keys go to the next continuation in their direction, Escape lets go of it.";

// One of them. `points` holds x and y; `i` counts the continuations drawn.
class PointMap extends ItemMap {
  constructor(holder, name, points, maps) {
    super();
    Object.assign(this, { holder, name, points, maps, ids: maps.rows.map((_, i) => i) });
    this.across = Math.max(...points.x.map(Math.abs), 1e-9);
    this.along = Math.max(...points.y.map(Math.abs), 1e-9);
    this.build();
    this.listen();
    onWidthChange(holder, () => this.resize());
  }

  build() {
    const { maps } = this;
    const dot = (i) => draw("path", { d: shapeOf(maps.markAt(i)), class: `dot ${colourOf(maps.markAt(i))}`, "data-row": maps.rows[i] });
    this.dots = maps.rows.map((_, i) => dot(i));
    this.halo = draw("circle", { class: "halo", r: 12, visibility: "hidden" });
    this.ring = draw("circle", { class: "ring", r: 12, visibility: "hidden" });
    this.names = draw("g", { class: "map-labels" });
    this.tooltip = make("div", { class: "tooltip", hidden: "" });
    const layer = draw("g", {}, ...maps.bySize.map((i) => this.dots[i]));
    const label = `Map of the continuations by ${this.name}. ${MAP_HELP}`;
    this.svg = draw("svg", { tabindex: "0", role: "group", "aria-label": label }, layer, this.names, this.halo, this.ring);
    this.holder.append(this.svg, this.tooltip);
  }

  resize() {
    this.width = Math.max(240, this.holder.clientWidth);
    this.height = Math.round(Math.min(440, Math.max(260, this.width * 0.78)));
    this.fit = Math.min((this.width / 2 - MAP_MARGIN) / this.across, (this.height / 2 - MAP_MARGIN) / this.along);
    this.svg.setAttribute("width", this.width);
    this.svg.setAttribute("height", this.height);
    this.dots.forEach((dot, i) => this.put(dot, i));
    this.render();
  }

  put(dot, i) {
    const [x, y] = this.place(i);
    dot.setAttribute("transform", `translate(${x.toFixed(1)} ${y.toFixed(1)}) scale(${this.maps.radius(i).toFixed(2)})`);
  }

  place(i) {
    return [this.width / 2 + this.points.x[i] * this.fit, this.height / 2 - this.points.y[i] * this.fit];
  }

  render() {
    const { maps } = this;
    this.dots.forEach((dot, i) => dot.classList.toggle("faded", !maps.matches(i)));
    this.encircle(this.ring, maps.selected, 4);
    this.encircle(this.halo, maps.hovered, 4);
    this.names.replaceChildren(...this.labels());
  }

  // Modes are named at their medoids, as far as names find room.
  labels() {
    const taken = [];
    return this.maps.medoids.flatMap((i, mode) => {
      if (i < 0 || !this.maps.matches(i)) return [];
      const [x, y] = this.place(i);
      const at = [Math.min(this.width - 8, x + this.maps.radius(i) + 7), y + 4];
      if (taken.some(([x0, y0]) => Math.abs(x0 - at[0]) < 14 && Math.abs(y0 - at[1]) < 14)) return [];
      taken.push(at);
      return [draw("text", { x: at[0].toFixed(1), y: at[1].toFixed(1), "text-anchor": "middle" }, String(mode))];
    });
  }

  matches(i) {
    return this.maps.matches(i);
  }

  radius(i) {
    return this.maps.radius(i);
  }

  listen() {
    const { svg, maps } = this;
    svg.addEventListener("pointermove", (event) => event.pointerType !== "touch" && maps.hover(this.nearest(event, 14), this));
    svg.addEventListener("pointerleave", () => maps.hover(null, this));
    svg.addEventListener("click", (event) => maps.select(this.nearest(event, 22)));
    svg.addEventListener("keydown", (event) => this.onKey(event));
  }

  onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in ARROWS) this.maps.select(this.next(ARROWS[event.key]) ?? this.maps.selected);
    else if (event.key === "Escape") this.maps.select(null);
    else return;
    event.preventDefault();
  }

  // The continuation under the pointer, or near it.
  nearest(event, reach) {
    const box = this.svg.getBoundingClientRect();
    let [best, least] = [null, reach];
    this.maps.rows.forEach((_, i) => {
      if (!this.maps.matches(i)) return;
      const [x, y] = this.place(i);
      const away = Math.hypot(x - event.clientX + box.left, y - event.clientY + box.top);
      if (away < least) [best, least] = [i, away];
    });
    return best;
  }

  // The first mode's medoid where none is chosen.
  next(direction) {
    const { maps } = this;
    if (maps.selected === null || !maps.matches(maps.selected)) return maps.medoids.find((i) => i >= 0 && maps.matches(i)) ?? null;
    return this.towards(maps.selected, direction);
  }
}

class LinkedMaps {
  // `texts` gives, by row, the list entry that shows the continuation.
  constructor(data, part) {
    this.data = data;
    this.part = part;
    this.rows = data.maps.rows;
    this.at = new Map(this.rows.map((row, i) => [row, i]));
    // Heavy ones first, and members of large modes before those of small ones, so that none is covered for good.
    this.bySize = this.rows.map((_, i) => i).sort((a, b) => data.maps.size[b] - data.maps.size[a] || this.modeAt(a) - this.modeAt(b) || a - b);
    this.medoids = data.medoids.map((row) => this.at.get(row) ?? -1);
    this.entries = new Map([...part.querySelectorAll(".members li[data-row]")].map((entry) => [Number(entry.dataset.row), entry]));
    this.readout = byId(`${data.key}-readout`);
    this.mode = null;
    this.selected = null;
    this.hovered = null;
    this.maps = [];
    for (const name of ["meaning", "mechanism"]) this.maps.push(new PointMap(byId(`${data.key}-map-${name}`), name, data.maps[name], this));
    this.read();
  }

  modeAt(i) {
    return this.data.mode_of[this.rows[i]];
  }

  markAt(i) {
    return this.data.modes[this.modeAt(i)].mark;
  }

  radius(i) {
    const crowding = Math.min(1, (300 / this.rows.length) ** 0.25);
    return Math.min(10, Math.max(3, 5.2 * crowding * Math.sqrt(this.data.maps.size[i])));
  }

  matches(i) {
    return this.mode === null || this.modeAt(i) === this.mode;
  }

  caption(i, longest = Infinity) {
    const entry = this.entries.get(this.rows[i]);
    const heading = make("b", {}, inlineMark(this.markAt(i)), ` Mode ${this.modeAt(i)} · continuation ${this.rows[i]}`);
    const characters = Array.from(entry.querySelector(".text").textContent);
    const words = characters.length > longest ? `${characters.slice(0, longest).join("")}…` : characters.join("");
    const text = make("bdi", { class: "text" }, words);
    return [heading, text, make("small", {}, entry.querySelector("small").textContent.trim())];
  }

  // --- what is pointed at, chosen, filtered ---

  hover(i, map) {
    if (i === this.hovered && i !== null) return;
    this.hovered = i;
    for (const one of this.maps) {
      one.encircle(one.halo, i, 4);
      one.explain(one === map ? i : null, ...(i === null ? [] : this.caption(i, LONGEST_CAPTION)));
    }
  }

  select(i) {
    this.selected = i;
    for (const map of this.maps) map.encircle(map.ring, i, 4);
    this.read();
  }

  selectRow(row) {
    if (!this.at.has(row)) return false;
    if (!this.matches(this.at.get(row))) this.filter(null);
    this.select(this.at.get(row));
    return true;
  }

  filter(mode) {
    this.mode = mode;
    if (this.selected !== null && !this.matches(this.selected)) this.selected = null;
    this.hovered = null;
    for (const map of this.maps) {
      map.explain(null);
      map.render();
    }
    this.read();
  }

  read() {
    if (this.selected === null) {
      this.readout.replaceChildren("No continuation is chosen: click one, tap it, or use the arrow keys on a map.");
      return;
    }
    const mode = this.modeAt(this.selected);
    const link = make("a", { href: `#${this.data.key}-mode-${mode}` }, `To mode ${mode} ↓`);
    this.readout.replaceChildren(...this.caption(this.selected), link);
  }
}
