"""What the page's script works on: every region of a dictionary as plain JSON, texts as indices into one vocabulary.

Symbols
    K   regions, rows of every list
    v   index into ``vocabulary``; the commonest tokens have the smallest, which keeps the page small
Distances are cosine distances in [0, 2]. Figures that do not exist are null.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from saelens_ext._files import json_safe
from saelens_ext.analysis.labels import Labels
from saelens_ext.analysis.logit_lens import LensResult
from saelens_ext.analysis.profile import DictionaryProfile, Examples
from saelens_ext.dictionaries.fit_result import ExemplarFitResult, Provenance
from saelens_ext.host.tokens import token_strings
from saelens_ext.report.format import visible
from saelens_ext.report.projection import Projection, project

CONTEXT_REACH = 64
"""Tokens shown on either side of an exemplar: a whole window of the usual 128, but not all of a window of 8,192."""
N_NEIGHBOURS = 6
"""Nearest other regions shown for each region."""


class Vocabulary:
    """The distinct tokens of a page, commonest first."""

    def __init__(self, ids: Iterable[Tensor]) -> None:
        flat = np.concatenate([tensor.reshape(-1).numpy().astype(np.int64) for tensor in ids])
        self._ids, counts = np.unique(flat[flat >= 0], return_counts=True)
        order = np.argsort(-counts, kind="stable")
        self._rank = np.empty(len(order), dtype=np.int64)
        self._rank[order] = np.arange(len(order))
        self.token_ids: list[int] = self._ids[order].tolist()

    def indices(self, ids: Tensor) -> list[Any]:
        """The indices of token ids, nested as the tensor is; the innermost lists leave out padding (negative ids)."""
        array = ids.cpu().numpy()
        ranks = self._rank[np.searchsorted(self._ids, np.maximum(array, self._ids[0]))]
        return _without_padding(np.where(array >= 0, ranks, -1).tolist())


def _without_padding(nested: list[Any]) -> list[Any]:
    if nested and isinstance(nested[0], list):
        return [_without_padding(part) for part in nested]
    return [index for index in nested if index >= 0]


def token_ids(examples: Examples, lens: LensResult | None) -> list[Tensor]:
    """The tokens that are shown of latents, on the CPU."""
    return [examples.contexts, *([] if lens is None else [lens.promoted_ids.cpu(), lens.suppressed_ids.cpu()])]


def region_data(
    fit: ExemplarFitResult,
    profile: DictionaryProfile,
    lens: LensResult | None,
    tokenizer: PreTrainedTokenizerBase,
    labels: Labels | None = None,
) -> dict[str, Any]:
    """Everything the page shows of the K regions of one dictionary, JSON-safe.

    ``fit`` says where its exemplars came from, ``lens`` is the logit lens of its exemplars, K rows.
    """
    ids = [fit.provenance.windows, fit.provenance.token_ids, *token_ids(profile.top, lens)]
    ids += [profile.boundary.contexts] if profile.boundary is not None else []
    vocabulary = Vocabulary(ids)
    neighbours, distances = nearest_others(_exemplars(fit), N_NEIGHBOURS)
    return {
        "n_profiled": profile.n_activations,
        "n_seen": fit.n_seen,
        "context": profile.context,
        "threshold": json_safe(fit.threshold.threshold, 6),
        "vocabulary": token_strings(tokenizer, vocabulary.token_ids),
        **map_columns(project(_exemplars(fit).numpy().astype(np.float64))),
        "labels": label_column(labels),
        "members": profile.counts.tolist(),
        "joined": fit.counts.tolist(),
        "started": fit.exemplar_indices.tolist(),
        "coherence": json_safe(profile.coherence, 6) or [None] * len(profile.counts),
        "mean_distance": json_safe(profile.mean_distance, 6) or [None] * len(profile.counts),
        "max_distance": json_safe(profile.max_distance, 6) or [None] * len(profile.counts),
        "neighbours": neighbours.tolist(),
        "neighbour_distances": json_safe(distances, 6),
        "exemplars": _exemplar_contexts(fit.provenance, vocabulary),
        "nearest": example_columns(profile.top, vocabulary),
        "boundary": example_columns(profile.boundary, vocabulary) if profile.boundary is not None else None,
        "lens": lens_columns(lens, vocabulary) if lens is not None else None,
    }


def _exemplars(fit: ExemplarFitResult) -> Float[Tensor, "k d"]:
    return fit.dictionary.exemplars.detach().float().cpu()


def nearest_others(
    directions: Float[Tensor, "k d"], n: int, *, max_entries: int = 8_000_000
) -> tuple[Int[Tensor, "k m"], Float[Tensor, "k m"]]:
    """The ``m = min(n, k - 1)`` nearest other rows of each unit row, nearest first, and their cosine distances.

    At most ``max_entries`` similarities are held at a time.
    """
    k = len(directions)
    n = min(n, k - 1)
    indices, distances = torch.zeros(k, n, dtype=torch.int64), torch.zeros(k, n)
    step = max(1, max_entries // k)
    for start in range(0, k, step):
        rows = torch.arange(start, min(k, start + step))
        similarity = directions[rows] @ directions.T
        similarity[torch.arange(len(rows)), rows] = -torch.inf
        best = similarity.topk(n, dim=1)
        indices[rows], distances[rows] = best.indices, (1 - best.values).clamp(0, 2)
    return indices, distances


def _exemplar_contexts(provenance: Provenance, vocabulary: Vocabulary) -> dict[str, list[Any]]:
    """Each exemplar's token, place and surroundings, its own token at index ``mark`` of ``tokens``."""
    positions = provenance.positions
    starts = (positions - CONTEXT_REACH).clamp(min=0)
    reach = starts[:, None] + torch.arange(2 * CONTEXT_REACH + 1)
    shown = (reach <= positions[:, None] + CONTEXT_REACH) & (reach < provenance.windows.shape[1])
    windows = provenance.windows.gather(1, reach.clamp(max=provenance.windows.shape[1] - 1))
    lengths = (provenance.windows >= 0).sum(dim=1)
    return {
        "token": vocabulary.indices(provenance.token_ids),
        "document": provenance.document_ids.tolist(),
        "window": provenance.sequence_ids.tolist(),
        "position": positions.tolist(),
        "tokens": vocabulary.indices(torch.where(shown, windows, -1)),
        "mark": (positions - starts).tolist(),
        "cut_before": (starts > 0).tolist(),
        "cut_after": (lengths > positions + CONTEXT_REACH + 1).tolist(),
    }


def map_columns(projection: Projection) -> dict[str, Any]:
    """Where each latent lies on the map, and how it got there."""
    return {
        "projection": {"name": projection.name, "caution": projection.caution},
        "x": json_safe(projection.points[:, 0], 4),
        "y": json_safe(projection.points[:, 1], 4),
    }


def label_column(labels: Labels | None, rows: Sequence[int] | None = None) -> list[dict[str, Any]] | None:
    """Each latent's label, its score in words, and whether it detects members at all; None without labels."""
    if labels is None:
        return None
    chosen = [labels[latent] for latent in (range(len(labels)) if rows is None else rows)]
    return [
        {
            "text": visible(one.text),
            "output": visible(one.output),
            "score": one.score_text,
            "sure": one.distinguishes,
            "auroc": json_safe(one.auroc, 3),
        }
        for one in chosen
    ]


def example_columns(examples: Examples, vocabulary: Vocabulary) -> list[dict[str, list[Any]]]:
    """For each region the columns of its examples in order, empty places left out."""
    half = examples.contexts.shape[2] // 2
    columns = {
        "document": examples.document_ids.tolist(),
        "position": examples.positions.tolist(),
        "mark": (examples.contexts[:, :, :half] >= 0).sum(dim=2).tolist(),
        "distance": json_safe(examples.values, 6),
        "tokens": vocabulary.indices(examples.contexts),
    }
    kept = [[i for i, position in enumerate(row) if position >= 0] for row in columns["position"]]
    return [
        {name: [column[region][i] for i in places] for name, column in columns.items()}
        for region, places in enumerate(kept)
    ]


def lens_columns(lens: LensResult, vocabulary: Vocabulary) -> dict[str, list[Any]]:
    """Tokens that each exemplar promotes and suppresses, with their logits, strongest first."""
    return {
        "promoted": vocabulary.indices(lens.promoted_ids),
        "promoted_logits": json_safe(lens.promoted_logits, 6),
        "suppressed": vocabulary.indices(lens.suppressed_ids),
        "suppressed_logits": json_safe(lens.suppressed_logits, 6),
    }
