"""The default fit of semi-nonnegative matrix factorisation: a search for the groups, then block-coordinate steps.

Symbols: those of :mod:`.updates`.

The search comes first. A step that finds the best support of one feature given the others is only as good as the
others: while their supports are wrong it fills the gaps that they leave, each such step lowers the error, and none of
them is ever undone. In the search, features are therefore fitted together as if they could use all neurons, which
depends on the codes alone, and are only then cut to their largest entries; the number of entries falls from all to the
final one. Codes carry an L1 penalty, without which features may stay rotations of the groups. Then, in rounds, the
features that the others could replace at least cost become new directions, and the round is undone unless the error,
penalty included, is lower after some more such iterations. The search counts only if it ends below the start.

Then iterations, each of which can only lower the error: features given codes (supports, values, refit); dead features
get a new direction and zero codes, which leaves the error as it is; codes given features. Two features that point the
same way are merged on trial: the surplus one becomes a new direction and its codes go to the other. Should the
iteration then not lower the error, it is undone.

A new direction is a sparse rank-one fit to what is left of the activations, begun at one that is badly reconstructed.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from saelens_ext.ops.grid_products import summation_error
from saelens_ext.ops.nnls.kernels import SUM_ROWS, FeatureGram, lengths
from saelens_ext.ops.nnls.solve import dual_is_faster
from saelens_ext.ops.semi_nmf.updates import (
    CHUNK_ROWS,
    CodeStatistics,
    dead,
    duplicates,
    finite_error,
    first_duplicates,
    keep_largest,
    normalised,
    refit_together,
    replacement_costs,
    update_codes,
    update_features,
)

_PILOT_EVERY = 8
_PILOT_ROWS = 128
_REST_AFTER_FAILED_MERGE = 10
_POWER_ITERATIONS = 3
_SEARCH_L1 = 0.05
_ACCELERATOR_ROWS = 2**14
_SHRINKING = 0.8
_ROUNDS = 8
_ROUND_ITERATIONS = 4
_ROUND_STEPS = 2
_FAILED_ROUNDS = 3
_REPLACED = 0.05
_LEAST_GAIN = 1e-3


@dataclass(frozen=True)
class _State:
    """A consistent set of codes, features and what follows from them."""

    features: Tensor
    codes: Tensor
    statistics: CodeStatistics
    error: float
    dead: list[int]
    """Features that have no part in the reconstruction."""
    duplicates: list[tuple[int, int]]
    """Pairs (kept, surplus) of features that point the same way."""

    @classmethod
    def of(
        cls, features: Tensor, codes: Tensor, statistics: CodeStatistics, products: Tensor | None = None
    ) -> "_State":
        """Of codes and features; the host waits for the device once."""
        error = statistics.error_there(features, products)[None]
        flags = (dead(features, statistics), first_duplicates(features))
        first, *rest = torch.cat((error, *(part.double() for part in flags))).tolist()
        k = len(features)
        return cls(
            features,
            codes,
            statistics,
            finite_error(first),
            [i for i in range(k) if rest[i]],
            duplicates([int(i) for i in rest[k:]]),
        )


class CoordinateFit:
    """Codes and features whose error, the L1 penalty included, never rises after the search.

    Args:
        x: ``(n, d)`` activations.
        codes: ``(n, k)`` to start from, >= 0.
        features: ``(k, d)`` to start from; they may be dense.
        count: non-zeros of each feature.
        l1: weight of the L1 penalty; all that is called error here includes it.
        search: iterations of the search.
    """

    def __init__(
        self,
        x: Float[Tensor, "n d"],
        codes: Float[Tensor, "n k"],
        features: Float[Tensor, "k d"],
        count: int,
        l1: float = 0.0,
        search: int = 0,
    ) -> None:
        self._x, self._count, self._l1 = x, count, l1
        self._iteration = self._n_passes = 0
        self._dual = False
        self._no_merge_before = 0
        self.n_revived = 0
        self._sizes = lengths(x)
        columns = codes.T.contiguous()
        statistics = CodeStatistics.of(x, columns, l1)
        # Dense features to start from are no member of the set: the first sparse ones may be of higher error than they.
        # Rows with hardly any codes are not updated, but must be sparse too.
        features = keep_largest(update_features(statistics, features, count), count)
        self._state = _State.of(features, columns, statistics)
        if search:
            self._search(search)

    @property
    def codes(self) -> Float[Tensor, "n k"]:
        """The codes."""
        return self._state.codes.T.contiguous()

    @property
    def features(self) -> Float[Tensor, "k d"]:
        """The features."""
        return self._state.features

    @property
    def statistics(self) -> CodeStatistics:
        """The statistics of the codes."""
        return self._state.statistics

    @property
    def error(self) -> float:
        """The squared error and the penalty."""
        return self._state.error

    @property
    def squared_error(self) -> float:
        """The squared error alone."""
        return self.error - float(self.statistics.penalty(self.features))

    @property
    def n_dead(self) -> int:
        """Features that have no part in the reconstruction."""
        return len(self._state.dead)

    def step(self) -> None:
        """One iteration; nothing changes unless it lowers the error."""
        merge = self._iteration >= self._no_merge_before
        if not self._attempt(merge=merge) and merge:
            self._no_merge_before = self._iteration + _REST_AFTER_FAILED_MERGE
            self._attempt(merge=False)
        self._iteration += 1

    def _search(self, n_iterations: int) -> None:
        """Fit the features together, with ever fewer neurons; kept if the error is lower at the end."""
        before, n_revived, l1 = self._state, self.n_revived, self._l1
        self._l1, d = max(l1, _SEARCH_L1), self._x.shape[1]
        for iteration in range(n_iterations):
            progress = min(1.0, (iteration + 1) / (_SHRINKING * n_iterations))
            self._fit_together(max(self._count, round(d * (self._count / d) ** progress)))
        self._round(0)
        size, skipped, failed = max(1, int(_REPLACED * len(self.features))), 0, 0
        for _ in range(_ROUNDS):
            best, n_best = self._state, self.n_revived
            self._replace_weakest(size, skipped)
            self._round(_ROUND_ITERATIONS)
            gain = 1 - self._state.error / best.error if best.error > 0 else 0.0
            if gain <= 0:
                self._state, self.n_revived = best, n_best
            if gain < _LEAST_GAIN:
                failed += 1
                if failed == _FAILED_ROUNDS:
                    break
                # One that is needed spoils the round for those that are not.
                skipped, size = skipped + int(size == 1), max(1, size // 4)
        if self._l1 != l1:
            self._l1 = l1
            self._state = self._pass(self.features, self._state.codes, l1, self._count)
        if self._state.error > before.error:
            self._state, self.n_revived = before, n_revived

    def _round(self, n_together: int) -> None:
        """Iterations of the search, and then some that lower the error for sure, so that errors compare."""
        for _ in range(n_together):
            self._fit_together(self._count)
        for _ in range(_ROUND_STEPS):
            self._attempt(merge=False)

    def _fit_together(self, count: int) -> None:
        """An iteration of the search."""
        statistics = self._state.statistics
        dense, error = refit_together(statistics, self.features)
        features, length = normalised(keep_largest(dense, count, error))
        unused = dead(features * length[:, None], statistics) | (first_duplicates(features) < len(features))
        self._state = self._replaced(
            features, self._state.codes * length[:, None], unused.nonzero()[:, 0].tolist(), count
        )

    def _replace_weakest(self, size: int, skipped: int) -> None:
        """New directions for the features that the others could replace at least cost, after some that were tried."""
        features, length = normalised(self.features)
        cost = replacement_costs(self.statistics.gram * length.double().outer(length.double()), features)
        weakest = cost.sort(stable=True).indices[skipped:][:size].tolist()
        # Without the penalty, what is left of the activations is what no feature has, and not what it took from all.
        features[weakest] = 0
        self._state = self._pass(features, self._state.codes * length[:, None], 0.0, self._count)
        self._state = self._replaced(features, self._state.codes, weakest, self._count)

    def _attempt(self, *, merge: bool) -> bool:
        """An iteration; whether it was kept. True where nothing was merged: there is nothing else to try."""
        before, n_revived = self._state, self.n_revived
        features, length = normalised(update_features(before.statistics, before.features, self._count))
        codes = before.codes * length[:, None]
        pairs = before.duplicates if merge else []
        for kept, surplus in pairs:
            codes[kept] += codes[surplus]
        unused = {*before.dead, *(surplus for _, surplus in pairs)}
        after = self._replaced(features, codes, sorted(unused), self._count)
        if after.error >= before.error:
            self.n_revived = n_revived
            return not pairs
        self._state = after
        return True

    def _replaced(self, features: Tensor, codes: Tensor, places: list[int], count: int) -> _State:
        """New codes after some features have become new directions; ``codes`` is overwritten."""
        if places:
            codes[places] = 0
            self.n_revived += len(places)
            features = self._with_new_directions(features, places, codes)
        return self._pass(features, codes, self._l1, count)

    def _pass(self, features: Tensor, codes: Tensor, l1: float, count: int) -> _State:
        """New codes for all activations, starting from some, and what follows from them, for features of at most
        ``count`` neurons.
        """
        problem = FeatureGram.of(features, count)
        if self._n_passes % _PILOT_EVERY == 0:
            self._dual = dual_is_faster(self._x[:: max(1, len(self._x) // _PILOT_ROWS)], problem, l1)
        self._n_passes += 1
        dual = self._dual and problem.inverse is not None
        statistics = replace(self._state.statistics.of_no_codes(), l1=l1)
        new = torch.empty_like(codes)
        # What fits a processor's cache; on an accelerator the host waits for each block.
        size = CHUNK_ROWS if self._x.device.type == "cpu" else _ACCELERATOR_ROWS
        for start in range(0, len(self._x), size):
            rows = slice(start, start + size)
            x, sizes = self._x[rows], self._sizes[rows]
            new[:, rows] = update_codes(x, problem, codes[:, rows], dual, sizes.to(x.dtype), l1)
            statistics.add(x, new[:, rows], sizes)
        return _State.of(features, new, statistics, problem.products)

    def _with_new_directions(self, features: Tensor, places: list[int], codes: Tensor) -> Tensor:
        """Features with new directions at some places, whose codes are zero.

        Each begins at what is left of one of the worst reconstructed activations (places beyond the number of
        activations are left as they are), and is then fitted to what is left of all: codes given the direction,
        direction given them.
        """
        parts = zip(self._x.split(SUM_ROWS), self._state.codes.split(SUM_ROWS, dim=1), strict=True)
        errors = [(rows - mine.T @ self.features).square().sum(dim=1) for rows, mine in parts]
        worst = torch.cat(errors).sort(descending=True, stable=True).indices[: len(places)]
        new = self._x[worst] - codes[:, worst].T @ features
        new = normalised(keep_largest(new, self._count))[0]
        neuron_norms = self._state.statistics.squares.sqrt().to(new)
        rounding = 2 * summation_error(len(self._x), new.dtype)  # of what is there, and of what the others take off
        for _ in range(_POWER_ITERATIONS):
            mine = (new @ self._x.T - (new @ features.T) @ codes).clamp_(min=0)
            fitted = mine @ self._x - (mine @ codes.T) @ features
            error = rounding * torch.linalg.vector_norm(mine, dim=1)[:, None] * neuron_norms
            new = normalised(keep_largest(fitted, self._count, error))[0]
        features = features.clone()
        features[places[: len(new)]] = new
        return features
