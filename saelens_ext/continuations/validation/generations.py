"""Do open-ended samples go where a cluster's direction points: the fraction of them that fall in the cluster.

Symbols
    n     generations under each direction; the same random numbers for all, so that they are paired
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saelens_ext.continuations.continuation_set import ContinuationSet
from saelens_ext.continuations.steering.generate import (
    GenerationPlan,
    cluster_means,
    generate_steered,
    generated_texts,
    generation_set,
)
from saelens_ext.continuations.steering.latents import LatentScaler, Setting
from saelens_ext.continuations.validation.controls import Plan, PlannedDirection
from saelens_ext.continuations.validation.further import LEFT_OUT
from saelens_ext.host.models import HostModel
from saelens_ext.steering.sampling import Drawn

Embed = Callable[[ContinuationSet], ContinuationSet | None]
"""It may leave rows out, those that it sees no text in; None where it sees none anywhere."""

COLUMNS = ("prefix", "method", "cluster", "strength", "share", "unsteered", "n")


def generation_shares(
    model: HostModel,
    scaler: LatentScaler,
    continuations: ContinuationSet,
    plan: Plan,
    strength: float,
    generation: GenerationPlan,
    embed: Embed,
    *,
    batch_size: int,
    progress: bool,
) -> pd.DataFrame:
    """Fraction of generations whose nearest cluster, by meaning, is the one steered towards.

    Nearest among the clusters of the method's own partition; the one global direction is tried on each cluster under
    test.

    Returns:
        One row per method and cluster, with ``share`` at the strength and ``unsteered`` without steering, both of n
        generations; one without visible text falls nowhere.

    Raises:
        ValueError: an embedder of another width than the embeddings of the continuations.
    """
    keys = [planned.direction.key for planned in plan.directions]
    unique = [i for i, key in enumerate(keys) if keys.index(key) == i]
    settings = [Setting(plan.directions[i].direction, s) for i, s in ((0, 0.0), *((i, strength) for i in unique))]
    options = {"batch_size": batch_size, "progress": progress}
    drawn = generate_steered(model, scaler, continuations, settings, generation, **options)
    vectors = _embedded(model, continuations, [one for part in drawn for one in part], embed)
    parts = vectors.split(generation.n)
    found = []
    for planned, key in zip(plan.directions, keys):
        steered = parts[1 + unique.index(keys.index(key))]
        for partition, cluster in _targets(plan, planned):
            shares = [_share(continuations, partition, cluster, part) for part in (steered, parts[0])]
            found.append((continuations.prefix, planned.method, cluster, strength, *shares, generation.n))
    return pd.DataFrame(found, columns=list(COLUMNS))


def _targets(plan: Plan, planned: PlannedDirection) -> list[tuple[np.ndarray, int]]:
    """The partitions and clusters that a direction is judged by."""
    if planned.method != "global":
        return [(plan.labels[planned.method], planned.cluster)]
    return [(plan.labels["joint"], own.cluster) for own in plan.of("joint")]


def _share(continuations: ContinuationSet, partition: np.ndarray, cluster: int, vectors: Tensor) -> float:
    inside = (partition > LEFT_OUT) | (partition == cluster)
    if not inside.all():  # rows in no cluster are no place to fall in
        continuations, partition = continuations.select(inside), partition[inside]
    centers, names = cluster_means(continuations, partition)
    nearest = names[torch.cdist(vectors, centers).nan_to_num(nan=torch.inf).argmin(dim=1).numpy()]
    return float(((nearest == cluster) & ~vectors.isnan().any(dim=1).numpy()).mean())


def _embedded(model: HostModel, continuations: ContinuationSet, drawn: Sequence[Drawn], embed: Embed) -> Tensor:
    """One vector per generation, float64 ``(m, d_e)``, NaN without visible text; equal texts are embedded once."""
    assert continuations.embeddings is not None  # checked by validate_clusters
    texts = generated_texts(model, continuations, drawn)
    first = {text: i for i, text in reversed(list(enumerate(texts))) if text.strip()}
    vectors = torch.full((len(drawn), continuations.embeddings.shape[1]), torch.nan, dtype=torch.float64)
    if not first:
        return vectors
    chosen = list(first.values())
    made = embed(generation_set(continuations, [drawn[i] for i in chosen], [texts[i] for i in chosen]))
    if made is None:
        return vectors
    embedded = made.embeddings
    if embedded is None or embedded.shape[1] != vectors.shape[1]:
        raise ValueError(
            f"embed must give embeddings of width {vectors.shape[1]}, as the continuations have; give the embedder and "
            "mode that theirs were made with: embed=lambda s: embed_visible(s, embedder, mode=...), with embed_visible "
            "of saelens_ext.continuations.embed."
        )
    of_text = dict(zip(made.texts, embedded.double(), strict=True))
    for i, text in enumerate(texts):
        if text in of_text:
            vectors[i] = of_text[text]
    return vectors
