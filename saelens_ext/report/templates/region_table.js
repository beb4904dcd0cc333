// The table of regions.

// `ascending` is the direction of the first click: nearest first, but largest mass first.
const REGION_COLUMNS = [
  { key: "id", name: "Region", value: (data, id) => id, ascending: true },
  { key: "token", name: "Exemplar", value: (data, id) => tokenText(data, id).trim().toLowerCase() || tokenText(data, id), ascending: true },
  { key: "mass", name: "Mass", value: (data, id) => data.members[id], ascending: false },
  { key: "coherence", name: "Coherence", value: (data, id) => data.coherence[id], ascending: false },
  { key: "mean", name: "Mean distance", value: (data, id) => data.mean_distance[id], ascending: true },
  { key: "farthest", name: "Farthest member", value: (data, id) => data.max_distance[id], ascending: false },
  { key: "nearest", name: "Nearest region", value: nearestOther, ascending: true },
];

// --- what several parts ask of a region ---

function tokenText(data, id) {
  return data.vocabulary[data.exemplars.token[id]];
}

function massOf(data, id) {
  return data.n_profiled > 0 ? data.members[id] / data.n_profiled : 0;
}

function nearestOther(data, id) {
  return data.neighbour_distances[id][0] ?? null;
}

// First two arguments of contextText for an exemplar.
function exemplarContext(data, id) {
  return [data.exemplars.tokens[id].map((v) => data.vocabulary[v]), data.exemplars.mark[id]];
}

class RegionTable extends ExploreTable {
  constructor(data, listeners) {
    super(data, { noun: "region", prefix: "", columns: REGION_COLUMNS, sortedBy: "mass", ...listeners });
    this.largest = Math.max(1, data.members[largestOf(data.members)]);
  }

  all() {
    return this.data.members.map((_, id) => id);
  }

  label(id) {
    return String(id);
  }

  textsOf(id) {
    const token = tokenText(this.data, id);
    return [labelOf(this.data, id)?.text ?? "", exemplarContext(this.data, id)[0].join(""), token, tokenLabel(token)];
  }

  cells(id) {
    const { data } = this;
    return {
      token: [labelChip(data, id), tokenChip(tokenText(data, id), 32), contextText(...exemplarContext(data, id), { before: 30, after: 60 })],
      mass: [formatPercentage(massOf(data, id)), this.bar(data.members[id], this.largest)],
      coherence: [formatDistance(data.coherence[id])],
      mean: [formatDistance(data.mean_distance[id])],
      farthest: [formatDistance(data.max_distance[id])],
      nearest: [formatDistance(nearestOther(data, id))],
    };
  }
}
