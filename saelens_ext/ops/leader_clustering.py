"""Streaming leader clustering of directions.

Symbols:
    c: the centre, ``(d,)``; theta: the threshold, a cosine distance in (0, 2].
    u_i: the direction of activation i about c, a unit row (see ``spherical``); i counts from the start of the stream.
    exemplar: an activation that founded a region. K: number of regions so far.
    dist: cosine distance, 1 - cosine in float64 of the two float32 unit rows (see ``grid_products``).

The clustering is the result of this loop, activation by activation in stream order:

    near = the exemplars e found before i with dist(u_i, e) <= theta
    if there are none: u_i founds region K
    otherwise: i joins the nearest of them, the earliest of equals

It is computed in blocks. Against the exemplars of earlier blocks the rows of a block are independent. Rows that none of
those covers compete among themselves: the founders are the lexicographically first maximal independent set of the graph
that links rows at most theta apart. Last, founders of this block are offered to every later row of it.

The published code differs: there, rows never see exemplars founded by others of their own batch once an older exemplar
is within theta, so that memberships depend on the batch size.

Source: Rumbelow, Exemplar Partitioning (arXiv 2605.14347), section on construction.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from saelens_ext._checks import finite, known_keys
from saelens_ext.ops.grid_products import (
    ROW_LIMIT,
    Candidates,
    best_cosine,
    distance,
    exact_cosine,
    nearest_column,
    new_tile,
    no_candidates,
    product_error,
    scan,
)
from saelens_ext.ops.memory import memory_for
from saelens_ext.ops.modes import standard_modes
from saelens_ext.ops.precision import where_float64_is
from saelens_ext.ops.spherical import checked_activations, directions, has_direction
from saelens_ext.ops.statistics import unseen_mass

_STATE = ("center", "threshold", "exemplars", "exemplar_indices", "counts", "sums", "n_seen", "n_undirected")


class LeaderClustering:
    """Cluster a stream of activations by direction; the result does not depend on how the stream is cut into batches.

    An activation equal to the centre has no direction: it is counted in ``n_seen`` and ``n_undirected``, gets the label
    -1, founds nothing and joins nothing.

    Args:
        center: ``(d,)``, finite. Its device is where the clustering lives, or the CPU where that has no float64.
        threshold: Cosine distance in (0, 2] within which an activation joins a region.

    Raises:
        ValueError: ``center`` is not a finite vector, or ``threshold`` lies outside (0, 2].

    Examples:
        >>> clustering = sx.LeaderClustering(center=torch.zeros(2), threshold=0.5)
        >>> _ = clustering.partial_fit(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]))
        >>> clustering.exemplar_indices.tolist(), clustering.counts.tolist()
        ([0, 2], [2, 1])
    """

    # Buffers made in inference mode could never be updated outside it; so here and below.
    @standard_modes()
    def __init__(self, center: Float[Tensor, " d"], threshold: float | int) -> None:
        if center.ndim != 1 or len(center) == 0 or not center.is_floating_point():
            raise ValueError(f"center must be a float vector (d,), got shape {tuple(center.shape)} and {center.dtype}.")
        self._center = where_float64_is(finite(center.detach(), "center")).clone()
        self._threshold = _checked_threshold(float(threshold))
        self._n_seen = self._n_undirected = self._n_regions = 0
        d, device = len(center), self._center.device
        self._exemplars = torch.empty(0, d, device=device)
        self._indices = torch.empty(0, dtype=torch.int64, device=device)
        self._counts = torch.empty(0, dtype=torch.int64, device=device)
        # Entries of directions are multiples of 2**-30: their sums are exact, so free of order, up to 2**23 members.
        self._sums = torch.empty(0, d, dtype=torch.float64, device=device)
        self._tile = new_tile(device)

    @property
    @standard_modes()
    def center(self) -> Float[Tensor, " d"]:
        """The centre, ``(d,)``."""
        return self._center.clone()

    @property
    def threshold(self) -> float:
        """The threshold, a cosine distance."""
        return self._threshold

    @property
    def n_seen(self) -> int:
        """Activations seen, those without a direction included."""
        return self._n_seen

    @property
    def n_undirected(self) -> int:
        """Activations seen that equal the centre."""
        return self._n_undirected

    @property
    def n_regions(self) -> int:
        """Number of regions K."""
        return self._n_regions

    @property
    @standard_modes()
    def exemplars(self) -> Float32[Tensor, "k d"]:
        """Directions of the founders, ``(K, d)`` unit rows in order of arrival."""
        return self._exemplars[: self._n_regions].clone()

    @property
    @standard_modes()
    def exemplar_indices(self) -> Int64[Tensor, " k"]:
        """Stream position of each founder, ``(K,)``, increasing."""
        return self._indices[: self._n_regions].clone()

    @property
    @standard_modes()
    def counts(self) -> Int64[Tensor, " k"]:
        """Members of each region, founder included, ``(K,)``."""
        return self._counts[: self._n_regions].clone()

    @property
    @standard_modes()
    def member_means(self) -> Float32[Tensor, "k d"]:
        """Mean direction of each region's members, ``(K, d)`` unit rows; zero where members cancel exactly."""
        sums = self._sums[: self._n_regions]
        return (sums / sums.norm(dim=1, keepdim=True).clamp(min=2.0**-30)).float()

    @property
    @standard_modes()
    def coherence(self) -> Float32[Tensor, " k"]:
        """Length of the mean of each region's member directions, ``(K,)`` in [0, 1]; 1 if they are all the same."""
        return (self._sums[: self._n_regions].norm(dim=1) / self._counts[: self._n_regions]).clamp(max=1.0).float()

    @property
    def unseen_mass(self) -> float:
        """Estimated probability that the next activation founds a region: the share of the last half of the stream that
        did.

        1 before the first activation; see ``statistics.unseen_mass``.
        """
        return unseen_mass(self.n_founders_since(self._n_seen // 2), self._n_seen - self._n_seen // 2).estimate

    def n_founders_since(self, index: int) -> int:
        """How many activations from stream position ``index`` on founded a region."""
        return int((self.exemplar_indices >= index).sum())

    @standard_modes(gradients=False)
    def partial_fit(self, x: Float[Tensor, "n d_x"]) -> Int64[Tensor, " n"]:
        """Add a batch to the stream.

        Args:
            x: ``(n, d)`` activations in stream order, any float dtype; n may be 0.

        Returns:
            ``(n,)`` int64, the region each activation founded or joined, -1 for one without a direction.

        Raises:
            ValueError: Wrong width, or an entry is not finite; nothing of the batch has been added then.
        """
        x = checked_activations(x, len(self._center))
        labels = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
        start = 0
        while start < len(x):
            # With no more rows than regions, comparing the rows of a block with each other costs no more than comparing
            # them with the exemplars.
            block = slice(start, start + max(512, min(self._n_regions, ROW_LIMIT)))
            u, norm = directions(x[block].to(self._center.device), self._center)
            labels[block] = self._add_block(u, norm).to(x.device)
            start = block.stop
        return labels

    def _add_block(self, u: Tensor, norm: Tensor) -> Tensor:
        labels = torch.full((len(u),), -1, dtype=torch.int64, device=u.device)
        directed = has_direction(norm).nonzero()[:, 0]
        if len(directed) < len(u):
            u = u[directed]
        if len(directed):
            joined = self._place(u, self._n_seen + directed)
            self._counts.index_add_(0, joined, torch.ones_like(joined))
            self._sums.index_add_(0, joined, u.double())
            labels[directed] = joined
        self._n_seen += len(labels)
        self._n_undirected += len(labels) - len(directed)
        return labels

    def _place(self, u: Tensor, positions: Tensor) -> Tensor:
        """Regions of the rows of a block, in stream order; founds those that are new."""
        known = self._n_regions
        near = scan(no_candidates(u), u, self._exemplars, self._tile, last=known)
        free = self._uncovered(near, u).nonzero()[:, 0]
        if len(free):
            founders = free[_first_independent(u[free], self._threshold)]
            self._found(u[founders], positions[founders])
            # A row sees the founders up to itself: those that precede it, and itself if it is one.
            later = founders > torch.arange(len(u), device=u.device)[:, None]
            near = scan(near, u, self._exemplars, self._tile, first=known, last=self._n_regions, forbidden=later)
        return nearest_column(near, u, self._exemplars)

    def _uncovered(self, near: Candidates, u: Tensor) -> Tensor:
        """Mask of the rows farther than the threshold from every exemplar in ``near``."""
        gap = near.best - (1.0 - self._threshold)
        error = product_error(u.shape[1])
        uncovered, doubtful = gap < -error, gap.abs() <= error
        if bool(doubtful.any()):
            settled = distance(best_cosine(near, doubtful, u, self._exemplars)) > self._threshold
            uncovered = torch.where(doubtful, settled, uncovered)
        return uncovered

    def _found(self, u: Tensor, positions: Tensor) -> None:
        first, last = self._n_regions, self._n_regions + len(u)
        if last > len(self._exemplars):
            capacity = max(64, last, 2 * len(self._exemplars))
            what = f"Buffers for {capacity:,} regions of width {u.shape[1]} on {u.device}"
            remedy = "Raise the threshold or the percentile, bound the regions, or build on another device."
            with memory_for(what, capacity * (12 * u.shape[1] + 16), remedy):
                for name in ("_exemplars", "_indices", "_counts", "_sums"):
                    setattr(self, name, _grown(getattr(self, name), capacity, first))
        self._exemplars[first:last] = u
        self._indices[first:last] = positions
        self._n_regions = last

    @standard_modes()
    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to continue the stream, as tensors of its own (numbers are 0-d tensors)."""
        k = self._n_regions
        return {
            "center": self.center,
            "threshold": torch.tensor(self._threshold, dtype=torch.float64),
            "exemplars": self.exemplars,
            "exemplar_indices": self.exemplar_indices,
            "counts": self.counts,
            "sums": self._sums[:k].clone(),
            "n_seen": torch.tensor(self._n_seen),
            "n_undirected": torch.tensor(self._n_undirected),
        }

    @standard_modes()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue where the clustering that gave ``state`` was.

        Args:
            state: From ``state_dict`` of a clustering with the same centre and threshold.

        Raises:
            ValueError: A key is missing, unknown or of another shape or dtype, or the state is of another centre or
                threshold.
        """
        _check_state(state, self._center)
        device = self._center.device
        if float(state["threshold"]) != self._threshold or not torch.equal(state["center"].to(device), self._center):
            raise ValueError(
                f"The state is of a clustering with threshold {float(state['threshold'])!r} and its own centre; this "
                f"one has threshold {self._threshold!r}. Build it as LeaderClustering(state['center'], "
                "float(state['threshold'])) and load the state then."
            )
        self._n_regions = len(state["exemplars"])
        self._n_seen, self._n_undirected = int(state["n_seen"]), int(state["n_undirected"])
        self._exemplars, self._sums = state["exemplars"].to(device, copy=True), state["sums"].to(device, copy=True)
        self._indices, self._counts = (
            state["exemplar_indices"].to(device, copy=True),
            state["counts"].to(device, copy=True),
        )


def _checked_threshold(threshold: float) -> float:
    if 0.0 < threshold <= 2.0:
        return threshold
    hint = (
        " A calibrated threshold of 0 means that so many activations are identical that their distance at that "
        "percentile is 0: remove repeated texts or take a higher percentile."
        if threshold == 0.0
        else ""
    )
    raise ValueError(f"threshold is a cosine distance and must lie in (0, 2], got {threshold!r}.{hint}")


def _grown(buffer: Tensor, capacity: int, used: int) -> Tensor:
    grown = buffer.new_zeros(capacity, *buffer.shape[1:])
    grown[:used] = buffer[:used]
    return grown


def _first_independent(u: Float32[Tensor, "f d"], threshold: float) -> Bool[Tensor, " f"]:
    """Mask of the rows that found a region when the rows of ``u`` arrive in order and nothing else is there.

    In each round every undecided row without an undecided predecessor within the threshold founds, and the rows it
    covers are decided too. Random orders need a handful of rounds.
    """
    products = u @ u.T
    gap = products.sub_(1.0 - threshold)
    error = product_error(u.shape[1])
    linked = (gap >= 0).tril_(-1)
    i, j = (gap.abs_() <= error).tril_(-1).nonzero(as_tuple=True)
    linked[i, j] = distance(exact_cosine(u, i, u, j)) <= threshold
    founders = torch.zeros(len(u), dtype=torch.bool, device=u.device)
    undecided = torch.arange(len(u), device=u.device)
    while len(undecided):
        free = ~linked.any(dim=1)
        found = free.nonzero()[:, 0]
        founders[undecided[found]] = True
        left = (~free & ~linked[:, found].any(dim=1)).nonzero()[:, 0]
        undecided, linked = undecided[left], linked[left][:, left]
    return founders


def _check_state(state: Mapping[str, Tensor], center: Tensor) -> None:
    known_keys(state, _STATE, "The state of a LeaderClustering")
    missing = [name for name in _STATE if name not in state]
    if missing:
        raise ValueError(f"The state of a LeaderClustering lacks {', '.join(missing)}.")
    d, k = len(center), state["counts"].numel()
    wanted = {
        "center": ((d,), center.dtype),
        "threshold": ((), torch.float64),
        "exemplars": ((k, d), torch.float32),
        "exemplar_indices": ((k,), torch.int64),
        "counts": ((k,), torch.int64),
        "sums": ((k, d), torch.float64),
        "n_seen": ((), torch.int64),
        "n_undirected": ((), torch.int64),
    }
    for name, (shape, dtype) in wanted.items():
        if tuple(state[name].shape) != shape or state[name].dtype != dtype:
            raise ValueError(
                f"The state's {name} has shape {tuple(state[name].shape)} and {state[name].dtype}, expected {shape} "
                f"and {dtype}."
            )
