// Line figures of evidence, each with a legend whose entries pick a line out.

const FIGURE_HEIGHT = 290;
const LINE_COLOURS = 8;
const FEW_POINTS = 12; // each of which is marked

class EvidenceFigure extends LineChart {
  constructor(figure, data) {
    super();
    this.data = data;
    this.holder = figure.querySelector(".chart");
    this.legend = figure.querySelector(".line-legend");
    this.picked = null;
    this.colours = data.lines.map((_, i) => `line-${i % LINE_COLOURS}`);
    this.limits();
    this.buttons = data.lines.map((line, i) => this.entry(line, i));
    this.legend.append(...this.buttons.map((button) => make("li", {}, button)));
    onWidthChange(this.holder, () => this.render());
  }

  limits() {
    const all = (name) => this.data.lines.flatMap((line) => line[name]);
    [this.left, this.right] = bounds(all("x"));
    [this.low, this.high] = bounds(all("y"));
  }

  across(value) {
    return (value - this.left) / (this.right - this.left);
  }

  up(value) {
    return (value - this.low) / (this.high - this.low);
  }

  entry(line, i) {
    const swatch = draw("svg", { width: 26, height: 8, "aria-hidden": "true" }, draw("line", { class: `curve ${line.kind} ${this.colours[i]}`, x1: 0, x2: 26, y1: 4, y2: 4 }));
    const button = make("button", { type: "button", "aria-pressed": "false" }, swatch, make("bdi", {}, visible(line.label)));
    button.addEventListener("click", () => this.pick(this.picked === i ? null : i));
    return button;
  }

  render() {
    const width = Math.max(220, this.holder.clientWidth);
    const margins = { left: 46, right: 12, top: 28, bottom: 42 };
    const svg = this.frame(width, FIGURE_HEIGHT, margins, { role: "img", "aria-label": this.description() });
    this.curves = this.data.lines.map((line, i) => this.group(line, this.colours[i]));
    svg.append(
      ...this.levels(niceTicks(this.low, this.high, 4)),
      ...this.columns(niceTicks(this.left, this.right, width > 330 ? 5 : 3)),
      ...this.baseline(this.data.x),
      this.label(0, 11, "start", this.data.y),
      ...this.curves,
    );
    this.holder.replaceChildren(svg);
    this.pick(this.picked);
  }

  // A line and, where they are few, its points.
  group(line, colour) {
    const points = line.x.map((x, j) => [x, line.y[j]]);
    const dots = points.length <= FEW_POINTS ? points.map((point) => this.dot(point, `knot ${colour}`, 3.2)) : [];
    return draw("g", { class: "line" }, this.curve(points, `curve ${line.kind} ${colour}`), ...dots);
  }

  pick(i) {
    this.picked = i;
    this.buttons.forEach((button, j) => button.setAttribute("aria-pressed", String(i === j)));
    this.curves.forEach((curve, j) => curve.classList.toggle("faded", i !== null && i !== j));
  }

  description() {
    return `${this.data.y} against ${this.data.x}: ${this.data.lines.map((line) => line.label).join(", ")}`;
  }
}

// The range of some values, never empty.
function bounds(values) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  return low < high ? [low, high] : [low - 0.5, high + 0.5];
}

document.documentElement.classList.add("scripted");
for (const part of document.querySelectorAll(".evaluation-part")) {
  const data = readData(`${part.id}-data`);
  for (const figure of part.querySelectorAll("[data-figure]")) new EvidenceFigure(figure, data[Number(figure.dataset.figure)]);
}
