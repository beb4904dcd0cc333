"""Semi-nonnegative matrix factorisation of more activations than fit in memory.

Symbols:
    X: ``(n, d)`` activations, seen in blocks, several times. G: codes >= 0, of one block at a time.
    H: ``(k, d)`` features. A = G'G, B = G'X: sums over blocks, all that is kept of a pass.

A pass finds the exact codes of every activation for the current features, and so their objective; the features' step
then uses A, B and the sums of the codes alone. The objective at the next pass cannot be higher: its codes are the best
for features that were better already with the old codes. The first features come from a fit in memory to a uniform
sample, and so does the centre.

Where batches can be worked on elsewhere (:class:`~saelens_ext.ops.groups.Mapped`), the sample is drawn there
(`uniform_sample`), codes are found there, and sums come back: 16 k^2 + 20 k d bytes with an L1 penalty (8 k^2 + 12 k d
without) for at least 20 k activations, which are 80 k d bytes in float32. Sums are made of the same batches and added
in the same order everywhere.

Cost: memory is one block and its codes, up to 16 (3 k^2 + 5 k d) bytes of sums and features, and the sample. A pass is
4 n k d floating-point operations in products plus the non-negative least squares, which is several times n k^2 more.
For 1,000,000 activations of 16,384 neurons and 400 features that is 0.5 GB plus a block (and 0.7 GB for a sample of
10,000) and 3e13 operations a pass, minutes on a machine of 200 GFLOP/s; the 64 GB of activations (float32) are read
once per pass.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from saelens_ext._checks import finite, positive, width
from saelens_ext.ops.groups import mapped
from saelens_ext.ops.nnls.kernels import FeatureGram
from saelens_ext.ops.nnls.solve import check_l1, solve_codes
from saelens_ext.ops.semi_nmf.fit import FittedFeatures, SemiNMFResult, check_options, semi_nmf
from saelens_ext.ops.semi_nmf.rows import Rows
from saelens_ext.ops.semi_nmf.updates import (
    CHUNK_ROWS,
    CodeStatistics,
    dead,
    first_duplicates,
    keep_largest,
    normalised,
    update_features,
)
from saelens_ext.ops.uniform_sample import uniform_sample

logger = logging.getLogger(__name__)

_CODES_TOL = 1e-4
_DEFAULT_PASSES = 5
_PASS_TOL = 1e-3
_FEATURE_SWEEPS = 5
_ROWS_PER_FEATURE = 20
"""Activations that are summed, where batches lie elsewhere, before the sums are sent: these are then a quarter."""


@dataclass(frozen=True, kw_only=True)
class StreamingSemiNMFResult(FittedFeatures):
    """Features fitted to a stream, and the statistics of their exact codes on it."""

    n_passes: int
    """Passes made to evaluate and improve the features. One more made the sample."""
    n_samples: int
    """Activations in the stream."""
    code_gram: Float[Tensor, "k k"]
    """G'G of the codes, float64."""
    code_product: Float[Tensor, "k d"]
    """G'X, float64."""
    total: float
    """Sum of squares of the activations."""
    typical_norm: float
    """Median norm of the sampled activations, not from the centre."""


def semi_nmf_streaming(
    batches: Iterable[Float[Tensor, "_ d"]],
    n_components: int,
    *,
    sparsity: float | int = 0.01,
    init: str = "svd",
    l1: float | int = 0.0,
    center: bool = False,
    max_iter: int | None = None,
    max_passes: int | None = None,
    tol: float | None = None,
    sample_size: int = 10_000,
    generator: torch.Generator | None = None,
    on_metrics: Callable[[dict[str, float]], None] | None = None,
) -> StreamingSemiNMFResult:
    """Factorise a stream without holding its activations or codes.

    Args:
        batches: blocks ``(n_i, d)`` of activations; iterated ``max_passes + 2`` times at most, the same each time.
        n_components: k, the number of features.
        sparsity: fraction of neurons that a feature may use, in (0, 1].
        init: ``"svd"``, ``"kmeans"`` or ``"random"``, of the fit to the sample.
        l1: weight of the L1 penalty on the codes, in [0, 1), as for :func:`~saelens_ext.ops.semi_nmf.fit.semi_nmf`.
        center: whether to factorise the activations from their centre, as there.
        max_iter: iterations of the fit to the sample.
        max_passes: passes after the one that draws the sample; 5 by default.
        tol: stop when a pass, or an iteration of the fit to the sample, lowers the objective by less than this
            fraction; by default 1e-3 for passes and 1e-4 for the sample.
        sample_size: activations of the sample, drawn uniformly from the whole stream.
        generator: source of randomness, on the CPU; seed 0 by default.
        on_metrics: called after each pass with ``pass``, ``objective``, ``n_dead``, ``n_revived``.

    Raises:
        ValueError: ``batches`` can be iterated only once, is empty, or changes between passes; an activation is NaN or
            infinite; and as for :func:`~saelens_ext.ops.semi_nmf.fit.semi_nmf`.
    """
    if iter(batches) is batches:
        raise ValueError(
            "batches is an iterator, which can be read only once, and several passes are needed. Give something that "
            "starts again each time it is iterated: a list, an ActivationStream-like object, or an object with "
            "__iter__."
        )
    max_passes = positive(_DEFAULT_PASSES if max_passes is None else max_passes, "max_passes")
    pass_tol = _PASS_TOL if tol is None else tol
    check_l1(l1)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    with torch.no_grad():
        drawn = uniform_sample(batches, positive(sample_size, "sample_size"), generator)
        assert drawn.rows is not None
        sample, n_samples, n_batches = drawn.rows, drawn.n, drawn.n_batches
        count = check_options(sample, n_components, sparsity, init, pass_tol)
        first = semi_nmf(
            sample,
            n_components,
            sparsity=sparsity,
            init=init,
            l1=l1,
            center=center,
            max_iter=max_iter,
            tol=tol,
            generator=generator,
        )
        typical_norm = float(torch.linalg.vector_norm(sample, dim=1).median())
        del sample, drawn
        fit = _StreamFit(batches, first, count, n_samples, n_batches, float(l1))
        history, converged = _passes(fit, max_passes, pass_tol, on_metrics)
    statistics = fit.found.unweighted or fit.found.statistics
    return StreamingSemiNMFResult(
        features=fit.features,
        center=first.center,
        loss=statistics.error(fit.features) / fit.found.total if fit.found.total > 0 else 0.0,
        history=history,
        converged=converged,
        n_passes=len(history),
        n_samples=n_samples,
        code_gram=statistics.gram,
        code_product=statistics.product,
        total=fit.found.total,
        typical_norm=typical_norm,
        n_dead=int(dead(fit.features, fit.found.statistics).sum()),
        n_duplicate=int((first_duplicates(fit.features) < n_components).sum()),
        n_revived=fit.n_revived,
    )


@dataclass
class _Pass:
    """What a pass over the stream, or over a part of it, leaves of the exact codes for some features."""

    statistics: CodeStatistics
    """Of the rows as the objective weighs them."""
    unweighted: CodeStatistics | None
    """Of the activations from the centre, where a penalty makes all weigh alike."""
    worst: Tensor
    """``(k, d)`` at most, what the codes leave of the worst reconstructed rows, the worst first."""
    sizes: Tensor
    """Their norms."""
    total: float = 0.0
    """Sum of squares of the activations."""
    n: int = 0
    """Activations."""

    @classmethod
    def of_nothing(cls, features: Tensor, l1: float) -> "_Pass":
        """Before the first block."""
        k, d = features.shape
        weighted = CodeStatistics.empty(k, d, features.device, l1)
        plain = CodeStatistics.empty(k, d, features.device) if l1 else None
        return cls(weighted, plain, features[:0], features[:0, 0])

    def add(self, block: Tensor, features: Tensor, problem: FeatureGram, center: Tensor) -> None:
        """Take in a block of activations."""
        l1 = self.statistics.l1
        rows = Rows.around(block, center, equal=l1 > 0)
        codes = solve_codes(rows.values, problem, _CODES_TOL, l1=l1)
        self.statistics.add(rows.values, codes.T)
        if self.unweighted is not None:
            self.unweighted.add(rows.values * rows.lengths, (codes * rows.lengths).T)
        left = rows.values - codes @ features
        self._keep_worst(left, torch.linalg.vector_norm(left, dim=1), len(features))
        self.total += rows.total
        self.n += len(block)

    def merge(self, other: "_Pass") -> None:
        """Take in what a later part of the stream left."""
        self.statistics.merge(other.statistics)
        if self.unweighted is not None and other.unweighted is not None:
            self.unweighted.merge(other.unweighted)
        self._keep_worst(other.worst, other.sizes, len(self.statistics.gram))
        self.total += other.total
        self.n += other.n

    def _keep_worst(self, left: Tensor, sizes: Tensor, k: int) -> None:
        worst, sizes = torch.cat((self.worst, left)), torch.cat((self.sizes, sizes))
        keep = sizes.sort(descending=True, stable=True).indices[:k]
        self.worst, self.sizes = worst[keep], sizes[keep]


@torch.no_grad()
def _summed(features: Tensor, problem: FeatureGram, center: Tensor, l1: float, batches: Iterator[Tensor]) -> _Pass:
    """What some batches leave; computed where they are."""
    found = _Pass.of_nothing(features, l1)
    for block in _blocks(batches, features):
        found.add(block, features, problem, center)
    return found


class _StreamFit:
    """The best features so far, and what a pass found of their exact codes."""

    def __init__(
        self, batches: Iterable[Tensor], first: SemiNMFResult, count: int, n_samples: int, n_batches: int, l1: float
    ) -> None:
        self._batches, self._count, self._n_samples, self._l1 = batches, count, n_samples, l1
        self._together = math.ceil(_ROWS_PER_FEATURE * len(first.features) * n_batches / n_samples)
        self.features, self._center, self.n_revived = first.features, first.center, first.n_revived
        self.found = self.evaluate(self.features)
        self.error = self.found.statistics.error(self.features)

    def step(self) -> None:
        """Improve the features and evaluate them by a pass; they are kept if their error is lower."""
        features = update_features(self.found.statistics, self.features, self._count, _FEATURE_SWEEPS)
        unused = dead(features, self.found.statistics).nonzero()[:, 0].tolist()[: len(self.found.worst)]
        if unused:
            features = features.clone()
            features[unused] = keep_largest(self.found.worst[: len(unused)], self._count)
        features, _ = normalised(features)
        evaluated = self.evaluate(features)
        error = evaluated.statistics.error(features)
        if error < self.error:
            self.features, self.found, self.error = features, evaluated, error
            self.n_revived += len(unused)

    def evaluate(self, features: Tensor) -> _Pass:
        """A pass with exact codes.

        Batches are summed some at a time, and those sums in order, wherever they were made: to the bit, the result does
        not depend on where.
        """
        work = partial(_summed, features, FeatureGram.of(features), self._center, self._l1)
        found = _Pass.of_nothing(features, self._l1)
        for part in mapped(self._batches, work, self._together):
            found.merge(part)
        if found.n != self._n_samples:
            raise ValueError(
                f"batches gave {self._n_samples} activations on the first pass and {found.n} on a later one; "
                "every pass must give the same activations."
            )
        return found


def _passes(
    fit: _StreamFit, max_passes: int, tol: float, on_metrics: Callable[[dict[str, float]], None] | None
) -> tuple[list[float], bool]:
    """The loss after each pass, the first being the one that evaluates the sample's features; and whether it
    stalled.
    """
    history: list[float] = []
    total = fit.found.statistics.total
    for number in range(1, max_passes + 1):
        if number > 1:
            fit.step()
        history.append(fit.error / total if total > 0 else 0.0)
        if on_metrics is not None:
            metrics: dict[str, float] = {"pass": number, "objective": history[-1], "n_revived": fit.n_revived}
            on_metrics(metrics | {"n_dead": int(dead(fit.features, fit.found.statistics).sum())})
        logger.info("Pass %d: objective %.4f", number, history[-1])
        if number > 1 and history[-2] - history[-1] <= tol * history[-2]:
            return history, True
    return history, False


def _blocks(batches: Iterable[Tensor], like: Tensor) -> Iterator[Tensor]:
    """Blocks of bounded size, checked, in the dtype and on the device of the features."""
    for batch in batches:
        width(finite(batch, "a batch"), like.shape[1], "a batch")
        for block in batch.detach().split(CHUNK_ROWS):
            yield block.to(like.device).to(like.dtype)
