// What the line charts share: a frame with scales and axes, curves, and names at the ends of curves.

// Subclasses say how far along the frame a value lies, from 0 to 1: `across(value)` and `up(value)`.
class LineChart {
  // An empty drawing; `margins` lie between its edges and the frame.
  frame(width, height, margins, attributes) {
    this.box = { left: margins.left, right: width - margins.right, top: margins.top, bottom: height - margins.bottom };
    return draw("svg", { width, height, ...attributes });
  }

  x(value) {
    return this.box.left + (this.box.right - this.box.left) * this.across(value);
  }

  y(value) {
    return this.box.bottom - (this.box.bottom - this.box.top) * this.up(value);
  }

  label(x, y, anchor, text) {
    return draw("text", { class: "tick", x, y, "text-anchor": anchor }, text);
  }

  // Lines across the frame, each with its figure to the left; the one at 0 is an axis if `zero` is true.
  levels(ticks, zero = false) {
    const { left, right } = this.box;
    return ticks.flatMap(({ at, text }) => [
      draw("line", { class: zero && at === 0 ? "axis" : "grid", x1: left, x2: right, y1: this.y(at), y2: this.y(at) }),
      this.label(left - 6, this.y(at) + 4, "end", text),
    ]);
  }

  columns(ticks) {
    return ticks.map(({ at, text }) => this.label(this.x(at), this.box.bottom + 18, "middle", text));
  }

  baseline(text) {
    const { left, right, bottom } = this.box;
    return [draw("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }), this.label((left + right) / 2, bottom + 36, "middle", text)];
  }

  // A line through [x, y] pairs of values, moved sideways by `aside` pixels.
  curve(points, kind, aside = 0) {
    const path = points.map(([x, y]) => `${(this.x(x) + aside).toFixed(1)},${this.y(y).toFixed(1)}`).join(" ");
    return draw("polyline", { class: kind, points: path });
  }

  dot([x, y], kind, r) {
    return draw("circle", { class: kind, r, cx: this.x(x).toFixed(1), cy: this.y(y).toFixed(1) });
  }

  // Texts to the right of the frame, each joined to the end of its curve, apart from each other.
  endLabels(ends) {
    const right = this.box.right;
    const heights = spread(ends.map(({ at }) => this.y(at[1])), 15, this.box.top, this.box.bottom);
    return ends.flatMap(({ at, text, kind }, i) => [
      draw("line", { class: "leader", x1: this.x(at[0]) + 3, x2: right + 6, y1: this.y(at[1]), y2: heights[i] }),
      draw("text", { class: kind, x: right + 9, y: heights[i] + 4 }, text),
    ]);
  }
}

function last(list) {
  return list[list.length - 1];
}

// About `wanted` round numbers from low to high, no closer than `least`, with the decimals they need.
function niceTicks(low, high, wanted, least = 0) {
  const rough = (high - low) / Math.max(1, wanted);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(least, [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999) * power);
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push({ at: i * step + 0, text: formatFixed(i * step, decimals) }); // never -0
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
