"""The default fit of semi-nonnegative matrix factorisation: block-coordinate steps with revival and escapes.

Symbols: those of :mod:`.semi_nmf_updates`.

One iteration: features given codes (supports, values, refit); dead features get a new direction and zero codes, which
leaves the error as it is; codes given features. Each can only lower the error. Two features that point the same way are
merged on trial: the surplus one becomes a new direction and its codes go to the other. Should the iteration then not
lower the error, it is undone.

Supports grow from a quarter of their size to all of it over the first iterations. Features that may take all their
neurons at once take the strongest ones, and several of them the same; grown, they use more neurons and end at a lower
error. Growing never raises the error: a small support is a member of the larger set.

An escape, when iterations no longer help: the features that the others could replace at least cost become new
directions, some iterations are made, and all of it is undone unless the error is lower at the end.

A new direction is a sparse rank-one fit to what is left of the activations, begun at one that is badly reconstructed.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saelens_ext.ops.grid_products import summation_error
from saelens_ext.ops.nnls import dual_is_faster
from saelens_ext.ops.nnls_kernels import FeatureGram
from saelens_ext.ops.semi_nmf_updates import (
    CHUNK_ROWS,
    CodeStatistics,
    dead,
    duplicates,
    keep_largest,
    normalised,
    update_codes,
    update_features,
)

_PILOT_EVERY = 8
_PILOT_ROWS = 128
_REST_AFTER_FAILED_MERGE = 10
_POWER_ITERATIONS = 3
_ESCAPE_ITERATIONS = 6
_ESCAPE_FRACTION = 0.05
_FIRST_COUNT = 4


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
    """Codes and features whose error, damping included, never rises.

    Args:
        x: ``(n, d)`` activations.
        codes: ``(n, k)`` to start from, >= 0.
        features: ``(k, d)`` to start from; they may be dense.
        count: non-zeros of each feature.
        growth: iterations over which the supports grow to ``count``.
        damping: charge for features that cancel each other; all that is called error here includes it.
    """

    def __init__(
        self,
        x: Float[Tensor, "n d"],
        codes: Float[Tensor, "n k"],
        features: Float[Tensor, "k d"],
        count: int,
        growth: int = 0,
        damping: float = 0.0,
    ) -> None:
        self._damping = damping
        self._x, self._full_count = x, count
        # Features that may use all neurons, or hardly any, have no choice to make.
        self._growth = growth if _FIRST_COUNT < count < x.shape[1] else 0
        self._iteration = 0
        self._dual = False
        self._no_merge_before = 0
        self.n_revived = 0
        columns = codes.T.contiguous()
        statistics = CodeStatistics.of(x, columns)
        statistics.damp(damping)
        # Dense features to start from are no member of the set: the first sparse ones may be of higher error than they.
        # Rows with hardly any codes are not updated, but must be sparse too.
        features = keep_largest(update_features(statistics, features, self._count), self._count)
        errors = [
            (rows - part.T @ features).square().sum(dim=1)
            for rows, part in zip(x.split(CHUNK_ROWS), columns.split(CHUNK_ROWS, dim=1), strict=True)
        ]
        self._state = _State(features, columns, statistics, statistics.error(features), torch.cat(errors))

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
        """The statistics of the codes, damped."""
        return self._state.statistics

    @property
    def error(self) -> float:
        """The squared error and the charge for cancelling."""
        return self._state.error

    @property
    def squared_error(self) -> float:
        """The squared error alone."""
        own = self.statistics.gram.diagonal() @ self.features.double().square().sum(dim=1)
        return self.error - self._damping / (1 + self._damping) * float(own)

    @property
    def growing(self) -> bool:
        """Whether the supports are still smaller than they may be."""
        return self._iteration < self._growth

    @property
    def _count(self) -> int:
        """Non-zeros that a feature may have at this iteration."""
        if not self.growing:
            return self._full_count
        first = min(self._full_count, max(_FIRST_COUNT, self._full_count // 4))
        return first + (self._full_count - first) * self._iteration // self._growth

    def step(self) -> None:
        """One iteration; nothing changes unless it lowers the error."""
        merge = self._iteration >= self._no_merge_before
        if not self._attempt(merge=merge) and merge:
            self._no_merge_before = self._iteration + _REST_AFTER_FAILED_MERGE
            self._attempt(merge=False)
        self._iteration += 1

    def escape(self) -> int:
        """Try to leave a local minimum; nothing changes unless it lowers the error. Returns the iterations it took."""
        before, n_revived = self._state, self.n_revived
        problem = FeatureGram.of(before.features)
        if problem.inverse is None:
            return 0
        # With all codes free, dropping feature i and refitting the others costs |g_i|^2 / (Q^-1)_ii.
        cost = before.statistics.gram.diagonal() * problem.norm.double().square() / problem.inverse.diagonal()
        weakest = cost.sort(stable=True).indices[: max(1, int(_ESCAPE_FRACTION * len(cost)))].tolist()
        features, length = normalised(before.features)
        codes = before.codes * length[:, None]
        codes[weakest] = 0
        features = self._with_new_directions(features, weakest, codes)
        self._state = self._pass(features, codes)
        for _ in range(_ESCAPE_ITERATIONS - 1):
            self.step()
        if self._state.error >= before.error:
            self._state, self.n_revived = before, n_revived
        return _ESCAPE_ITERATIONS

    def _attempt(self, *, merge: bool) -> bool:
        """An iteration; whether it was kept. True where nothing was merged: there is nothing else to try."""
        before = self._state
        features = update_features(before.statistics, before.features, self._count)
        unused = set(dead(features, before.statistics))
        features, length = normalised(features)
        codes = before.codes * length[:, None]
        pairs = duplicates(features) if merge else []
        for kept, surplus in pairs:
            codes[kept] += codes[surplus]
            unused.add(surplus)
        places = sorted(unused)
        codes[places] = 0
        after = self._pass(self._with_new_directions(features, places, codes), codes)
        if after.error >= before.error:
            return not pairs
        self._state = after
        self.n_revived += len(places)
        return True

    def _pass(self, features: Tensor, codes: Tensor) -> _State:
        """New codes for all activations, starting from some, and what follows from them."""
        problem = FeatureGram.of(features, self._damping)
        if self._iteration % _PILOT_EVERY == 0:
            self._dual = dual_is_faster(self._x[:: max(1, len(self._x) // _PILOT_ROWS)], problem)
        dual = self._dual and problem.inverse is not None
        statistics = CodeStatistics.empty(len(features), features.shape[1], features.device)
        new, errors = torch.empty_like(codes), torch.empty_like(self._x[:, 0])
        for start in range(0, len(self._x), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            new[:, rows], errors[rows] = update_codes(self._x[rows], problem, codes[:, rows], dual)
            statistics.add(self._x[rows], new[:, rows])
        statistics.damp(self._damping)
        return _State(features, new, statistics, statistics.error(features), errors)

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
