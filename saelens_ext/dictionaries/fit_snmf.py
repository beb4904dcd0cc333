"""Build an SNMFDictionary from a stream of activations or a matrix of them.

Activations that fit into ``memory_limit`` are read once and factorised together. Others are read in several passes over
the model (one to draw a sample, then up to ``max_passes``, then one for the final codes): see
:mod:`saelens_ext.ops.semi_nmf.streaming` for what that costs.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from saelens_ext import _checks
from saelens_ext.activations.stream import ActivationStream
from saelens_ext.dictionaries.activation_matrix import ActivationSource, Restartable
from saelens_ext.dictionaries.snmf import SNMFDictionary
from saelens_ext.dictionaries.snmf_fit_result import SNMFFitResult
from saelens_ext.ops.groups import mapped
from saelens_ext.ops.memory import memory_for
from saelens_ext.ops.modes import standard_modes
from saelens_ext.ops.nnls.solve import check_l1
from saelens_ext.ops.precision import from_float64, where_float64_is, wide
from saelens_ext.ops.semi_nmf.fit import INITS, METHODS, semi_nmf
from saelens_ext.ops.semi_nmf.streaming import semi_nmf_streaming
from saelens_ext.ops.semi_nmf.updates import sum_of_squares

logger = logging.getLogger(__name__)

OnMetrics = Callable[[dict[str, float]], None]

DEFAULT_L1 = 0.1
"""Of fits by coordinate steps."""
_NOT_OF_THE_RULE = {"l1": "L1 penalty", "max_passes": "passes over a stream"}


@_checks.normalising
@dataclass(kw_only=True, frozen=True)
class SNMFFitConfig:
    """Options of a fit."""

    sparsity: float | int = 0.01
    """Fraction of the neurons that a feature may use, in (0, 1], rounded up to whole neurons."""
    init: str = "svd"
    """"svd", "kmeans" or "random"."""
    method: str = "coordinate"
    """"coordinate", or "paper" for the published rule and model: multiplicative updates, and codes that are plain
    non-negative least squares. It needs all activations in memory."""
    l1: float | int | None = None
    """Weight of the L1 penalty on the codes, in [0, 1): the cosine that a feature must have with what the others leave
    of an activation to be active. By default 0.1, and 0 for "paper", which has none. Activations are then taken from
    where most lie (neuron by neuron, the mean of the half that lies closest together), and weigh the same whatever
    their norm, so that a few of enormous norm (right behind BOS, at delimiters) do not decide the features. 0 gives the
    lowest loss, but then nearly all features are active on nearly all tokens, and large activations count for more."""
    max_iter: int | None = None
    """Iterations of a fit in memory, or to the sample of a stream; by default 100, or 500 for "paper"."""
    max_passes: int | None = None
    """Passes over the stream to improve the features, where it does not fit in memory; by default 5. Not for "paper",
    which makes none."""
    tol: float | None = None
    """Relative fall of the objective, from one iteration or pass to the next, below which the fit has converged; by
    default 1e-4, and 1e-3 for passes over a stream."""
    held_out: float | int = 0.0
    """Share of the documents kept out of the fit, on which ``held_out_loss`` is measured; in [0, 0.5]."""
    memory_limit: int = 4 * 2**30
    """Bytes of activations to hold; the fit needs about three times that."""
    seed: int = 0
    """Of everything random in the fit."""

    def __post_init__(self) -> None:
        _checks.normalise_fields(self)
        _checks.choice(self.method, METHODS, "method")
        for name in ("l1", "max_passes"):
            # A 0 is what the rule has.
            if self.method == "paper" and getattr(self, name):
                raise ValueError(
                    f"The published rule has no {_NOT_OF_THE_RULE[name]}, got {name}={getattr(self, name)!r} with "
                    f"method='paper'. Leave {name} out, or use method='coordinate'."
                )
        _checks.between(self.sparsity, 0, 1, "sparsity", closed_high=True)
        _checks.choice(self.init, INITS, "init")
        check_l1(self.penalty)
        if self.tol is not None:
            _checks.between(self.tol, 0, 1, "tol")
        for name in ("max_iter", "max_passes", "memory_limit"):
            if getattr(self, name) is not None:
                _checks.positive(getattr(self, name), name)

    @property
    def penalty(self) -> float:
        """``l1``, or the default of the method."""
        if self.l1 is None:
            return 0.0 if self.method == "paper" else DEFAULT_L1
        return float(self.l1)

    def rule(self) -> dict[str, Any]:
        """The arguments that every factorisation has."""
        names = ("sparsity", "init", "max_iter", "tol")
        own = {name: getattr(self, name) for name in names}
        return own | {"l1": self.penalty, "generator": torch.Generator().manual_seed(self.seed)}


class SNMFFitOptions(TypedDict, total=False):
    """Fields of :class:`SNMFFitConfig`, as keywords."""

    sparsity: float | int
    init: str
    method: str
    l1: float | int | None
    max_iter: int | None
    max_passes: int | None
    tol: float | None
    held_out: float | int
    memory_limit: int
    seed: int


@_checks.names_options(SNMFFitConfig)
@standard_modes()
def fit_snmf(
    source: ActivationStream | Tensor,
    n_components: int = 100,
    *,
    hook_name: str | None = None,
    document_ids: Tensor | None = None,
    progress: bool = False,
    on_metrics: OnMetrics | None = None,
    **options: Unpack[SNMFFitOptions],
) -> SNMFFitResult:
    """Build an SNMFDictionary.

    Args:
        source: a stream over one hook, meant for MLP neurons (``blocks.L.mlp.hook_post``, on a bridge
            ``blocks.L.mlp.out.hook_in``), whose ``max_tokens`` is the budget; or activations ``(n, d)``.
        n_components: k, the number of features.
        hook_name: where a matrix was read; kept in the dictionary's metadata.
        document_ids: the document of each row of a matrix, integers ``(n,)``, which ``held_out`` needs.
        progress: show a progress bar.
        on_metrics: called after each iteration (or pass) with its figures.
        **options: fields of :class:`SNMFFitConfig`.

    Returns:
        The dictionary, of unit features ordered by their share of the activations' sum of squares, with its statistics.

    Raises:
        ValueError: an option that is unknown or out of range, a stream over several hooks, no activation, activations
            that are all zero or not finite, more features than ``init`` can give, too few documents to hold any out,
            and with ``method="paper"`` an ``l1`` above 0, ``max_passes``, or more activations than ``memory_limit``.

    Examples:
        >>> fit = sx.fit_snmf(neuron_stream, n_components=8)
        >>> fit.dictionary.features.shape == (8, model.cfg.d_mlp) and 0 < fit.loss < 1
        True
        >>> bool((fit.dictionary.encode(neurons) >= 0).all())
        True

    Source: arXiv 2506.10920, for features and codes; the fit and its L1 penalty are this package's.
    """
    config = _checks.from_options(SNMFFitConfig, options, "The fit")
    n_components = _checks.positive(n_components, "n_components")
    given = ActivationSource.of(source, hook_name, config.held_out, document_ids=document_ids)
    x = given.in_memory(config.memory_limit)
    return fit_snmf_rows(given, x, n_components, config, progress=progress, on_metrics=on_metrics)


def fit_snmf_rows(
    given: ActivationSource,
    x: Float[Tensor, "n d"] | None,
    n_components: int,
    config: SNMFFitConfig,
    *,
    held_out: Sequence[Tensor] | None = None,
    progress: bool = False,
    on_metrics: OnMetrics | None = None,
) -> SNMFFitResult:
    """Build an SNMFDictionary from activations that are already in memory, where they fit.

    Args:
        given: where the activations come from.
        x: those to fit, ``(n, d)``; None reads them in passes over ``given``.
        n_components: k, the number of features.
        config: options of the fit.
        held_out: blocks of the activations kept out; by default read from ``given``.
        progress: show a progress bar.
        on_metrics: called after each iteration (or pass) with its figures.

    Raises:
        ValueError: as :func:`fit_snmf`.
    """
    shared = config.rule() | {"center": config.penalty > 0, "on_metrics": on_metrics}
    if x is not None:
        x = where_float64_is(x)
        what = f"{len(x):,} activations of width {x.shape[1]}, and their codes over {n_components} features,"
        remedy = "Lower memory_limit, so that a stream is read in passes, n_components, or the number of activations."
        with memory_for(what, len(x) * (x.shape[1] + n_components) * x.element_size(), remedy):
            fit = semi_nmf(x, n_components, method=config.method, progress=progress, **shared)
        energy = fit.codes.double().square().sum(dim=0)
        total = sum_of_squares(x)
        typical_norm = float(torch.linalg.vector_norm(x, dim=1).median())
        n_seen, limit = len(x), "max_iter"
    elif config.method == "paper":
        raise ValueError(
            f"The activations take more than memory_limit={config.memory_limit} bytes, and method='paper' needs them "
            "in memory. Raise memory_limit, lower the stream's max_tokens, or use method='coordinate'."
        )
    else:
        logger.info(
            "More than %d bytes of activations: the fit makes several passes over the stream.", config.memory_limit
        )
        fit = semi_nmf_streaming(Restartable(given), n_components, max_passes=config.max_passes, **shared)
        energy, total, typical_norm = fit.code_gram.diagonal(), fit.total, fit.typical_norm
        n_seen, limit = fit.n_samples, "max_passes"
    check_spread(fit.features, n_seen)
    shares = energy * fit.features.double().square().sum(dim=1) / total
    order = shares.argsort(descending=True, stable=True)
    recorded = {"n_seen": n_seen, "loss": fit.loss, "typical_norm": typical_norm}
    dictionary = dictionary_of(given, config, fit.features[order], fit.center, recorded)
    dictionary.fold_W_dec_norm()
    from_float64(dictionary, given.stream.device)
    held_out_loss, n_held_out = reconstruction_loss(
        dictionary, Restartable(given, held_out=True) if held_out is None else held_out
    )
    if config.held_out and not n_held_out:
        logger.warning(
            "held_out=%g kept no document out, as too few were read: the fit has no held_out_loss.", config.held_out
        )
    return SNMFFitResult(
        dictionary=dictionary,
        hook_name=given.hook_name,
        stopped_because="converged" if fit.converged else limit,
        n_seen=n_seen,
        n_held_out=n_held_out,
        loss=fit.loss,
        held_out_loss=held_out_loss,
        history=list(fit.history),
        n_dead=fit.n_dead,
        n_duplicate=fit.n_duplicate,
        n_revived=fit.n_revived,
        typical_norm=typical_norm,
        shares=shares[order].float().cpu(),
    )


def dictionary_of(
    given: ActivationSource, config: SNMFFitConfig, features: Tensor, center: Tensor | None, recorded: dict[str, Any]
) -> SNMFDictionary:
    """A dictionary of fitted features, with what is recorded of their fit."""
    fitted = {"l1": config.penalty, "init": config.init, "method": config.method}
    return SNMFDictionary.from_features(
        features,
        sparsity=config.sparsity,
        l1=config.penalty,
        center=center,
        metadata=given.metadata() | fitted | recorded,
        reshape_activations=given.reshaping,
    )


def check_spread(fitted: Tensor, n_seen: int) -> None:
    """Refuse activations of which nothing is left when their centre is subtracted."""
    if not bool(fitted.any()):
        raise ValueError(
            f"All {n_seen} activations are equal: from where they lie there is nothing to fit. Give more varied "
            "text, or l1=0, which takes activations as they are."
        )


@torch.no_grad()
def reconstruction_loss(dictionary: Any, blocks: Iterable[Tensor]) -> tuple[float | None, int]:
    """Squared error of a dictionary's reconstructions over the sum of squares of activations, and how many there were.

    Args:
        dictionary: any SAELens SAE.
        blocks: activations ``(m, d)``, block by block; those of ``hook_z`` with their heads joined.

    Returns:
        The loss, None for no activations (0 if all are zero), and their number.
    """
    error = total = 0.0
    n = 0
    takes_heads = dictionary.hook_z_reshaping_mode
    if takes_heads:
        dictionary.turn_off_forward_pass_hook_z_reshaping()
    try:
        for part in mapped(blocks, partial(_squares, dictionary)):
            error, total, n = error + part[0], total + part[1], n + part[2]
    finally:
        if takes_heads:
            dictionary.turn_on_forward_pass_hook_z_reshaping()
    return (error / total if total > 0 else 0.0) if n else None, n


@torch.no_grad()
def _squares(dictionary: Any, blocks: Iterator[Tensor]) -> tuple[float, float, int]:
    """Sums of squares of errors and of activations, and how many these are; computed where they are."""
    error = total = 0.0
    n = 0
    for block in blocks:
        for rows in block.to(dictionary.device).to(dictionary.dtype).split(4096):
            error += float((wide(rows) - wide(dictionary.decode(dictionary.encode(rows)))).square().sum())
            total += float(wide(rows).square().sum())
        n += len(block)
    return error, total, n
