"""Several layers of semi-nonnegative matrix factorisation, fitted together.

Symbols:
    X: ``(n, d)`` activations. G: ``(n, r_0)`` codes >= 0. H_l: ``(r_l, d)`` signed features of level l, sparse, unit
    rows.
    W_l: ``(r_(l-1), r_l)`` links >= 0, for l >= 1. M_l = W_1 ... W_l, M_0 = 1: what level l makes of the codes.
    objective = sum over levels of |X - G M_l H_l|^2 + 2 l1 sum_ti |x_t| (G M_l)_ti |H_l row i|.
    A = G'G, B = G'X, S_i = sum_t |x_t| g_ti.

Each level factorises the features of the one below, and all are then refined together by steps that keep the signs and
the supports' size: codes by non-negative least squares, features as in :mod:`.updates`, links by projected
gradients. None can raise the objective.

Source: recursive factorisation as in Shafran et al., arXiv 2506.10920; deep semi-NMF, Trigeorgis et al. 2014. Their
refinement by Adam fits the last level only and leaves the constraints; this one fits all levels and keeps them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from saelens_ext.ops.nnls.kernels import FeatureGram
from saelens_ext.ops.semi_nmf.updates import CHUNK_ROWS, CodeStatistics, normalised, update_codes, update_features

_LINK_STEPS = 60


@dataclass
class DeepFactors:
    """Codes, links and features of all levels."""

    codes: Float[Tensor, "n r"]
    """G, of the lowest level."""
    features: list[Tensor]
    """H_l, the lowest level first."""
    links: list[Tensor]
    """W_l, from level l - 1 to level l, for l from 1."""

    def maps(self) -> list[Float64[Tensor, "r _"]]:
        """M_l of each level, float64."""
        maps = [torch.eye(len(self.features[0]), dtype=torch.float64, device=self.codes.device)]
        for links in self.links:
            maps.append(maps[-1] @ links.double())
        return maps


def level_errors(factors: DeepFactors, statistics: CodeStatistics) -> list[float]:
    """|X - G M_l H_l|^2 of each level, from the statistics of the codes."""
    plain = replace(statistics, l1=0.0)
    return [_of_level(plain, m).error(h) for m, h in zip(factors.maps(), factors.features, strict=True)]


def refine(
    x: Float[Tensor, "n d"],
    factors: DeepFactors,
    count: int,
    l1: float,
    max_iter: int,
    tol: float,
    on_iteration: Callable[[float], object] | None = None,
) -> tuple[DeepFactors, list[float]]:
    """Fit all levels together.

    Args:
        x: ``(n, d)`` activations.
        factors: where to start; left as they are.
        count: neurons that a feature may use.
        l1: weight of the L1 penalty on the codes of every level.
        max_iter: iterations at most.
        tol: stop when an iteration lowers the objective by less than this fraction.
        on_iteration: called with the objective after each.

    Returns:
        The factors, and the objective at the start and after each iteration, which never rises.
    """
    statistics = CodeStatistics.of(x, factors.codes.T, l1)
    history = [objective(factors, statistics)]
    for _ in range(max_iter):
        new = DeepFactors(factors.codes, list(factors.features), list(factors.links))
        for level in range(len(new.features)):
            _update_features(new, statistics, level, count)
        for level in range(1, len(new.features)):
            _update_links(new, statistics, level)
        new.codes = _update_codes(x, new, l1)
        new_statistics = CodeStatistics.of(x, new.codes.T, l1)
        value = objective(new, new_statistics)
        if value > history[-1]:  # by rounding: there is nothing left to gain
            break
        factors, statistics = new, new_statistics
        history.append(value)
        if on_iteration is not None:
            on_iteration(value)
        if history[-2] - value <= tol * history[-2]:
            break
    return factors, history


def objective(factors: DeepFactors, statistics: CodeStatistics) -> float:
    """The objective, from the statistics of the codes."""
    return sum(_of_level(statistics, m).error(h) for m, h in zip(factors.maps(), factors.features, strict=True))


def _of_level(statistics: CodeStatistics, m: Tensor) -> CodeStatistics:
    """The statistics of the codes G M."""
    gram, product, sums = m.T @ statistics.gram @ m, m.T @ statistics.product, m.T @ statistics.sums
    return replace(statistics, gram=gram, product=product, sums=sums)


def _update_features(factors: DeepFactors, statistics: CodeStatistics, level: int, count: int) -> None:
    """New features of one level; their lengths go into what multiplies them, so that rows stay of unit length."""
    mine = _of_level(statistics, factors.maps()[level])
    unit, length = normalised(update_features(mine, factors.features[level], count))
    factors.features[level] = unit
    if level == 0:
        factors.codes = factors.codes * length
        statistics.gram *= length.double() * length.double()[:, None]
        statistics.product *= length.double()[:, None]
        statistics.sums *= length.double()
    else:
        factors.links[level - 1] = factors.links[level - 1] * length
    if level < len(factors.links):
        factors.links[level] = factors.links[level] / length[:, None]


def _update_links(factors: DeepFactors, statistics: CodeStatistics, level: int) -> None:
    """W_l given all else: minimise <P W S, W> - 2 <C, W> over W >= 0."""
    below = factors.maps()[level - 1]
    p = below.T @ statistics.gram @ below
    size, width = len(factors.features[level]), statistics.product.shape[1]
    options = {"dtype": torch.float64, "device": below.device}
    above = torch.eye(size, **options)
    s, reached, lengths = torch.zeros_like(above), torch.zeros(size, width, **options), torch.zeros(size, **options)
    for later in range(level, len(factors.features)):
        if later > level:
            above = above @ factors.links[later - 1].double()
        features = factors.features[later].double()
        s += above @ features @ features.T @ above.T
        reached += above @ features
        lengths += above @ torch.linalg.vector_norm(features, dim=1)
    c = below.T @ (statistics.product @ reached.T - statistics.l1 * torch.outer(statistics.sums, lengths))
    links = factors.links[level - 1]
    factors.links[level - 1] = nonnegative_quadratic(links.double(), p, c, s, _LINK_STEPS).to(links.dtype)


def nonnegative_quadratic(
    w: Float64[Tensor, "a b"],
    p: Float64[Tensor, "a a"],
    c: Float64[Tensor, "a b"],
    s: Float64[Tensor, "b b"],
    steps: int,
) -> Float64[Tensor, "a b"]:
    """Lower <P W S, W> - 2 <C, W> over W >= 0 by accelerated projected gradients, restarted whenever it would rise.

    Source: Beck and Teboulle 2009, with the restarts of O'Donoghue and Candes 2015.
    """
    # In units where both diagonals are one, a single step length suits all entries.
    left = p.diagonal().clamp(min=0).sqrt().clamp(min=1e-30)[:, None]
    right = s.diagonal().clamp(min=0).sqrt().clamp(min=1e-30)
    p, s, c, w = p / left / left.T, s / right / right[:, None], c / left / right, w * left * right
    step = 1 / max(float(torch.linalg.matrix_norm(p, 2) * torch.linalg.matrix_norm(s, 2)), 1e-30)

    def value(candidate: Tensor) -> float:
        return float((candidate * (p @ candidate @ s - 2 * c)).sum())

    ahead, momentum, best = w, 1.0, value(w)
    for _ in range(steps):
        new = (ahead - step * (p @ ahead @ s - c)).clamp_(min=0)
        new_value = value(new)
        if new_value > best:
            ahead, momentum = w, 1.0
            continue
        next_momentum = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = new + (momentum - 1) / next_momentum * (new - w)
        w, momentum, best = new, next_momentum, new_value
    return w / left / right


def _update_codes(x: Tensor, factors: DeepFactors, l1: float) -> Tensor:
    """G given all else: the levels' problems add up to one of non-negative least squares."""
    levels = [(m, h.double()) for m, h in zip(factors.maps(), factors.features, strict=True)]
    gram = reduce(torch.add, (m @ h @ h.T @ m.T for m, h in levels))
    targets = reduce(torch.add, (m @ h for m, h in levels))
    lengths = reduce(torch.add, (m @ torch.linalg.vector_norm(h, dim=1) for m, h in levels))
    problem = FeatureGram.from_gram(targets, gram, factors.codes.dtype)
    weights = (l1 * lengths.to(problem.norm) / problem.norm)[:, None]
    new = torch.empty_like(factors.codes)
    for start in range(0, len(x), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        codes, sizes = factors.codes[rows].T.contiguous(), torch.linalg.vector_norm(x[rows], dim=1)
        new[rows] = update_codes(x[rows], problem, codes, dual=False, sizes=sizes, l1=weights).T
    return new
