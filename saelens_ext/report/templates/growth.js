// The number of regions against activations seen, one curve per dictionary.

const GROWTH_HEIGHT = 300;
const LABEL_GAP = 15;

function last(list) {
  return list[list.length - 1];
}

class GrowthChart {
  constructor(curves) {
    this.curves = curves;
    this.longest = Math.max(...curves.map((curve) => last(curve.seen)));
    this.most = Math.max(...curves.map((curve) => last(curve.regions)));
    this.logarithmic = false;
    this.holder = byId("growth-chart");
    for (const [id, value] of [["growth-log", true], ["growth-linear", false]]) {
      byId(id).addEventListener("click", () => this.scaleBy(value));
    }
    onWidthChange(this.holder, () => this.render());
  }

  scaleBy(logarithmic) {
    this.logarithmic = logarithmic;
    byId("growth-log").setAttribute("aria-pressed", String(logarithmic));
    byId("growth-linear").setAttribute("aria-pressed", String(!logarithmic));
    this.render();
  }

  render() {
    const width = Math.max(260, this.holder.clientWidth);
    this.narrow = width < 480;
    this.box = { left: 50, right: width - (this.narrow ? 62 : 140), top: 28, bottom: GROWTH_HEIGHT - 42 };
    const svg = draw("svg", { width, height: GROWTH_HEIGHT, role: "img", "aria-label": this.description() });
    svg.append(...this.axes(), ...this.curves.map((curve) => this.line(curve)), ...this.endLabels());
    this.addGuide(svg);
    this.holder.replaceChildren(svg);
    this.readOut(this.longest);
  }

  x(seen) {
    return this.box.left + ((this.box.right - this.box.left) * seen) / this.longest;
  }

  y(regions) {
    const top = Math.max(this.most, 2);
    const share = this.logarithmic ? Math.log(Math.max(regions, 1)) / Math.log(top) : regions / top;
    return this.box.bottom - (this.box.bottom - this.box.top) * share;
  }

  axes() {
    const { left, right, bottom } = this.box;
    const tick = (x, y, anchor, text) => draw("text", { class: "tick", x, y, "text-anchor": anchor }, text);
    const heights = this.logarithmic ? decades(this.most) : roundSteps(this.most, 5);
    return [
      ...heights.map((n) => draw("line", { class: "grid", x1: left, x2: right, y1: this.y(n), y2: this.y(n) })),
      ...heights.map((n) => tick(left - 8, this.y(n) + 4, "end", formatCount(n))),
      ...roundSteps(this.longest, this.narrow ? 3 : 6).map((seen) => tick(this.x(seen), bottom + 18, "middle", formatCount(seen))),
      draw("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
      tick((left + right) / 2, GROWTH_HEIGHT - 6, "middle", "activations seen"),
      tick(left - 8, 14, "start", "regions"),
    ];
  }

  line(curve) {
    const points = curve.seen.map((seen, i) => [seen, curve.regions[i]]).filter(([, n]) => n > 0 || !this.logarithmic);
    const path = points.map(([seen, n]) => `${this.x(seen).toFixed(1)},${this.y(n).toFixed(1)}`).join(" ");
    return draw("polyline", { class: curve.chosen ? "curve chosen" : "curve", points: path });
  }

  // Every curve is named at its end, its number of regions beside it.
  endLabels() {
    const ends = this.curves.map((curve) => this.y(last(curve.regions)));
    const heights = spread(ends, LABEL_GAP, this.box.top, this.box.bottom);
    const by = byId("builds").querySelector("th").textContent.toLowerCase();
    const heading = draw("text", { class: "tick", x: this.box.right + 11, y: 14 }, `${by} · regions`);
    const labels = this.curves.flatMap((curve, i) => [
      draw("line", { class: "leader", x1: this.x(last(curve.seen)) + 2, x2: this.box.right + 8, y1: ends[i], y2: heights[i] }),
      draw(
        "text",
        { class: curve.chosen ? "end chosen" : "end", x: this.box.right + 11, y: heights[i] + 4 },
        this.narrow ? curve.label : `${curve.label} · ${formatCount(last(curve.regions))}`,
      ),
    ]);
    return this.narrow ? labels : [heading, ...labels];
  }

  // A line that follows the pointer, its figures read out below.
  addGuide(svg) {
    const { left, right, top, bottom } = this.box;
    const guide = draw("line", { class: "guide", y1: top, y2: bottom, visibility: "hidden" });
    svg.append(guide);
    svg.addEventListener("pointermove", (event) => {
      const share = (event.clientX - svg.getBoundingClientRect().left - left) / (right - left);
      const at = this.x(this.readOut(this.longest * Math.min(1, Math.max(0, share))));
      guide.setAttribute("x1", at);
      guide.setAttribute("x2", at);
      guide.setAttribute("visibility", "visible");
    });
    svg.addEventListener("pointerleave", () => {
      guide.setAttribute("visibility", "hidden");
      this.readOut(this.longest);
    });
  }

  // Figures at the last common point at or before `seen`, which is returned; a curve that has ended by then shows its end.
  readOut(seen) {
    const fullest = this.curves.find((curve) => last(curve.seen) === this.longest);
    const at = fullest.seen[lastAtMost(fullest.seen, seen)];
    const parts = this.curves.map((curve) => {
      const i = lastAtMost(curve.seen, at);
      return `${curve.label}: ${formatCount(curve.regions[i])}${last(curve.seen) < at ? " (ended)" : ""}`;
    });
    byId("growth-readout").textContent = `Regions after ${formatCount(at)} activations — ${parts.join(" · ")}`;
    return at;
  }

  description() {
    const end = ({ label, regions, seen }) => `${label}: ${formatCount(last(regions))} regions after ${formatCount(last(seen))} activations`;
    const ends = this.curves.map(end);
    return `Regions founded against activations seen. ${ends.join("; ")}.`;
  }
}

// Index of the last entry of a sorted list that is at most `value`, 0 if none is.
function lastAtMost(sorted, value) {
  let low = 0;
  let high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (sorted[middle] <= value) low = middle;
    else high = middle - 1;
  }
  return low;
}

function decades(most) {
  const ticks = [];
  for (let n = 1; n <= most; n *= 10) ticks.push(n);
  return ticks;
}

// About `wanted` whole round numbers from 0 to `most`.
function roundSteps(most, wanted) {
  const rough = Math.max(1, most / wanted);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(1, [1, 2, 5, 10].find((factor) => factor * power >= rough) * power);
  const ticks = [];
  for (let n = 0; n <= most; n += step) ticks.push(n);
  return ticks;
}

// Move labels apart until none overlaps, inside [low, high], keeping their order.
function spread(wanted, gap, low, high) {
  const order = wanted.map((_, i) => i).sort((a, b) => wanted[a] - wanted[b]);
  const placed = [...wanted];
  let previous = -Infinity;
  for (const i of order) previous = placed[i] = Math.max(wanted[i], previous + gap, low);
  let next = Math.max(high, low + gap * (order.length - 1)) + gap;
  for (const i of order.reverse()) next = placed[i] = Math.min(placed[i], next - gap);
  return placed;
}

// Draw now and whenever the width of the holder changes.
function onWidthChange(holder, render) {
  let width = holder.clientWidth;
  render();
  new ResizeObserver(() => {
    if (holder.clientWidth === width) return;
    width = holder.clientWidth;
    render();
  }).observe(holder);
}
