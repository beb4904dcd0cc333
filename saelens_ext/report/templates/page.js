// Joins the parts. Of two parts one is shown at a time: the one that holds what the address names.

class Parts {
  constructor(parts) {
    this.parts = parts;
    addEventListener("hashchange", () => this.follow());
    this.show(parts[0]);
    this.follow();
  }

  // The part that the address leads into; the one shown stays for an address that leads nowhere.
  follow() {
    const name = location.hash.slice(1);
    const part = this.parts.find((one) => name.startsWith(`${one.dataset.noun}-`) || one.querySelector(`[id="${CSS.escape(name)}"]`) || one.id === name);
    if (part === undefined || !part.hidden) return;
    this.show(part);
    byId(name)?.scrollIntoView();
  }

  show(shown) {
    for (const part of this.parts) {
      part.hidden = part !== shown;
      for (const link of document.querySelectorAll(`[data-part="${part.id}"]`)) {
        if (link.matches("nav")) link.hidden = part.hidden;
        else if (part.hidden) link.removeAttribute("aria-current");
        else link.setAttribute("aria-current", "true");
      }
    }
  }
}

document.documentElement.classList.add("scripted");

// Sections that fold are open without scripts and on paper, and open when the address leads to them.
const folds = [...document.querySelectorAll("details.fold")];
const unfold = () => {
  const section = location.hash.length > 1 ? byId(location.hash.slice(1)) : null;
  const fold = section?.querySelector?.(":scope > details.fold");
  if (fold) fold.open = true;
};
for (const fold of folds) fold.open = false;
addEventListener("hashchange", unfold);
addEventListener("beforeprint", () => folds.forEach((fold) => (fold.open = true)));
unfold();

const parts = [...document.querySelectorAll(".part")];
if (parts.length > 1) new Parts(parts);
if (byId("region-data") !== null) {
  new GrowthChart(readData("growth-data"));
  new RegionExplorer(readData("region-data"));
}
if (byId("feature-data") !== null) new FeatureExplorer(readData("feature-data"));
