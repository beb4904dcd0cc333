"""Semi-nonnegative matrix factorisation with sparse signed features.

Symbols:
    X: ``(n, d)`` activations, one row per token, x_t; from their centre if there is one.
    G: ``(n, k)`` codes >= 0, g_ti. H: ``(k, d)`` features, of either sign, h_i its row i, at most
        ``s = ceil(sparsity * d)`` non-zero neurons each.
    loss = |X - G H|^2 over the sum of squares of the activations as they were given.
    objective = |X - G H|^2 / |X|^2; with an L1 penalty the mean over tokens of |x_t - g_t H|^2 / |x_t|^2 plus
        2 l1 sum_i g_ti |h_i| / |x_t|.

Why an L1 penalty: the least loss alone is a poor guide. A semi-nonnegative factorisation of rank k can reach whatever
an unconstrained one of rank k - 1 can (Gillis and Kumar, arXiv 1410.7220): some non-negative combination of the
features nearly vanishes, every code is shifted along it until none is negative, and all features are active on every
token and cancel each other. The penalty makes a code zero unless the feature has a cosine above l1 with what the others
leave of the activation. It is invariant to the scale of features against codes and of each activation, so that a few
activations of enormous norm weigh no more than others, and all steps stay exact.

The centre is where activations lie that no feature is active on, estimated neuron by neuron: see
:func:`~saelens_ext.ops.semi_nmf.rows.center_of`. From their mean the codes would be of either sign, which non-negative
ones make up for with features of their own. Enormous activations do not move it.

Source: Shafran, Geiger and Geva, arXiv 2506.10920; the default updates are this package's, see
:mod:`.updates`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from saelens_ext._checks import between, choice, finite, positive
from saelens_ext.ops.nnls.kernels import FeatureGram
from saelens_ext.ops.nnls.solve import check_l1, solve_codes
from saelens_ext.ops.semi_nmf.coordinate import CoordinateFit
from saelens_ext.ops.semi_nmf.init import initialise
from saelens_ext.ops.semi_nmf.paper import PaperFit
from saelens_ext.ops.semi_nmf.rows import Rows
from saelens_ext.ops.semi_nmf.updates import CodeStatistics, dead, first_duplicates, support_size

INITS = ("svd", "kmeans", "random")
METHODS = ("coordinate", "paper")
_SEARCH = 12
_PATIENCE = {"coordinate": 3, "paper": 100}
_DEFAULT_TOL = 1e-4
_DEFAULT_ITERATIONS = {"coordinate": 100, "paper": 500}


@dataclass(frozen=True, kw_only=True)
class FittedFeatures:
    """Features of a fit, and why it ended."""

    features: Float[Tensor, "k d"]
    """Signed features, at most ceil(sparsity * d) non-zeros each."""
    center: Float[Tensor, " d"]
    """What was subtracted from the activations; zero unless asked for."""
    loss: float
    """Squared error of the features with exact codes, and of the centre, over the sum of squares of the activations (0
    if that is 0).
    """
    history: list[float]
    """The objective after each iteration (or of the best features after each pass), which is the loss where ``l1`` is 0
    and there is no centre; never rises, and then ``loss`` is not above its last. For ``method="paper"``, the best loss
    so far."""
    converged: bool
    """Whether the objective had stopped falling, as against the iterations or passes having run out."""
    n_dead: int
    """Features that are zero or whose codes all are, at the end."""
    n_duplicate: int
    """Features whose cosine with an earlier one exceeds 0.99, at the end."""
    n_revived: int
    """Dead or duplicate features replaced during the fit, or dead ones between passes."""


@dataclass(frozen=True, kw_only=True)
class SemiNMFResult(FittedFeatures):
    """A factorisation."""

    codes: Float[Tensor, "n k"]
    """Codes, >= 0: the optimum for these features, as :func:`~saelens_ext.ops.nnls.solve.nnls` finds it with the same
    ``l1``.
    """
    n_iter: int
    """Iterations made, after the search for a start."""


def semi_nmf(
    x: Float[Tensor, "n d"],
    n_components: int,
    *,
    sparsity: float | int = 0.01,
    init: str = "svd",
    method: str = "coordinate",
    l1: float | int = 0.0,
    center: bool = False,
    max_iter: int | None = None,
    tol: float | None = None,
    generator: torch.Generator | None = None,
    start: tuple[Tensor, Tensor] | None = None,
    progress: bool = False,
    on_metrics: Callable[[dict[str, float]], None] | None = None,
) -> SemiNMFResult:
    """Factorise activations into non-negative codes and sparse signed features.

    The default method first searches for the groups of neurons with all features fitted together, and then alternates
    exact steps, none of which can raise the objective: each feature's best support and values given the others, least
    squares of all features on their supports (where ``l1`` is 0), codes. See :mod:`.coordinate`. An iteration
    costs three to four products of the size ``x @ features.T``.

    Args:
        x: ``(n, d)`` activations, any float dtype; computed in float32, or float64 if given so.
        n_components: k, the number of features.
        sparsity: fraction of neurons that a feature may use, in (0, 1].
        init: ``"svd"``, ``"kmeans"`` or ``"random"``.
        method: ``"coordinate"``, or ``"paper"`` for the published multiplicative rule, whose best iterate is returned.
        l1: weight of the L1 penalty on the codes, a cosine in [0, 1); see the module. 0, the default, is the plain
            factorisation; 0.1 is a good value for features to be looked at.
        center: whether to factorise the activations from their centre; see the module.
        max_iter: iterations at most; 100 by default, 500 for ``"paper"``.
        tol: stop when the objective falls by less than this fraction, by default 1e-4, three iterations running (100
            for ``"paper"``).
        generator: source of randomness, on the CPU; seed 0 by default. The global one is not touched.
        start: codes ``(n, k)`` and features ``(k, d)`` to start from, instead of ``init``.
        progress: show a progress bar.
        on_metrics: called after each iteration that follows the search with ``iteration``, ``objective``, ``loss``,
            ``n_dead``, ``n_revived``.

    Raises:
        ValueError: an activation is NaN or infinite, there are none, ``sparsity`` is outside (0, 1], ``l1`` is outside
            [0, 1) or given with ``method="paper"``, an option is unknown, or ``n_components`` exceeds what ``init``
            can give (min(n, d) for svd, n for kmeans).
    """
    tol = _DEFAULT_TOL if tol is None else tol
    count = check_options(x, n_components, sparsity, init, tol, l1)
    n_components = positive(n_components, "n_components")
    choice(method, METHODS, "method")
    if l1 and method == "paper":
        raise ValueError(f"The published rule has no L1 penalty, got l1={l1!r}. Use l1=0, or method='coordinate'.")
    max_iter = positive(_DEFAULT_ITERATIONS[method] if max_iter is None else max_iter, "max_iter")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    with torch.no_grad():
        rows = Rows.of(x, center=center, equal=l1 > 0)
        codes, features = (
            initialise(rows.values, n_components, init, generator)
            if start is None
            else _checked_start(start, n_components, rows)
        )
        fit = (
            PaperFit(rows.values, codes, features, count)
            if method == "paper"
            else CoordinateFit(rows.values, codes, features, count, float(l1), min(_SEARCH, max_iter))
        )
        del codes, features
        history, converged = _iterate(fit, max_iter, tol, _PATIENCE[method], progress, on_metrics)
        codes = fit.codes if method == "paper" else _exact_codes(rows.values, fit, float(l1))
        codes[:, ~fit.features.any(dim=1)] = 0  # they may be anything
        statistics = rows.statistics(codes)
        total = rows.total if center else statistics.total
        error = statistics.error(fit.features)
        if not rows.equal:
            error = min(error, fit.error)  # of these codes or worse ones, up to rounding
        return SemiNMFResult(
            codes=codes.mul_(rows.lengths * rows.unit) if rows.equal else codes,
            features=fit.features if rows.equal else fit.features * rows.unit,
            center=rows.center,
            loss=error / total if total > 0 else 0.0,
            history=history,
            converged=converged,
            n_iter=len(history),
            # Beside one enormous activation the parts of all features would count as nothing.
            n_dead=int((codes.amax(dim=0) <= 0).sum()) if rows.equal else int(dead(fit.features, statistics).sum()),
            n_duplicate=int((first_duplicates(fit.features) < n_components).sum()),
            n_revived=fit.n_revived,
        )


def _exact_codes(x: Tensor, fit: CoordinateFit | PaperFit, l1: float) -> Tensor:
    """The optimal codes for the fitted features; the fit's own where rounding favours them."""
    codes = solve_codes(x, FeatureGram.of(fit.features), l1=l1)
    return codes if CodeStatistics.of(x, codes.T, l1).error(fit.features) <= fit.error else fit.codes


def check_options(
    x: Float[Tensor, "n d"], n_components: int, sparsity: float | int, init: str, tol: float, l1: float | int = 0.0
) -> int:
    """Check what every fit shares; the number of neurons that a feature may use, ceil(sparsity * d)."""
    if x.ndim != 2 or not x.numel():
        raise ValueError(
            f"x has shape {tuple(x.shape)}; it must be (n, d) with at least one activation and one neuron."
        )
    finite(x, "x")
    between(sparsity, 0, 1, "sparsity", closed_high=True)
    choice(init, INITS, "init")
    between(tol, 0, 1, "tol")
    check_l1(l1)
    return support_size(sparsity, x.shape[1])


def _checked_start(start: tuple[Tensor, Tensor], k: int, rows: Rows) -> tuple[Tensor, Tensor]:
    """Codes and features to start from, in the dtype and units of the rows."""
    codes, features = (finite(part.detach(), "start").to(rows.values) for part in start)
    n, d = rows.values.shape
    if codes.shape != (n, k) or features.shape != (k, d) or bool((codes < 0).any()):
        raise ValueError(
            f"start must be codes >= 0 of shape {(n, k)} and features of shape {(k, d)}, "
            f"got {tuple(codes.shape)} (smallest {float(codes.min()) if codes.numel() else 0:g}) and "
            f"{tuple(features.shape)}."
        )
    if not rows.equal:
        return codes, features / rows.unit
    return codes / torch.where(rows.lengths > 0, rows.lengths * rows.unit, 1.0), features


def _iterate(
    fit: CoordinateFit | PaperFit,
    max_iter: int,
    tol: float,
    patience: int,
    progress: bool,
    on_metrics: Callable[[dict[str, float]], None] | None,
) -> tuple[list[float], bool]:
    """Step until the objective stalls for ``patience`` iterations; the objectives, and whether it came to that."""
    total = fit.statistics.total
    history: list[float] = []
    stalled = 0
    bar = tqdm(total=max_iter, desc="semi-NMF", disable=not progress)
    while len(history) < max_iter and stalled < patience and total > 0:
        before = fit.error
        fit.step()
        stalled = 0 if before - fit.error > tol * before else stalled + 1
        history.append(fit.error / total)
        bar.update()
        if on_metrics is not None:
            metrics: dict[str, float] = {
                "iteration": len(history),
                "objective": history[-1],
                "loss": fit.squared_error / total,
                "n_revived": fit.n_revived,
            }
            on_metrics(metrics | {"n_dead": fit.n_dead})
    bar.close()
    return history or [0.0], stalled >= patience or not total > 0
