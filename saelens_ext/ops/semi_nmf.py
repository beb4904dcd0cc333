"""Semi-nonnegative matrix factorisation with sparse signed features.

Symbols:
    X: ``(n, d)`` activations, one row per token. G: ``(n, k)`` codes >= 0, g_i its column i.
    H: ``(k, d)`` features, of either sign, h_i its row i, at most ``s = ceil(sparsity * d)`` non-zero neurons each.
    loss = |X - G H|^2 / |X|^2. objective = loss + damping * sum_i |g_i|^2 |h_i|^2 / |X|^2.

Why damping: the least loss alone is a poor guide. A semi-nonnegative factorisation of rank k can reach whatever an
unconstrained one of rank k - 1 can (Gillis and Kumar, arXiv 1410.7220): some non-negative combination of the features
nearly vanishes, every code is shifted along it until none is negative, and all features are active on every token and
cancel each other. Damping charges for cancelling: its sum is |X|^2 where features do not overlap, and many times that
where they cancel. It is invariant to the scale of features and codes, and all steps stay exact.

Source: Shafran, Geiger and Geva, arXiv 2506.10920; the default updates are this package's, see
:mod:`.semi_nmf_updates`.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from saelens_ext._checks import between, choice, finite, positive
from saelens_ext.ops.nnls import solve_codes
from saelens_ext.ops.nnls_kernels import FeatureGram
from saelens_ext.ops.semi_nmf_coordinate import CoordinateFit
from saelens_ext.ops.semi_nmf_init import initialise
from saelens_ext.ops.semi_nmf_paper import PaperFit
from saelens_ext.ops.semi_nmf_updates import CodeStatistics, dead, duplicates, support_size

logger = logging.getLogger(__name__)

INITS = ("svd", "kmeans", "random")
METHODS = ("coordinate", "paper")
_ESCAPES = 2
_GROWTH = 12
_PATIENCE = {"coordinate": 3, "paper": 100}
_DEFAULT_ITERATIONS = {"coordinate": 100, "paper": 500}


@dataclass(frozen=True)
class SemiNMFResult:
    """A factorisation, and why it ended."""

    codes: Float[Tensor, "n k"]
    """Codes, >= 0."""
    features: Float[Tensor, "k d"]
    """Signed features, at most ceil(sparsity * d) non-zeros each."""
    loss: float
    """Squared error of these codes and features over the sum of squares of the activations (0 if that is 0)."""
    history: list[float]
    """The objective after each iteration, which is the loss where ``damping`` is 0; never rises, and ``loss`` is not
    above its last. For ``method="paper"``, the best loss so far."""
    converged: bool
    """Whether the objective had stopped falling, as against the iterations having run out."""
    n_iter: int
    """Iterations made."""
    n_dead: int
    """Features that are zero or whose codes all are, at the end."""
    n_duplicate: int
    """Features whose cosine with an earlier one exceeds 0.99, at the end. Without damping they are merged during the
    fit.
    """
    n_revived: int
    """Dead or duplicate features replaced during the fit."""


def semi_nmf(
    x: Float[Tensor, "n d"],
    n_components: int,
    *,
    sparsity: float = 0.01,
    init: str = "svd",
    method: str = "coordinate",
    damping: float | int = 0.0,
    max_iter: int | None = None,
    tol: float = 1e-4,
    generator: torch.Generator | None = None,
    start: tuple[Tensor, Tensor] | None = None,
    progress: bool = False,
    on_metrics: Callable[[dict[str, float]], None] | None = None,
) -> SemiNMFResult:
    """Factorise activations into non-negative codes and sparse signed features.

    The default method alternates exact steps, none of which can raise the objective: each feature's best support and
    values given the others, least squares of all features on their supports, non-negative least squares of the codes.
    An iteration costs about three products of the size ``x @ features.T``. The codes returned are the exact
    non-negative least squares on the features, without damping.

    Args:
        x: ``(n, d)`` activations, any float dtype; computed in float32, or float64 if given so.
        n_components: k, the number of features.
        sparsity: fraction of neurons that a feature may use, in (0, 1].
        init: ``"svd"``, ``"kmeans"`` or ``"random"``.
        method: ``"coordinate"``, or ``"paper"`` for the published multiplicative rule, whose best iterate is returned.
        damping: charge for features that cancel each other, >= 0; see the module. 0, the default, is the plain
            factorisation; 0.2 is a good value for features to be looked at.
        max_iter: iterations at most; 100 by default, 500 for ``"paper"``.
        tol: stop when the objective falls by less than this fraction, three iterations running (100 for ``"paper"``).
        generator: source of randomness, on the CPU; seed 0 by default. The global one is not touched.
        start: codes ``(n, k)`` and features ``(k, d)`` to start from, instead of ``init``.
        progress: show a progress bar.
        on_metrics: called after each iteration (once after the several that try to leave a local minimum) with
            ``iteration``, ``objective``, ``loss``, ``n_dead``, ``n_revived``.

    Raises:
        ValueError: an activation is NaN or infinite, there are none, ``sparsity`` is outside (0, 1], ``damping`` is
            negative or given with ``method="paper"``, an option is unknown, or ``n_components`` exceeds what ``init``
            can give (min(n, d) for svd, n for kmeans).
    """
    count = check_options(x, n_components, sparsity, init, tol)
    n_components = positive(n_components, "n_components")
    choice(method, METHODS, "method")
    check_damping(damping, method)
    max_iter = positive(_DEFAULT_ITERATIONS[method] if max_iter is None else max_iter, "max_iter")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    with torch.no_grad():
        x = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        # In units of their size, squares of activations neither overflow nor vanish; a power of two rounds nothing.
        unit = 2.0 ** math.floor(math.log2(float(x.abs().max()) or 1.0))
        x = x / unit
        codes, features = (
            initialise(x, n_components, init, generator)
            if start is None
            else _checked_start(start, x, n_components, unit)
        )
        fit = (
            PaperFit(x, codes, features, count)
            if method == "paper"
            else CoordinateFit(x, codes, features, count, growth=min(_GROWTH, max_iter // 3), damping=float(damping))
        )
        history, converged = _iterate(fit, max_iter, tol, _PATIENCE[method], progress, on_metrics)
        codes, statistics = (fit.codes, fit.statistics) if isinstance(fit, PaperFit) else _exact_codes(x, fit)
        repeated = len(duplicates(fit.features))
        if repeated and damping:
            logger.warning(
                "%d of %d features repeat another: there are fewer distinct ones at this sparsity. Damping does not "
                "merge them, since it charges less for two halves than for a whole; ask for fewer features.",
                repeated,
                n_components,
            )
        return SemiNMFResult(
            codes=codes,
            features=fit.features * unit,
            loss=statistics.error(fit.features) / statistics.total if statistics.total > 0 else 0.0,
            history=history,
            converged=converged,
            n_iter=len(history),
            n_dead=len(dead(fit.features, statistics)),
            n_duplicate=repeated,
            n_revived=fit.n_revived,
        )


def _exact_codes(x: Tensor, fit: CoordinateFit) -> tuple[Tensor, CodeStatistics]:
    """Non-negative least squares on the fitted features, and its statistics; the fit's own where rounding favours
    them.
    """
    codes = solve_codes(x, FeatureGram.of(fit.features))
    statistics = CodeStatistics.of(x, codes.T)
    if statistics.error(fit.features) > fit.error:
        return fit.codes, fit.statistics
    return codes, statistics


def check_damping(damping: float | int, method: str = "coordinate") -> None:
    """Refuse a damping that is negative, not finite, or of no meaning to the method."""
    if not 0 <= damping < math.inf:
        raise ValueError(
            f"damping must be a finite number >= 0, got {damping!r}; 0.2 is a usual value, 0 the plain factorisation."
        )
    if damping and method == "paper":
        raise ValueError(
            f"The published rule has no damping, got damping={damping!r}. Use damping=0, or method='coordinate'."
        )


def check_options(x: Float[Tensor, "n d"], n_components: int, sparsity: float, init: str, tol: float) -> int:
    """Check what every fit shares; the number of neurons that a feature may use, ceil(sparsity * d)."""
    if x.ndim != 2 or not x.numel():
        raise ValueError(
            f"x has shape {tuple(x.shape)}; it must be (n, d) with at least one activation and one neuron."
        )
    finite(x, "x")
    between(sparsity, 0, 1, "sparsity", closed_high=True)
    choice(init, INITS, "init")
    between(tol, 0, 1, "tol")
    return support_size(sparsity, x.shape[1])


def _checked_start(start: tuple[Tensor, Tensor], x: Tensor, k: int, unit: float) -> tuple[Tensor, Tensor]:
    """Codes and features to start from, in the dtype and units of ``x``."""
    codes, features = (finite(part.detach(), "start").to(x) for part in start)
    if codes.shape != (len(x), k) or features.shape != (k, x.shape[1]) or bool((codes < 0).any()):
        raise ValueError(
            f"start must be codes >= 0 of shape {(len(x), k)} and features of shape {(k, x.shape[1])}, "
            f"got {tuple(codes.shape)} (smallest {float(codes.min()) if codes.numel() else 0:g}) and "
            f"{tuple(features.shape)}."
        )
    return codes, features / unit


def _iterate(
    fit: CoordinateFit | PaperFit,
    max_iter: int,
    tol: float,
    patience: int,
    progress: bool,
    on_metrics: Callable[[dict[str, float]], None] | None,
) -> tuple[list[float], bool]:
    """Step until the objective stalls for ``patience`` iterations and escapes fail too; the objectives, and whether it
    came to that.
    """
    total = fit.statistics.total
    history: list[float] = []
    stalled = failed_escapes = 0
    bar = tqdm(total=max_iter, desc="semi-NMF", disable=not progress)
    while len(history) < max_iter and failed_escapes < _ESCAPES and total > 0:
        before, iterations = fit.error, 1
        if stalled < patience:
            fit.step()
        else:
            iterations = min(fit.escape(), max_iter - len(history))
            if not iterations:
                break
        fell = before - fit.error > tol * before
        failed_escapes = failed_escapes + 1 if stalled >= patience and not fell else 0
        stalled = 0 if fell or fit.growing else stalled + 1
        history += [fit.error / total] * iterations
        bar.update(iterations)
        if on_metrics is not None:
            metrics: dict[str, float] = {
                "iteration": len(history),
                "objective": history[-1],
                "loss": fit.squared_error / total,
                "n_revived": fit.n_revived,
            }
            on_metrics(metrics | {"n_dead": len(dead(fit.features, fit.statistics))})
    bar.close()
    return history or [0.0], stalled >= patience or not total > 0
