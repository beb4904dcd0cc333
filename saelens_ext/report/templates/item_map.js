// What the maps share: items drawn at places, circles around them, a text beside one, and the way from one to the next.

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

// Subclasses give `ids`, `width`, `tooltip`, `place(id)`, `radius(id)` and `matches(id)`.
class ItemMap {
  // Around an item, or hidden where there is none.
  encircle(circle, id, margin) {
    circle.setAttribute("visibility", id === null ? "hidden" : "visible");
    if (id === null) return;
    const [x, y] = this.place(id);
    circle.setAttribute("cx", x.toFixed(1));
    circle.setAttribute("cy", y.toFixed(1));
    circle.setAttribute("r", (this.radius(id) + margin).toFixed(1));
  }

  // The text beside an item: above it, or below where there is no room.
  explain(id, ...children) {
    this.tooltip.hidden = id === null;
    if (id === null) return;
    this.tooltip.replaceChildren(...children);
    const [x, y] = this.place(id);
    const left = Math.min(Math.max(0, x - this.tooltip.offsetWidth / 2), Math.max(0, this.width - this.tooltip.offsetWidth));
    const gap = this.radius(id) + 10;
    const above = y - gap - this.tooltip.offsetHeight;
    this.tooltip.style.left = `${left}px`;
    this.tooltip.style.top = `${above > 0 ? above : y + gap}px`;
  }

  // The nearest item within 45 degrees of a direction on screen.
  towards(from, [dx, dy]) {
    const [x0, y0] = this.place(from);
    let [best, least] = [null, Infinity];
    for (const id of this.ids) {
      if (id === from || !this.matches(id)) continue;
      const [x, y] = this.place(id);
      const along = (x - x0) * dx + (y - y0) * dy;
      const across = Math.abs((x - x0) * dy) + Math.abs((y - y0) * dx);
      if (along > 0 && across <= along && along + across < least) [best, least] = [id, along + across];
    }
    return best;
  }
}
