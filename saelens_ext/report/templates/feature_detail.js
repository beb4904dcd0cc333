// One SNMF feature: its neurons, contexts, tokens, place in the trees, overlaps and steered continuations.

class FeatureDetail extends Detail {
  title(id) {
    return [`Feature ${featureLabel(this.data, id)} `, featureToken(this.data, id, 40)];
  }

  parts(id) {
    return [labelPart(this.data, id), this.measures(id), this.neurons(id), this.steered(id), this.contexts(id), this.lens(id), this.tree(id), this.overlaps(id)];
  }

  range() {
    const { sizes } = this.data;
    return sizes.map((size, level) => (sizes.length > 1 ? `${level}.0 to ${level}.${size - 1}` : `0 to ${this.data.last ?? size - 1}`)).join(", ");
  }

  measures(id) {
    const { data } = this;
    return make(
      "dl",
      { class: "measures" },
      measure("activity", "Fraction", formatPercentage(data.activity[id]), "of all that the features of its level write, by size"),
      measure("firing", "Active on", formatPercentage(data.firing[id]), `of ${formatCount(data.n_profiled)} tokens, to whatever degree`),
      measure("largest", "Largest code", formatSignificant(data.largest[id]), "in units of the activation"),
      data.neurons === null ? null : measure("neurons", "Neurons", formatCount(data.n_neurons[id]), `of ${formatCount(data.width)}`),
    );
  }

  // Bars to the right of the middle are positive weights.
  neurons(id) {
    const { neurons, weights, n_neurons: all } = this.data;
    if (neurons === null) return null;
    const largest = Math.max(...weights[id].map(Math.abs));
    const item = (neuron, i) => {
      const weight = weights[id][i];
      const width = (50 * Math.abs(weight)) / largest;
      const bar = draw(
        "svg",
        { class: "weight-bar", viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" },
        draw("rect", { class: weight < 0 ? "negative" : "positive", x: weight < 0 ? 50 - width : 50, y: 0, width, height: 8 }),
        draw("line", { x1: 50, x2: 50, y1: 0, y2: 8 }),
      );
      return make("li", {}, number(String(neuron)), bar, number(formatSigned(weight)));
    };
    const cut = neurons[id].length < all[id] ? ` The ${neurons[id].length} heaviest of ${formatCount(all[id])}.` : "";
    const note = all[id] > 0 ? `Index and weight in the feature at unit length.${cut}` : "The feature is zero and uses none.";
    return make("div", { class: "neurons" }, ...headed("Neurons", note), make("ol", {}, ...neurons[id].map(item)));
  }

  contexts(id) {
    const { data } = this;
    const list = data.examples[id];
    const item = (code, i) => {
      const place = make("small", {}, `document ${list.document[i]}, position ${list.position[i]}`);
      return make("li", {}, number(formatSignificant(code)), make("div", {}, contextText(...exampleContext(data, id, i)), place));
    };
    const first = data.distances ? "Nearest to its exemplar; the cosine distance comes first." : "Where its code is largest; the code comes first.";
    const note = list.distance.length > 0 ? first : "It was active on no profiled token.";
    return make("div", { class: "examples" }, ...headed("Top activating contexts", note), make("ol", {}, ...list.distance.map(item)));
  }

  lens(id) {
    const { data } = this;
    if (data.promoted[id] === null) return make("p", { class: "hint" }, "No logit lens was computed for this report.");
    const high = "Highest logits of the direction it writes into the residual stream, through the final norm and unembedding: its logit lens.";
    return this.lensLists(data, id, high, "Lowest logits of that direction, lowest first.");
  }

  // --- the trees ---

  link(id) {
    return make("a", { href: `#feature-${featureLabel(this.data, id)}` }, `Feature ${featureLabel(this.data, id)} `, featureToken(this.data, id, 24));
  }

  tree(id) {
    const { sizes, parents, children, level } = this.data;
    if (sizes.length === 1) return null;
    const above = parents[id].map(([parent, weight]) => this.parent(parent, weight, id));
    const part = above.length > 0 ? "It is part of these coarser features, beside the others they gather." : this.noParent(id);
    const below = level[id] > 0 ? [make("p", { class: "hint" }, this.gathers(id)), this.branch(children[id])] : [];
    return make("div", { class: "tree" }, ...headed("Concept tree", part), make("ul", {}, ...above), ...below);
  }

  noParent(id) {
    const top = this.data.level[id] === this.data.sizes.length - 1;
    return top ? "It is of the coarsest level, the root of a tree." : "It is in no tree: no coarser feature has it among its strongest parts.";
  }

  gathers(id) {
    return this.data.children[id].length > 0 ? "It gathers these finer features, with their weight against the strongest." : "It gathers no finer feature.";
  }

  parent(parent, weight, id) {
    const roots = this.data.parents[parent].map(([root]) => this.link(root));
    const within = roots.length > 0 ? make("small", {}, " in ", ...roots.flatMap((root, i) => (i > 0 ? [", ", root] : [root]))) : null;
    const own = make("div", {}, this.link(parent), within);
    return make("li", { title: `weight ${weight}` }, own, this.branch(this.data.children[parent], id));
  }

  branch(pairs, current = null) {
    const item = ([child, weight]) => {
      const name = child === current ? make("b", {}, "this feature") : this.link(child);
      return make("li", {}, make("div", {}, name), number(weight.toFixed(2)));
    };
    return make("ul", { class: "branch" }, ...pairs.map(item));
  }

  // --- relatives and effects ---

  overlaps(id) {
    if (this.data.overlaps === null) return null;
    const rows = this.data.overlaps[id].map((other) => {
      const signs = other.same_sign === other.shared ? "all of one sign" : `${other.same_sign} of one sign`;
      const chance = `${formatSignificant(other.expected)} expected by chance; p = ${formatProbability(other.p)}, q = ${formatProbability(other.q)}`;
      const told = make("small", {}, `${other.shared} shared, ${signs}; ${chance}`);
      return make("li", { class: other.q < 0.05 ? "found" : null }, make("div", {}, this.link(other.feature), told));
    });
    const note =
      rows.length > 0
        ? "Features of its level that share neurons with it; p by the hypergeometric distribution, q corrected for all pairs (false discovery rate)."
        : "It shares no neuron with another feature of its level.";
    return make("div", { class: "overlaps" }, ...headed("Overlap in neurons", note), make("ol", {}, ...rows));
  }

  steered(id) {
    const { steered, level } = this.data;
    if (steered === null) return make("p", { class: "hint" }, "No continuation was steered for this report.");
    if (level[id] > 0) return null;
    const items = steered.texts[id].map((one) => this.continuation(one, steered));
    const note = items.length > 0 ? `“${steered.prompt}” continued, steered to ${steered.target} nats.` : "It was not steered with.";
    return make("div", { class: "steered" }, ...headed("Steered continuation", note), ...items);
  }

  continuation({ sign, coefficient, kl, text }, { prompt, target }) {
    const way = sign > 0 ? "along" : "against";
    if (text === null) {
      const reached = `The target of ${target} nats cannot be reached ${way} it: ${formatSignificant(kl)} nats at most, at coefficient ${formatSignificant(coefficient)}.`;
      return make("p", { class: "unreached" }, reached);
    }
    const told = `${sign > 0 ? "Along" : "Against"} it, coefficient ${formatSignificant(coefficient)}: ${formatSignificant(kl)} nats.`;
    return make("div", {}, make("small", {}, told), make("p", { class: "text" }, make("bdi", {}, make("span", { class: "given" }, prompt), text)));
  }
}

function formatSigned(x) {
  return `${x < 0 ? "−" : "+"}${Math.abs(x).toFixed(3)}`;
}

function formatSignificant(x) {
  return x === null ? "–" : String(Number(x.toPrecision(3))).replace("-", "−");
}

function formatProbability(x) {
  return x === null ? "–" : x < 0.001 ? x.toExponential(1).replace("-", "−") : String(Number(x.toPrecision(2)));
}
