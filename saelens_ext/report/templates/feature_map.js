// The map of features: one disc per feature of the finest level, area by how often it is active, colour by its fraction of all that is written.

class FeatureMap extends RegionMap {
  constructor(data, onSelect) {
    super(data, onSelect, "feature-", [...data.x.keys()]);
  }

  get noun() {
    return "feature";
  }

  shades() {
    return shadeScale(this.data.activity.slice(0, this.ids.length), "Fraction", formatPercentage);
  }

  shade(id) {
    return this.data.activity[id];
  }

  token(id) {
    const v = this.data.top_token[id];
    return v === null ? "" : this.data.vocabulary[v];
  }

  context(id) {
    return this.data.top_token[id] === null ? [[], 0] : exampleContext(this.data, id, 0);
  }

  figures(id) {
    return `active on ${formatPercentage(this.data.firing[id])}`;
  }

  number(id) {
    return featureLabel(this.data, id);
  }
}
