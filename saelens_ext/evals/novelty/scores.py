"""Scores of how unlike the activations of a reference an activation is, each a function of the activation alone.

Symbols
    x   an activation, ``(d,)``; r a row of the reference, ``(n, d)``
    c   the origin of directions: a partition's centre, or the spherical centre of the reference
    u   (x - c) / |x - c|, the direction of x

Every score is larger where the activation is more novel. What it is made from is fixed when it is made: scoring an
activation depends on no other activation that is scored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from sae_lens import SAE, Transcoder
from sklearn.covariance import LedoitWolf
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from saelens_ext.host.flat_sae import encode_flat, flat_activations, refuse_sequence_codes
from saelens_ext.host.models import HostModel
from saelens_ext.host.prompt_passes import check_causal, logits_of
from saelens_ext.ops.modes import evaluating, standard_modes, without_autocast
from saelens_ext.ops.precision import wide
from saelens_ext.ops.spherical import assign_nearest, directions, has_direction, spherical_center

NEIGHBOUR_ROWS = 10_000
"""Reference rows that nearest neighbours are looked for among, at most."""
_ENTRIES_PER_BLOCK = 2**22  # 16 MB of float32
_LOGITS_PER_BLOCK = 2**25  # 128 MB of float32
_WIDEST_COVARIANCE = 8192


@dataclass(frozen=True, kw_only=True, eq=False)
class NoveltyScore:
    """One score of an activation."""

    name: str
    """What it is, for tables."""
    row_cost: int
    """Numbers that it holds per activation, which bounds how many it is given at once."""
    function: Callable[[Tensor], Tensor]
    """Maps activations ``(n, d)`` to scores ``(n,)``."""

    @standard_modes(gradients=False)
    def __call__(self, x: Float[Tensor, "n d"]) -> Float64[Tensor, " n"]:
        """Score activations, in blocks of bounded memory; float64 on the CPU."""
        rows = max(1, _ENTRIES_PER_BLOCK // self.row_cost)
        parts = [wide(self.function(part)).cpu() for part in x.split(rows)]
        return _checks.finite(torch.cat(parts), f"The score {self.name!r}") if parts else torch.zeros(0).double()


def exemplar_distance(name: str, partition: ExemplarPartition) -> NoveltyScore:
    """Cosine distance to the nearest exemplar of a partition, in [0, 2]."""
    return _nearest_direction(name, partition.center, partition.exemplars)


def coreset_distance(
    name: str, reference: Float[Tensor, "n d"], k: int, center: Float[Tensor, " d"], generator: torch.Generator
) -> NoveltyScore:
    """Cosine distance to the nearest of the directions of k rows of the reference, drawn without replacement.

    What as many activations detect that nobody has chosen; compared with a partition of k regions about the same
    centre, it says whether choosing them matters.

    Raises:
        ValueError: more directions than the reference has.
    """
    center, rows = center.detach(), _with_direction(reference, center)
    if k > len(rows):
        raise ValueError(
            f"A coreset of {k} directions needs as many reference activations, got {len(rows)} that differ from the "
            "centre. Read more of the reference (n_activations), or compare a partition with fewer regions."
        )
    drawn = torch.randperm(len(rows), generator=generator)[:k].sort().values
    return _nearest_direction(name, center, directions(rows[drawn.to(rows.device)], center)[0])


def neighbour_distance(
    name: str,
    reference: Float[Tensor, "n d"],
    k: int,
    center: Float[Tensor, " d"],
    generator: torch.Generator,
    *,
    max_rows: int = NEIGHBOUR_ROWS,
) -> NoveltyScore:
    """Mean cosine distance to the k nearest of at most ``max_rows`` reference activations, in [0, 2].

    An activation without a direction has distance 1 to everything.

    Raises:
        ValueError: fewer reference activations than neighbours.
    """
    center, rows = center.detach(), _with_direction(reference, center)
    if not 1 <= k <= len(rows):
        raise ValueError(f"k must lie between 1 and the {len(rows)} reference activations, got {k}.")
    drawn = torch.randperm(len(rows), generator=generator)[:max_rows].sort().values
    units = directions(rows[drawn.to(rows.device)], center)[0]

    def score(x: Tensor) -> Tensor:
        cosines = directions(x, center)[0] @ units.T
        return 1 - wide(cosines.topk(min(k, len(units)), dim=1).values).mean(dim=1)

    return NoveltyScore(name=name, row_cost=len(units), function=score)


def mahalanobis_distance(name: str, reference: Float[Tensor, "n d"]) -> NoveltyScore:
    """Mahalanobis distance to the mean of the reference under its covariance, shrunk by the rule of Ledoit and Wolf.

    Raises:
        ValueError: activations wider than 8192, whose covariance would not fit, or a reference that does not vary.

    Source: Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", Journal of
    Multivariate Analysis 2004, as scikit-learn has it.
    """
    d = reference.shape[1]
    if d > _WIDEST_COVARIANCE:
        raise ValueError(
            f"A Mahalanobis distance needs the covariance of activations of width {d}; at most {_WIDEST_COVARIANCE} is "
            "allowed. Leave 'mahalanobis' out of baselines."
        )
    fitted = LedoitWolf(store_precision=False).fit(wide(reference).numpy(force=True))
    covariance = torch.from_numpy(fitted.covariance_)
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed) or not bool(torch.isfinite(factor).all()):
        raise ValueError(
            f"The covariance of the {len(reference)} reference activations is singular: they do not vary. Leave "
            "'mahalanobis' out of baselines."
        )
    mean = torch.from_numpy(fitted.location_)

    def score(x: Tensor) -> Tensor:
        offset = wide(x).cpu() - mean
        return torch.linalg.solve_triangular(factor, offset.T, upper=False).norm(dim=0)

    return NoveltyScore(name=name, row_cost=4 * d, function=score)


def norm_distance(name: str, reference: Float[Tensor, "n d"], center: Float[Tensor, " d"]) -> NoveltyScore:
    """How far |x - c| lies from its median over the reference, on either side, in units of the distance between the
    median and the 16th or the 84th percentile on that side: what directions leave out.

    Raises:
        ValueError: the norms of the reference do not vary.
    """
    norms = _offset_norms(reference, center)
    low, middle, high = torch.quantile(norms[: 2**23], torch.tensor([0.16, 0.5, 0.84]).double()).tolist()
    if not low < middle < high:
        raise ValueError("The norms of the reference activations do not vary. Leave 'norm' out of baselines.")

    def score(x: Tensor) -> Tensor:
        norms = _offset_norms(x, center)
        return torch.maximum((norms - middle) / (high - middle), (middle - norms) / (middle - low))

    return NoveltyScore(name=name, row_cost=4 * reference.shape[1], function=score)


def reconstruction_error(name: str, sae: SAE[Any]) -> NoveltyScore:
    """Squared error of a dictionary's reconstruction, as a fraction of the activation's square; for any SAELens SAE.

    Raises:
        ValueError: a transcoder, which does not reconstruct what it reads, or a SAE that codes whole sequences.
    """
    refuse_sequence_codes(sae)
    if isinstance(sae, Transcoder):
        raise ValueError(
            f"{name} is a transcoder: it predicts another activation than it reads, so it has no error on the one it "
            "reads. Give an SAE, or an ExemplarPartition."
        )

    @without_autocast()
    def score(x: Tensor) -> Tensor:
        x = x.to(sae.W_dec)
        with flat_activations(sae):
            rebuilt = sae.decode(encode_flat(sae, x))
        square = wide(x).square().sum(dim=1)
        return (wide(x) - wide(rebuilt)).square().sum(dim=1) / square.clamp_min(torch.finfo(torch.float32).tiny)

    return NoveltyScore(name=name, row_cost=sae.cfg.d_sae + 2 * sae.cfg.d_in, function=score)


@torch.no_grad()
def next_token_entropy(model: HostModel, token_ids: Tensor, mask: Tensor) -> Float64[Tensor, "b l"]:
    """Entropy, in nats, of what the model predicts after each token: its own measure of how lost it is.

    Args:
        model: any TransformerLens model.
        token_ids: right-padded windows, ``(b, l)``.
        mask: which tokens are real.

    Returns:
        One per token, float64 on the CPU; without a meaning at padding.

    Raises:
        ValueError: a model whose predictions depend on later tokens.
    """
    check_causal(model)
    device = next(iter(model.parameters())).device
    windows = max(1, _LOGITS_PER_BLOCK // (token_ids.shape[1] * int(model.cfg.d_vocab)))
    parts = []
    with evaluating(model):
        for ids, real in zip(token_ids.split(windows), mask.split(windows)):
            logits = logits_of(model, ids.to(device), real.to(device))
            # One window at a time: the float32 copy of the logits is the widest tensor here.
            parts += [torch.distributions.Categorical(logits=row.float()).entropy().cpu().double() for row in logits]
    return torch.stack(parts)


def reference_center(reference: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """The spherical centre of the reference, about which scores without a partition measure directions."""
    return spherical_center(reference).to(reference.device)


def _nearest_direction(name: str, center: Tensor, rows: Tensor) -> NoveltyScore:
    def score(x: Tensor) -> Tensor:
        return assign_nearest(x, center, rows)[1]

    return NoveltyScore(name=name, row_cost=rows.shape[1], function=score)


def _with_direction(reference: Tensor, center: Tensor) -> Tensor:
    return reference[has_direction(_offset_norms(reference, center).float())].detach()


def _offset_norms(x: Tensor, center: Tensor) -> Tensor:
    parts = [(wide(part) - wide(center.detach())).norm(dim=1) for part in x.detach().split(4096)]
    return torch.cat(parts) if parts else wide(x.new_zeros(0))
