"""Partitions of the same activations, with the documents in other random orders."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saelens_ext.activations.stream import ActivationStream
from saelens_ext.analysis.match import SideMatch, match_dictionaries
from saelens_ext.dictionaries.activation_matrix import ActivationSource
from saelens_ext.dictionaries.fit_exemplars import fit_exemplar_partition
from saelens_ext.dictionaries.fit_result import ExemplarFitResult

_ROWS = 4096


def replicas(
    x: Tensor, documents: Tensor, n: int, like: ExemplarFitResult | None, seed: Sequence[int], **options: Any
) -> dict[str, ExemplarFitResult]:
    """Partitions of the documents in random orders, by the number of the order, with one calibration for all.

    Args:
        x: activations ``(n, d)``.
        documents: the document of each, 0 and up, int64 ``(n,)``.
        n: orders.
        like: whose centre and threshold all have; by default those of the first order.
        seed: of the orders.
        **options: of :func:`~saelens_ext.dictionaries.fit_exemplars.fit_exemplar_partition`.
    """
    generator = np.random.default_rng(seed)
    fits: dict[str, ExemplarFitResult] = {}
    for number in range(n):
        places = torch.from_numpy(generator.permutation(int(documents.max()) + 1))
        rows = places[documents].argsort(stable=True)
        calibration: Any = "across_documents" if like is None else like
        fit = fit_exemplar_partition(
            x[rows.to(x.device)], document_ids=documents[rows], calibration=calibration, **options
        )
        like, fits[str(number)] = like or fit, fit
    return fits


def all_matches(replicas: Mapping[Any, Any], **options: Any) -> dict[tuple[Any, Any], SideMatch]:
    """What every replica finds in every other, by both; ``options`` are those of ``match_dictionaries``."""
    found: dict[tuple[Any, Any], SideMatch] = {}
    for own, other in combinations(replicas, 2):
        match = match_dictionaries(replicas[own], replicas[other], **options)
        found[own, other], found[other, own] = match.first, match.second
    return found


def read_all(source: ActivationStream | Tensor, document_ids: Tensor | None) -> tuple[Tensor, Tensor, str]:
    """All activations of one hook, ``(n, d)``; the document of each, from 0 without a gap; and the hook's name.

    ValueError: several hooks, documents given for a stream, or as many of them as a matrix has not.
    """
    given = ActivationSource.of(source, None, document_ids=document_ids, batch_size=_ROWS)
    batches = list(given.stream)
    documents = torch.cat([batch.document_ids for batch in batches]).cpu().unique(return_inverse=True)[1]
    return torch.cat([batch.activations[given.hook_name] for batch in batches]), documents, given.hook_name
