"""Recursive semi-NMF: factorise activations, then the features, then theirs, and refine all levels together."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import Unpack

from saelens_ext import _checks
from saelens_ext.activations.stream import ActivationStream
from saelens_ext.dictionaries.activation_matrix import ActivationSource
from saelens_ext.dictionaries.fit_snmf import (
    SNMFFitConfig,
    SNMFFitOptions,
    check_spread,
    dictionary_of,
    reconstruction_loss,
)
from saelens_ext.dictionaries.hierarchy import HierarchicalSNMF
from saelens_ext.dictionaries.snmf import SNMFDictionary
from saelens_ext.ops.modes import standard_modes
from saelens_ext.ops.nnls.kernels import FeatureGram
from saelens_ext.ops.nnls.solve import solve_codes
from saelens_ext.ops.precision import from_float64, where_float64_is
from saelens_ext.ops.semi_nmf.deep import DeepFactors, level_errors, refine
from saelens_ext.ops.semi_nmf.fit import semi_nmf
from saelens_ext.ops.semi_nmf.rows import Rows
from saelens_ext.ops.semi_nmf.updates import normalised, sum_of_squares, support_size

_REFINE_TOL = 1e-4
_LINK_L1 = 0.1


@_checks.names_options(SNMFFitConfig)
@standard_modes()
def fit_hierarchical_snmf(
    source: ActivationStream | Tensor,
    ranks: Sequence[int] = (400, 200, 100, 50),
    *,
    start: SNMFDictionary | None = None,
    hook_name: str | None = None,
    refine_iter: int = 30,
    progress: bool = False,
    **options: Unpack[SNMFFitOptions],
) -> HierarchicalSNMF:
    """Build dictionaries of falling size in which each feature is a non-negative mix of features of the one below.

    The activations are held in memory: set the stream's ``max_tokens`` accordingly.

    Args:
        source: a stream over one hook, or activations ``(n, d)``.
        ranks: features of each level, falling.
        start: features to begin with at the finest level, of ``ranks[0]``, such as those of a
            :func:`~saelens_ext.dictionaries.fit_snmf.fit_snmf` on the same activations; by default they are fitted
            here.
        hook_name: where a matrix was read; kept in the dictionaries' metadata.
        refine_iter: iterations of the joint refinement at most; 0 leaves the levels as they were built one on another.
        progress: show progress bars.
        **options: fields of :class:`~saelens_ext.dictionaries.fit_snmf.SNMFFitConfig` for every level, but for
            ``held_out`` and ``max_passes``. With ``method="paper"`` the published rule builds each level; the links
            and the refinement stay this package's.

    Raises:
        ValueError: ranks that do not fall, activations that exceed ``memory_limit``, and as for
            :func:`~saelens_ext.dictionaries.fit_snmf.fit_snmf`.

    Examples:
        >>> tree = sx.fit_hierarchical_snmf(neuron_stream, ranks=(8, 4))
        >>> [dictionary.cfg.d_sae for dictionary in tree.dictionaries]
        [8, 4]

    Source: arXiv 2506.10920, recursive SNMF; the refinement is this package's, see
    :mod:`saelens_ext.ops.semi_nmf.deep`.
    """
    ranks = _checked_ranks(ranks)
    config = _checks.from_options(SNMFFitConfig, options, "The fit")
    if config.held_out:
        raise ValueError("fit_hierarchical_snmf keeps no documents out; leave held_out at 0 and measure with fit_snmf.")
    if config.max_passes is not None:
        raise ValueError(
            f"fit_hierarchical_snmf holds its activations in memory and makes no passes, got "
            f"max_passes={config.max_passes!r}. Leave it out; max_iter is what bounds the fit of a level."
        )
    given = ActivationSource.of(source, hook_name, 0.0)
    x = given.in_memory(config.memory_limit)
    if x is None:
        raise ValueError(
            f"The activations take more than memory_limit={config.memory_limit} bytes; a hierarchy needs them in "
            "memory. Lower the stream's max_tokens, or raise memory_limit (the fit needs about three times that)."
        )
    x = where_float64_is(x)
    with torch.no_grad():
        _check_start(start, ranks[0], x, config)
        rows = _rows(x, start, config)
        check_spread(rows.values, len(x))
        factors = _recursive(rows.values, ranks, start, config, progress)
        before = _relative_errors(rows, factors)
        history = []
        if refine_iter:
            factors, history = _refined(rows.values, factors, config, refine_iter, progress)
    made = _dictionaries(given, factors, rows, config, x)
    dictionaries = [from_float64(dictionary, given.stream.device) for dictionary in made]
    return HierarchicalSNMF(
        dictionaries=dictionaries,
        links=factors.links,
        hook_name=given.hook_name,
        losses=_relative_errors(rows, factors),
        losses_before=before,
        encode_losses=[cast(float, reconstruction_loss(dictionary, [x])[0]) for dictionary in dictionaries],
        history=history,
        n_seen=len(x),
    )


def _checked_ranks(ranks: Sequence[int]) -> tuple[int, ...]:
    """At least two, positive and falling."""
    ranks = tuple(_checks.positive(rank, "each of ranks") for rank in ranks)
    if len(ranks) < 2 or any(after >= before for before, after in zip(ranks, ranks[1:], strict=False)):
        raise ValueError(
            f"ranks must be at least two numbers, each below the one before, such as (400, 200, 100, 50); got {ranks}."
        )
    return ranks


def _rows(x: Tensor, start: SNMFDictionary | None, config: SNMFFitConfig) -> Rows:
    """The activations as the objective takes them: from the origin of the features to begin with, if there are any."""
    equal = config.penalty > 0
    if start is None:
        return Rows.of(x, center=equal, equal=equal)
    return Rows.around(x, start.b_dec.detach().to(x), equal=equal)


def _refined(
    x: Tensor, factors: DeepFactors, config: SNMFFitConfig, refine_iter: int, progress: bool
) -> tuple[DeepFactors, list[float]]:
    """The levels refined together, and the objective over the sum of squares."""
    count = support_size(config.sparsity, x.shape[1])
    total = sum_of_squares(x)
    bar = tqdm(total=_checks.positive(refine_iter, "refine_iter"), desc="refining all levels", disable=not progress)
    factors, history = refine(
        x, factors, count, config.penalty, refine_iter, _REFINE_TOL, on_iteration=lambda _: bar.update()
    )
    bar.close()
    return factors, [value / total for value in history]


def _dictionaries(
    given: ActivationSource, factors: DeepFactors, rows: Rows, config: SNMFFitConfig, x: Tensor
) -> list[SNMFDictionary]:
    norm, ranks = float(torch.linalg.vector_norm(x, dim=1).median()), [len(part) for part in factors.features]
    recorded = {"n_seen": len(x), "ranks": ranks, "typical_norm": norm}
    return [
        dictionary_of(given, config, features, rows.center, recorded | {"level": level})
        for level, features in enumerate(factors.features)
    ]


def _check_start(start: SNMFDictionary | None, rank: int, x: Tensor, config: SNMFFitConfig) -> None:
    """Refuse features to begin with that are of another model than the levels will be."""
    if start is None:
        return
    if (start.cfg.d_sae, start.cfg.d_in) != (rank, x.shape[1]):
        raise ValueError(
            f"start has {start.cfg.d_sae} features over {start.cfg.d_in} neurons; the finest level needs {rank} over "
            f"{x.shape[1]}."
        )
    if start.cfg.l1 != config.penalty:
        raise ValueError(f"start was fitted with l1={start.cfg.l1:g}, not {config.penalty:g}; give the same l1 here.")


def _recursive(
    x: Tensor, ranks: tuple[int, ...], start: SNMFDictionary | None, config: SNMFFitConfig, progress: bool
) -> DeepFactors:
    """Each level by itself, on the unit features of the one below."""
    features, links = [], []
    codes, below, l1 = x.new_empty(0), x, config.penalty
    if start is not None:
        below = normalised(start.features.detach().to(x))[0]
        features, codes = [below], solve_codes(x, FeatureGram.of(below), l1=l1)
    for rank in ranks[len(features) :]:
        fit = semi_nmf(below, rank, method=config.method, progress=progress, **config.rule())
        below, length = normalised(fit.features)
        features.append(below)
        if len(features) == 1:
            codes = fit.codes * length
        else:
            # Exact codes may be large ones that cancel each other, whose errors would add up over the levels.
            links.append(solve_codes(features[-2], FeatureGram.of(below), l1=max(l1, _LINK_L1)))
    return DeepFactors(codes, features, links)


def _relative_errors(rows: Rows, factors: DeepFactors) -> list[float]:
    """The loss of each level through the links."""
    errors = level_errors(factors, rows.statistics(factors.codes))
    return [error / rows.total if rows.total > 0 else 0.0 for error in errors]
