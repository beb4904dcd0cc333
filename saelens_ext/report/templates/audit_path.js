// The rate-distortion curve, once per view: rate and remaining distortion at each beta and gamma.

const CURVE_HEIGHT = 270;

class CurvePlot extends LineChart {
  constructor(data, view, page) {
    super();
    Object.assign(this, { view, page, points: data.points });
    this.holder = byId(`${data.key}-curve-${view}`);
    this.gammas = [...new Set(this.points.map((point) => point.gamma))];
    onWidthChange(this.holder, () => this.render());
  }

  render() {
    const width = Math.max(240, this.holder.clientWidth);
    const lowest = Math.min(...this.points.map((point) => point[this.view]));
    this.low = Math.max(0, Math.min(0.9, lowest - 0.1 * (1 - lowest)));
    this.most = Math.max(0.1, ...this.points.map((point) => point.rate)) * 1.05;
    const label = `${this.view === "meaning" ? "Meaning" : "Mechanism"} unexplained against the rate. Left and right step through the points; the table below lists them.`;
    const margins = { left: 46, right: 56, top: 14, bottom: 42 };
    const svg = this.frame(width, CURVE_HEIGHT, margins, { tabindex: "0", role: "group", "aria-label": label });
    this.halo = draw("circle", { class: "halo", r: 7, visibility: "hidden" });
    svg.append(...this.axes(), ...this.gammas.flatMap((gamma, i) => this.line(gamma, i)), ...this.names(), ...this.chosen(), this.halo);
    svg.addEventListener("pointermove", (event) => this.page.point(this.nearest(event, svg)));
    svg.addEventListener("pointerleave", () => this.page.point(null));
    svg.addEventListener("click", (event) => this.page.point(this.nearest(event, svg)));
    svg.addEventListener("keydown", (event) => this.page.onKey(event));
    this.holder.replaceChildren(svg);
  }

  across(rate) {
    return rate / this.most;
  }

  up(fraction) {
    return (fraction - this.low) / (1 - this.low);
  }

  // Where a point lies: [rate, fraction unexplained].
  at(point) {
    return [point.rate, point[this.view]];
  }

  axes() {
    const percents = niceTicks(100 * this.low, 100, 4).map(({ at, text }) => ({ at: at / 100, text: `${text}%` }));
    return [...this.levels(percents), ...this.columns(niceTicks(0, this.most, 4)), ...this.baseline("rate, nats")];
  }

  line(gamma, i) {
    const places = this.pointsOf(gamma).map((point) => this.at(point));
    const shade = `gamma-${Math.round((4 * i) / Math.max(1, this.gammas.length - 1))}`;
    return [this.curve(places, `curve ${shade}`), ...places.map((place) => this.dot(place, `point ${shade}`, 3.5))];
  }

  pointsOf(gamma) {
    return this.points.filter((point) => point.gamma === gamma).sort((a, b) => a.rate - b.rate);
  }

  names() {
    return this.endLabels(this.gammas.map((gamma) => ({ at: this.at(last(this.pointsOf(gamma))), text: `γ ${gamma}`, kind: "end" })));
  }

  chosen() {
    return this.points.filter((point) => point.chosen).map((point) => this.dot(this.at(point), "ring", 8));
  }

  nearest(event, svg) {
    const box = svg.getBoundingClientRect();
    const away = (point) => Math.hypot(this.x(point.rate) + box.left - event.clientX, this.y(point[this.view]) + box.top - event.clientY);
    return this.points.reduce((best, point) => (away(point) < away(best) ? point : best));
  }

  mark(point) {
    this.halo.setAttribute("visibility", point === null ? "hidden" : "visible");
    if (point === null) return;
    this.halo.setAttribute("cx", this.x(point.rate).toFixed(1));
    this.halo.setAttribute("cy", this.y(point[this.view]).toFixed(1));
  }
}

class CurvePlots {
  constructor(data) {
    this.points = data.path.points;
    this.current = null;
    this.readout = byId(`${data.key}-curve-readout`);
    const shared = { key: data.key, points: this.points };
    this.plots = ["meaning", "mechanism"].map((view) => new CurvePlot(shared, view, this));
    this.point(null);
  }

  onKey(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    const order = [...this.points].sort((a, b) => a.rate - b.rate || a.gamma - b.gamma || a.beta - b.beta);
    const at = order.indexOf(this.current);
    this.point(order[Math.min(order.length - 1, Math.max(0, at + step))]);
    event.preventDefault();
  }

  // Without a point, the chosen one is read out.
  point(point) {
    this.current = point;
    for (const plot of this.plots) plot.mark(point);
    const shown = point ?? this.points.find((one) => one.chosen);
    this.readout.textContent = shown === undefined ? "Point at a clustering to read its figures." : this.sentence(shown);
  }

  sentence(point) {
    const modes = point.n === 1 ? "1 mode" : `${formatCount(point.n)} modes`;
    const same = this.points.filter((one) => one !== point && one.rate === point.rate && one.meaning === point.meaning && one.mechanism === point.mechanism);
    const error = point.stability_se === null ? "" : ` ± ${formatFixed(point.stability_se, 2)}`;
    const stability = point.stability === null ? "" : `, stability ${formatFixed(point.stability, 2)}${error}`;
    const unexplained = `${formatPercentage(point.meaning)} of the meaning and ${formatPercentage(point.mechanism)} of the mechanism unexplained`;
    const start = `${point.chosen ? "This report: " : ""}γ ${point.gamma}, β ${point.beta}`;
    const others = same.length > 0 ? `; the same at ${formatCount(same.length)} other pair${same.length === 1 ? "" : "s"} of β and γ` : "";
    return `${start} — ${modes}, rate ${formatFixed(point.rate, 2)} nats, ${unexplained}${stability}${others}.`;
  }
}
