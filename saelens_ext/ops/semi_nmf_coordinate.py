"""The default fit of semi-nonnegative matrix factorisation: a search for the groups, then block-coordinate steps.

Symbols: those of :mod:`.semi_nmf_updates`.

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
from saelens_ext.ops.nnls import dual_is_faster
from saelens_ext.ops.nnls_kernels import SUM_ROWS, FeatureGram, lengths
from saelens_ext.ops.semi_nmf_updates import (
    CHUNK_ROWS,
    CodeStatistics,
    dead,
    duplicates,
    keep_largest,
    normalised,
    refit,
    replacement_costs,
    update_codes,
    update_features,
)

_PILOT_EVERY = 8
_PILOT_ROWS = 128
_REST_AFTER_FAILED_MERGE = 10
_POWER_ITERATIONS = 3
_SEARCH_L1 = 0.05
_SHRINKING = 0.8
_ROUNDS = 8
_ROUND_ITERATIONS = 4
_ROUND_STEPS = 2
_FAILED_ROUNDS = 3
_REPLACED = 0.05
_LEAST_GAIN = 1e-3
_SHORTEST = 1e-30


@dataclass(frozen=True)
class _State:
    """A consistent set of codes, features and what follows from them."""

    features: Tensor
    codes: Tensor
    statistics: CodeStatistics
    error: float
    errors: Tensor
    """``(n,)`` error of each activation."""


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
        errors = [
            (rows - part.T @ features).square().sum(dim=1)
            for rows, part in zip(x.split(SUM_ROWS), columns.split(SUM_ROWS, dim=1), strict=True)
        ]
        self._state = _State(features, columns, statistics, statistics.error(features), torch.cat(errors))
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
        return self.error - self.statistics.penalty(self.features)

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
            self._state = self._pass(self.features, self._state.codes, l1)
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
        # The penalty's quadratic bound, which touches it here: without it, features may grow large and cancel, and be
        # cut to different neurons.
        length = torch.linalg.vector_norm(self.features.double(), dim=1).clamp(min=_SHORTEST)
        ridge = torch.diag(statistics.l1 * statistics.sums / length)
        bounded = replace(statistics, gram=statistics.gram + ridge)
        dense = refit(bounded, torch.ones_like(self.features, dtype=torch.bool), self.features)
        # Equal neurons tie, though a product may round them apart.
        error = (
            statistics.rounding
            * statistics.squares.sqrt()
            / bounded.gram.diagonal().sqrt().clamp(min=_SHORTEST)[:, None]
        )
        features, length = normalised(keep_largest(dense, count, error))
        unused = set(dead(features * length[:, None], statistics)) | {surplus for _, surplus in duplicates(features)}
        self._state = self._replaced(features, self._state.codes * length[:, None], sorted(unused))

    def _replace_weakest(self, size: int, skipped: int) -> None:
        """New directions for the features that the others could replace at least cost, after some that were tried."""
        features, length = normalised(self.features)
        cost = replacement_costs(self.statistics.gram * length.double().outer(length.double()), features)
        weakest = cost.sort(stable=True).indices[skipped:][:size].tolist()
        # Without the penalty, what is left of the activations is what no feature has, and not what it took from all.
        features[weakest] = 0
        self._state = self._pass(features, self._state.codes * length[:, None], 0.0)
        self._state = self._replaced(features, self._state.codes, weakest)

    def _attempt(self, *, merge: bool) -> bool:
        """An iteration; whether it was kept. True where nothing was merged: there is nothing else to try."""
        before, n_revived = self._state, self.n_revived
        features = update_features(before.statistics, before.features, self._count)
        unused = set(dead(features, before.statistics))
        features, length = normalised(features)
        codes = before.codes * length[:, None]
        pairs = duplicates(features) if merge else []
        for kept, surplus in pairs:
            codes[kept] += codes[surplus]
            unused.add(surplus)
        after = self._replaced(features, codes, sorted(unused))
        if after.error >= before.error:
            self.n_revived = n_revived
            return not pairs
        self._state = after
        return True

    def _replaced(self, features: Tensor, codes: Tensor, places: list[int]) -> _State:
        """New codes after some features have become new directions; ``codes`` is overwritten."""
        codes[places] = 0
        self.n_revived += len(places)
        return self._pass(self._with_new_directions(features, places, codes), codes, self._l1)

    def _pass(self, features: Tensor, codes: Tensor, l1: float) -> _State:
        """New codes for all activations, starting from some, and what follows from them."""
        problem = FeatureGram.of(features)
        if self._n_passes % _PILOT_EVERY == 0:
            self._dual = dual_is_faster(self._x[:: max(1, len(self._x) // _PILOT_ROWS)], problem, l1)
        self._n_passes += 1
        dual = self._dual and problem.inverse is not None
        statistics = replace(self._state.statistics.of_no_codes(), l1=l1)
        new, errors = torch.empty_like(codes), torch.empty_like(self._x[:, 0])
        for start in range(0, len(self._x), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            x, sizes = self._x[rows], self._sizes[rows]
            new[:, rows], errors[rows] = update_codes(x, problem, codes[:, rows], dual, sizes.to(x.dtype), l1)
            statistics.add(x, new[:, rows], sizes)
        return _State(features, new, statistics, statistics.error(features, problem.products), errors)

    def _with_new_directions(self, features: Tensor, places: list[int], codes: Tensor) -> Tensor:
        """Features with new directions at some places, whose codes are zero.

        Each begins at what is left of one of the worst reconstructed activations (places beyond the number of
        activations are left as they are), and is then fitted to what is left of all: codes given the direction,
        direction given them.
        """
        if not places:
            return features
        worst = self._state.errors.sort(descending=True, stable=True).indices[: len(places)]
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
