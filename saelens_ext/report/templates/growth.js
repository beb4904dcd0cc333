// The number of regions against activations seen, one curve per dictionary.

const GROWTH_HEIGHT = 300;

class GrowthChart extends LineChart {
  constructor(curves) {
    super();
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
    const margins = { left: 50, right: this.narrow ? 62 : 140, top: 28, bottom: 42 };
    const svg = this.frame(width, GROWTH_HEIGHT, margins, { role: "img", "aria-label": this.description() });
    svg.append(...this.axes(), ...this.curves.map((curve) => this.line(curve)), ...this.names());
    this.addGuide(svg);
    this.holder.replaceChildren(svg);
    this.readOut(this.longest);
  }

  across(seen) {
    return seen / this.longest;
  }

  up(regions) {
    const top = Math.max(this.most, 2);
    return this.logarithmic ? Math.log(Math.max(regions, 1)) / Math.log(top) : regions / top;
  }

  axes() {
    const counts = (ticks) => ticks.map(({ at }) => ({ at, text: formatCount(at) }));
    return [
      ...this.levels(counts(this.logarithmic ? decades(this.most) : niceTicks(0, this.most, 5, 1))),
      ...this.columns(counts(niceTicks(0, this.longest, this.narrow ? 3 : 6, 1))),
      ...this.baseline("activations seen"),
      this.label(this.box.left - 8, 14, "start", "regions"),
    ];
  }

  line(curve) {
    const points = curve.seen.map((seen, i) => [seen, curve.regions[i]]).filter(([, n]) => n > 0 || !this.logarithmic);
    return this.curve(points, curve.chosen ? "curve chosen" : "curve");
  }

  // Every curve is named at its end, its number of regions beside it.
  names() {
    const by = byId("builds").querySelector("th").textContent.toLowerCase();
    const heading = draw("text", { class: "tick", x: this.box.right + 9, y: 14 }, `${by} · regions`);
    const labels = this.endLabels(
      this.curves.map(({ label, regions, seen, chosen }) => ({
        at: [last(seen), last(regions)],
        text: this.narrow ? label : `${label} · ${formatCount(last(regions))}`,
        kind: chosen ? "end chosen" : "end",
      })),
    );
    return this.narrow ? labels : [heading, ...labels];
  }

  // A line that follows the pointer, its figures read out below.
  addGuide(svg) {
    const { left, right, top, bottom } = this.box;
    const guide = draw("line", { class: "guide", y1: top, y2: bottom, visibility: "hidden" });
    svg.append(guide);
    svg.addEventListener("pointermove", (event) => {
      const fraction = (event.clientX - svg.getBoundingClientRect().left - left) / (right - left);
      const at = this.x(this.readOut(this.longest * Math.min(1, Math.max(0, fraction))));
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
    return `Number of regions against activations seen. ${ends.join("; ")}.`;
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
  for (let at = 1; at <= most; at *= 10) ticks.push({ at });
  return ticks;
}
