"""What training changed in a dictionary: replicas of one model's beside replicas of another's, by the seed's own noise.

Symbols
    side       "first" or "second": the replicas of one model
    own        cosine of a latent's direction with the nearest one of another replica of its side
    across     the same in a replica of the other side
    quintile   of log10(N c^2), members and coherence of a region, which predicts that it is found again
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from sae_lens import SAE
from sklearn.metrics import adjusted_mutual_info_score
from torch import Tensor

from saelens_ext.analysis.match import Center, SideMatch
from saelens_ext.analysis.match_null import Null
from saelens_ext.concepts.token_activations import read_texts
from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from saelens_ext.dictionaries.fit_result import ExemplarFitResult
from saelens_ext.evals.checkpoints.checkpoint_evidence import ACROSS, CHANGED, SIDES, WITHIN, CheckpointEvidence
from saelens_ext.evals.replicas import all_matches
from saelens_ext.host.flat_sae import encode_flat, hooks_of
from saelens_ext.host.models import HostModel
from saelens_ext.ops.modes import standard_modes
from saelens_ext.ops.precision import wide

REFERENCE_QUANTILE = 0.05
"""A latent persists if its cosine across is above this quantile of those between replicas of its side."""
_ROUNDING = 1e-6
_ROWS = 4096

Replica = SAE[Any] | ExemplarFitResult | Tensor


@standard_modes(gradients=False)
def compare_checkpoints(
    first: Mapping[str, Replica],
    second: Mapping[str, Replica],
    *,
    models: Sequence[HostModel] | None = None,
    texts: Sequence[str] | None = None,
    center: Center = "own",
    null: Null = "directions",
    level: float = 0.95,
    n_permutations: int = 10_000,
    confidence: float | int = 0.95,
    seed: int = 0,
) -> CheckpointEvidence:
    """Say which directions of a dictionary persist from one model to another, and which are dropped or introduced.

    A direction says nothing about training that is not even found again when the same dictionary is built anew. So
    each side comes in replicas, and a latent is

    - *reproducible* if its nearest direction in every other replica of its side is nearer than chance;
    - *persisted* if it is reproducible, and its cosine across (the median over the other side's replicas) is nearer
      than chance and at least the 5% quantile of the cosines between replicas of its side, among reproducible latents
      in the same quintile of log10(N c^2);
    - *dropped* (of the first side) or *introduced* (of the second) if it is reproducible, below that quantile, and
      farther from every replica of the other side than from every one of its own, which of 4 + 4 replicas alike
      happens to 1 latent in 35;
    - *undecided* otherwise.

    With 3 or more replicas, every replica is also held out and takes the place of the other side: how many latents
    would be called changed though nothing was trained. That is more than between two sides of as many replicas, as
    fewer replicas have to agree.

    Args:
        first: at least 2 replicas by name: dictionaries of any kind, results of fits, or directions ``(k, d)``. Without
            fits on a side, all its latents are one group instead of quintiles.
        second: those of the other model, of the same width.
        models: both models, with ``texts``: how far the regions (or strongest latents) of the two sides agree on the
            same tokens, as adjusted mutual information, beside the agreement within a side.
        texts: texts to read with both models.
        center: as for :func:`~saelens_ext.analysis.match.match_dictionaries`, as the two that follow.
        null: what chance is.
        level: fraction of chance's best cosines that the cutoff is above, in (0, 1).
        n_permutations: assignments of replicas to sides in the test of drift; all of them if there are no more.
        confidence: of the intervals, in (0, 1).
        seed: of the null and the permutations.

    Raises:
        ValueError: fewer than 2 replicas on a side, other widths, models without texts or texts without models, models
            that tokenise the texts differently, or as :func:`~saelens_ext.analysis.match.match_dictionaries`.

    Examples:
        >>> fits = {str(seed): sx.fit_exemplar_partition(stream, percentile=20) for seed in range(2)}
        >>> found = sx.compare_checkpoints(fits, fits)
        >>> set(found.latents["state"]) == {"persisted"}  # a model does not differ from itself
        True

    Source: the comparison of base and instruct models of arXiv 2605.14347, which matches one dictionary of each at a
    fixed cosine of 0.7, inside the noise between seeds; replicas, states and the test of drift are ours.
    """
    sides = _sides(first, second)
    saes = {key: one.dictionary if isinstance(one, ExemplarFitResult) else one for key, one in sides.items()}
    agreement = _agreement(saes, models, texts)
    matches = all_matches(saes, center=center, null=null, level=level, one_to_one=False, seed=seed)
    rows, cells = [], []
    for side in SIDES:
        table, figures = _judged(side, [key for key in sides if key[0] == side], sides, matches)
        rows.append(table)
        cells += figures
    keys = list(sides)
    cosines = torch.full((len(keys), len(keys)), torch.nan, dtype=torch.float64)
    for (own, other), match in matches.items():
        cosines[keys.index(own), keys.index(other)] = match.cosine.nanmedian()
    pairs = {"median_cosine": cosines} | ({} if agreement is None else {"agreement": agreement})
    cells += [cell for metric, values in pairs.items() for cell in _pair_cells(keys, metric, values)]
    return CheckpointEvidence(
        cells=pd.DataFrame(cells),
        kinds={ACROSS: "unsupervised", WITHIN: "control"},
        descriptions={
            ACROSS: "Each replica, looked for in the replicas of the other side.",
            WITHIN: "Each replica, looked for in the other replicas of its own side: what a seed alone changes. States "
            "are those with one own replica held out in the place of the other side.",
        },
        settings={
            "center": center, "null": null, "level": level, "confidence": confidence, "seed": seed,
            "n_permutations": n_permutations, "n_texts": 0 if texts is None else len(texts),
        },
        latents=pd.concat(rows, ignore_index=True),
        replicas=tuple(keys),
        pairs=pairs,
    )  # fmt: skip


def _sides(first: Mapping[str, Replica], second: Mapping[str, Replica]) -> dict[tuple[str, str], Replica]:
    for name, given in zip(SIDES, (first, second)):
        if len(given) < 2:
            raise ValueError(
                f"{name} has {len(given)} replicas; give at least 2 by name, or nothing says what a seed alone "
                "changes. Build another from the same stream in another order (shuffle_seed)."
            )
    return {(side, str(name)): one for side, given in zip(SIDES, (first, second)) for name, one in given.items()}


# --- states ---


def _judged(
    side: str, keys: Sequence[Any], sides: Mapping[Any, Replica], matches: Mapping[Any, SideMatch]
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """State of every latent of one side, and the shares of states per replica."""
    foreign = [key for key in sides if key[0] != side]
    own = {key: [matches[key, other] for other in keys if other != key] for key in keys}
    quintiles = _quintiles([sides[key] for key in keys], [len(own[key][0].cosine) for key in keys])
    limits = torch.full((5,), torch.nan, dtype=torch.float64)
    groups = torch.cat([quintile[_reproducible(own[key])] for key, quintile in zip(keys, quintiles)])
    cosines = torch.cat(
        [torch.stack([match.cosine for match in own[key]], dim=1)[_reproducible(own[key])] for key in keys]
    )
    for quintile in groups.unique():
        limits[quintile] = cosines[groups == quintile].quantile(REFERENCE_QUANTILE)
    tables, cells = [], []
    for key, quintile in zip(keys, quintiles):
        across = [matches[key, other] for other in foreign]
        states = _states(side, own[key], across, limits[quintile])
        best = torch.stack([match.cosine for match in across]).nan_to_num(-2).argmax(dim=0)
        nearest = torch.stack([match.nearest for match in across]).gather(0, best[None])[0]
        tables.append(
            pd.DataFrame(
                {
                    "side": side, "replica": key[1], "latent": range(len(states)), "quintile": quintile.numpy() + 1,
                    "state": states, "own": torch.stack([match.cosine for match in own[key]]).mean(dim=0).numpy(),
                    "across": _median([match.cosine for match in across]).numpy(),
                    "other": [foreign[i][1] for i in best.tolist()], "nearest": nearest.numpy(),
                }
            )
        )  # fmt: skip
        cells += _shares(key, ACROSS, "all", states, own[key])
        for held_out in range(len(keys) - 1 if len(keys) > 2 else 0):
            kept = [match for place, match in enumerate(own[key]) if place != held_out]
            states = _states(side, kept, [own[key][held_out]], limits[quintile])
            cells += _shares(key, WITHIN, [other for other in keys if other != key][held_out][1], states, kept)
    return pd.concat(tables), cells


def _quintiles(replicas: Sequence[Replica], sizes: Sequence[int]) -> list[Tensor]:
    """Quintile of each latent's predictor among all of its side, 0 to 4; 0 for all where not every replica is a fit."""
    fits = [one for one in replicas if isinstance(one, ExemplarFitResult)]
    if len(fits) < len(replicas):
        return [torch.zeros(size, dtype=torch.int64) for size in sizes]
    values = [wide(fit.counts) * wide(fit.coherence).square() for fit in fits]
    edges = torch.cat(values).quantile(torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64))
    return [torch.searchsorted(edges, one.contiguous()) for one in values]


def _reproducible(own: Sequence[SideMatch]) -> Tensor:
    return torch.stack([match.above for match in own]).all(dim=0)


def _states(side: str, own: Sequence[SideMatch], across: Sequence[SideMatch], limits: Tensor) -> np.ndarray:
    reproducible = _reproducible(own)
    cosine = _median([match.cosine for match in across])
    nearer_than_chance = _median([match.cosine - match.cutoff for match in across]) > 0
    below = cosine < limits - _ROUNDING
    farther = torch.stack([match.cosine for match in across]).amax(dim=0) < torch.stack(
        [match.cosine for match in own]
    ).amin(dim=0)
    changed = reproducible & below & farther
    persisted = reproducible & ~below & nearer_than_chance
    states = np.full(len(cosine), "undecided", dtype=object)
    states[persisted.numpy()] = "persisted"
    states[changed.numpy()] = CHANGED[side]
    return states


def _median(columns: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(columns)).quantile(0.5, dim=0)


def _shares(key: Any, method: str, other: str, states: np.ndarray, own: Sequence[SideMatch]) -> list[dict[str, Any]]:
    values = {
        "share_changed": (states == CHANGED[key[0]]).mean(),
        "share_persisted": (states == "persisted").mean(),
        "share_reproducible": float(_reproducible(own).double().mean()),
    }
    where = {"side": key[0], "replica": " ".join(key), "method": method, "other": other}
    return [{**where, "metric": metric, "value": float(value)} for metric, value in values.items()]


def _pair_cells(keys: Sequence[Any], metric: str, values: Tensor) -> list[dict[str, Any]]:
    return [
        {
            "side": own[0], "replica": " ".join(own), "method": WITHIN if own[0] == other[0] else ACROSS,
            "other": other[1], "metric": metric, "value": float(values[i, j]),
        }
        for i, own in enumerate(keys) for j, other in enumerate(keys) if i != j
    ]  # fmt: skip


# --- the same tokens ---


def _agreement(
    saes: Mapping[Any, Any], models: Sequence[HostModel] | None, texts: Sequence[str] | None
) -> Tensor | None:
    """Adjusted mutual information of the regions that every two replicas put the same tokens in, ``(R, R)``."""
    if models is None and texts is None:
        return None
    if models is None or texts is None or len(models) != 2:
        raise ValueError(
            f"models and texts go together, got {0 if models is None else len(models)} models and "
            f"{'no texts' if texts is None else f'{len(texts)} texts'}; give both models, of the first and the second "
            "side, and texts, or neither."
        )
    labels, tokens = [], []
    for side, model in zip(SIDES, models):
        own = {key: one for key, one in saes.items() if key[0] == side}
        if any(isinstance(one, Tensor) for one in own.values()):
            raise ValueError(f"{side} holds bare directions, which assign no tokens; leave out models and texts.")
        hooks = {key: hooks_of(one)[0] for key, one in own.items()}
        read = read_texts(model, sorted(set(hooks.values())), texts)
        tokens.append(read.token_ids)
        labels += [strongest_latents(one, read.activations[hooks[key]]).numpy() for key, one in own.items()]
    if not torch.equal(*tokens):
        raise ValueError(
            "The models split the texts into different tokens; agreement on the same tokens needs one tokenizer."
        )
    found = torch.ones(len(labels), len(labels), dtype=torch.float64)
    for i, j in combinations(range(len(labels)), 2):
        found[i, j] = found[j, i] = float(adjusted_mutual_info_score(labels[i], labels[j]))
    return found


def strongest_latents(sae: SAE[Any], x: Tensor) -> Tensor:
    """The region of each activation, or where a dictionary has none the latent with the largest code: ``(n,)``."""
    if isinstance(sae, ExemplarPartition):
        return sae.assign(x.to(sae.W_dec)).regions.cpu()
    parts = [encode_flat(sae, rows.to(sae.W_dec)).argmax(dim=1).cpu() for rows in x.split(_ROWS)]
    return torch.cat(parts)
