// Change against strength: the own mode's direction beside each control's, one small plot per control on one scale.

const DOSE_HEIGHT = 170;

class DosePlots extends LineChart {
  constructor(data) {
    super();
    this.data = data.dose;
    this.key = data.key;
    this.holder = byId(`${data.key}-dose-charts`);
    this.table = byId(data.key).querySelector(".dose-table");
    this.group = 0;
    this.measure = 0;
    this.choices("mode", this.data.modes.map((mode) => (mode < 0 ? "all modes" : `mode ${mode}`)), (i) => (this.group = i));
    this.choices("measure", this.data.measures.map(({ name }) => name), (i) => (this.measure = i));
    onWidthChange(this.holder, () => this.render());
  }

  choices(name, options, take) {
    const select = byId(`${this.key}-dose-${name}`);
    select.replaceChildren(...options.map((text, i) => make("option", { value: i }, text)));
    select.addEventListener("change", () => {
      take(Number(select.value));
      this.render();
    });
  }

  curves() {
    return this.data.values[this.measure][this.group];
  }

  unit() {
    return this.data.measures[this.measure].unit;
  }

  render() {
    const all = this.curves().flat().flat().filter((value) => value !== null);
    this.low = Math.min(0, ...all);
    this.high = Math.max(0, ...all);
    if (this.low === this.high) this.high = this.low + 1;
    const controls = this.data.methods.slice(1).map((method, i) => this.figure(method, i + 1));
    this.holder.replaceChildren(...(controls.length > 0 ? controls : [this.figure(this.data.methods[0], 0)]));
    const n = this.data.n[this.group][0];
    const measure = this.data.measures[this.measure];
    byId(`${this.key}-dose-note`).textContent =
      `${formatCount(n)} held-out continuation${n === 1 ? "" : "s, each counting once"}. Up: change of the ${measure.name}, ${this.unit()} (${measure.meaning}). Across: strength ε.`;
    this.tabulate();
  }

  figure(method, index) {
    const width = Math.max(130, Math.min(this.holder.clientWidth, this.columnWidth()));
    const own = this.curves()[0];
    const other = this.curves()[index];
    const figure = make("figure", { "data-method": method.key });
    const margins = { left: 52, right: 16, top: 8, bottom: 24 };
    const svg = this.frame(width, DOSE_HEIGHT, margins, { role: "img", "aria-label": this.description(method, index) });
    svg.append(...this.axes(), ...(index > 0 ? this.line(other, "control", 3) : []), ...this.line(own, "own", -3));
    figure.append(make("h3", {}, method.name), make("p", { class: "hint" }, method.meaning), svg);
    return figure;
  }

  // As wide as the columns that the style lays out.
  columnWidth() {
    const columns = getComputedStyle(this.holder).gridTemplateColumns.split(" ").length;
    const gap = Number.parseFloat(getComputedStyle(this.holder).columnGap) || 0;
    return Math.floor((this.holder.clientWidth - gap * (columns - 1)) / columns);
  }

  across(strength) {
    const { strengths } = this.data;
    return (strength - strengths[0]) / (last(strengths) - strengths[0]);
  }

  up(value) {
    return (value - this.low) / (this.high - this.low);
  }

  axes() {
    const { strengths } = this.data;
    const labelled = new Set([strengths[0], ...strengths.filter((s) => s === 0), last(strengths)]);
    return [
      ...this.levels(niceTicks(this.low, this.high, 4), true),
      ...this.columns([...labelled].map((at) => ({ at, text: formatStrength(at) }))),
    ];
  }

  line(curve, kind, aside) {
    const known = curve.map((point, i) => [this.data.strengths[i], ...point]).filter(([, change]) => change !== null);
    const at = (s) => this.x(s) + aside / 2;
    const bars = known.filter(([, , low, high]) => low !== null && high !== null);
    return [
      ...bars.map(([s, , low, high]) => draw("line", { class: `whisker ${kind}`, x1: at(s), x2: at(s), y1: this.y(low), y2: this.y(high) })),
      this.curve(known, `dose ${kind}`, aside / 2),
      ...known.map(([s, change]) => this.knot(kind, at(s), this.y(change))),
    ];
  }

  // Shape as well as colour tells the two apart.
  knot(kind, x, y) {
    if (kind === "own") return draw("circle", { class: "knot own", r: 3.2, cx: x, cy: y });
    return draw("rect", { class: "knot control", x: x - 2.7, y: y - 2.7, width: 5.4, height: 5.4 });
  }

  description(method, index) {
    const strongest = last(this.data.strengths);
    const ends = [0, index].map((i) => formatInterval(last(this.curves()[i])));
    return `At strength ${strongest} the change is ${ends[0]} ${this.unit()} along the own mode’s direction and ${ends[1]} along ${method.name}.`;
  }

  tabulate() {
    const head = ["Direction", ...this.data.strengths.map((s) => `ε = ${formatStrength(s)}`)];
    const rows = this.data.methods.map(({ name }, i) => {
      const cells = this.curves()[i].map((point) => make("td", {}, formatInterval(point)));
      return make("tr", {}, make("th", { scope: "row" }, name), ...cells);
    });
    this.table.replaceChildren(
      make("caption", {}, `Mean change with 95% interval, ${this.unit()}`),
      make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col" }, text)))),
      make("tbody", {}, ...rows),
    );
  }
}

function formatStrength(s) {
  return formatFixed(s, Number.isInteger(s) ? 0 : 2);
}
