// One region: its exemplar, figures, examples, tokens and neighbours.

class RegionDetail extends Detail {
  title(id) {
    return [`Region ${id} `, tokenChip(tokenText(this.data, id), 40)];
  }

  parts(id) {
    const { data } = this;
    return [
      labelPart(data, id),
      this.provenance(id),
      this.exemplar(id),
      this.measures(id),
      this.lens(id),
      this.examples("Nearest members", "The profiled activations of this region closest to the exemplar.", data.nearest[id]),
      this.examples("Boundary members", "Those of the region's own activations farthest from it, where the region ends.", data.boundary?.[id]),
      this.neighbours(id),
    ];
  }

  range() {
    return `0 to ${this.data.members.length - 1}`;
  }

  provenance(id) {
    const { document: documents, window: windows, position } = this.data.exemplars;
    const place = `document ${documents[id]}, window ${windows[id]}, position ${position[id]}`;
    const started = `Started by activation ${formatCount(this.data.started[id])} of ${formatCount(this.data.n_seen)}.`;
    return make("p", { class: "provenance" }, `Exemplar: ${place}. ${started}`);
  }

  exemplar(id) {
    const { cut_before: cutBefore, cut_after: cutAfter } = this.data.exemplars;
    const text = contextText(...exemplarContext(this.data, id), { cutBefore: cutBefore[id], cutAfter: cutAfter[id] });
    return make("div", { class: "exemplar" }, text);
  }

  measures(id) {
    const { data } = this;
    const nearest = nearestOther(data, id);
    const massNote = `${formatCount(data.members[id])} of ${formatCount(data.n_profiled)} activations are nearest to this exemplar`;
    return make(
      "dl",
      { class: "measures" },
      measure("mass", "Mass", formatPercentage(massOf(data, id)), massNote),
      measure("joined", "Members at arrival", formatCount(data.joined[id]), "joined during the build, among the exemplars known by then"),
      measure("coherence", "Coherence", formatDistance(data.coherence[id]), "length of the members' mean direction; 1 means all alike"),
      measure("mean", "Mean distance", formatDistance(data.mean_distance[id]), "of the members from the exemplar"),
      measure("farthest", "Farthest member", formatDistance(data.max_distance[id]), this.farthestNote(data.max_distance[id])),
      measure("separation", "Nearest region", formatDistance(nearest), nearest === null ? "there is no other" : "to the nearest other exemplar"),
    );
  }

  farthestNote(distance) {
    if (distance === null) return "none was measured";
    const side = distance > this.data.threshold ? "beyond" : "within";
    return `${side} the threshold of ${formatDistance(this.data.threshold)}`;
  }

  lens(id) {
    const { lens } = this.data;
    if (lens === null) return make("p", { class: "hint" }, "No logit lens was computed for this report.");
    const high = "Highest logits of the exemplar through the final norm and unembedding.";
    return this.lensLists(lens, id, high, "Lowest logits, lowest first.");
  }

  // `list` holds columns of equal length, or is missing where none were gathered.
  examples(name, note, list) {
    const item = (distance, i) => {
      const text = contextText(list.tokens[i].map((v) => this.data.vocabulary[v]), list.mark[i], {
        cutBefore: list.mark[i] === this.data.context,
        cutAfter: list.tokens[i].length - list.mark[i] - 1 === this.data.context,
      });
      const place = make("small", {}, `document ${list.document[i]}, position ${list.position[i]}`);
      return make("li", {}, number(formatDistance(distance)), make("div", {}, text, place));
    };
    const items = (list?.distance ?? []).map(item);
    return make("div", { class: "examples" }, ...headed(name, items.length > 0 ? note : "There is none."), make("ol", {}, ...items));
  }

  neighbours(id) {
    const { neighbours, neighbour_distances: distances } = this.data;
    const item = (other, i) => {
      const link = make("a", { href: `#region-${other}` }, `Region ${other} `, tokenChip(tokenText(this.data, other), 24));
      return make("li", {}, link, number(formatDistance(distances[id][i])));
    };
    const note = neighbours[id].length > 0 ? "By cosine distance between exemplars." : "There is no other region.";
    return make("div", { class: "neighbours" }, ...headed("Nearest other regions", note), make("ol", {}, ...neighbours[id].map(item)));
  }
}
