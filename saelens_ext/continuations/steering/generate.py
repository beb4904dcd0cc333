"""Open-ended samples of a prefix while latents of it are scaled, and which cluster each falls into.

Generation number i draws the same random numbers whatever the direction and strength, so that steered and unsteered
generations are paired and differ by the steering alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from saelens_ext import _checks
from saelens_ext.continuations.continuation_set import PADDING, ContinuationSet, pad_rows
from saelens_ext.continuations.embed import embed_continuations, visible_rows
from saelens_ext.continuations.steering.latents import LatentScaler, Setting
from saelens_ext.host.continued_text import text_after
from saelens_ext.host.hook_edits import hooked
from saelens_ext.host.models import HostModel
from saelens_ext.host.prompt_passes import device_of
from saelens_ext.ops.modes import evaluating
from saelens_ext.steering.sampling import Drawn, SamplingOptions, draw_continuations

Classifier = Callable[[ContinuationSet], Any]
"""From a set of generations to one whole number per row, the cluster that it falls into."""

NOTHING = -1
"""Label of a generation without text that is seen."""


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """How many generations to draw under each setting, and how."""

    n: int
    options: SamplingOptions
    stop: tuple[str, ...] = ()

    @classmethod
    def like(cls, continuations: ContinuationSet, n: int, options: SamplingOptions | None = None) -> "GenerationPlan":
        """As the continuations were sampled, or as ``options`` say, but with the next seed, to draw others.

        n per setting, at least 1; for sets not sampled here temperature 1, top-p 0.9 and their longest length.
        """
        _checks.positive(n, "generate")
        used = continuations.metadata.get("sampling", {})
        made = SamplingOptions(
            max_new_tokens=used.get("max_new_tokens", int(continuations.lengths.max())),
            temperature=used.get("temperature", 1.0),
            top_p=used.get("top_p", 0.9),
            top_k=None,
            seed=used.get("seed", 0) + 1,
        )
        return cls(n=n, options=options or made, stop=tuple(used.get("stop", ())))


def generate_steered(
    model: HostModel,
    scaler: LatentScaler,
    continuations: ContinuationSet,
    settings: Sequence[Setting],
    plan: GenerationPlan,
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> list[list[Drawn]]:
    """Draw generations of the prefix under each setting; n for each."""
    ids = torch.tensor(continuations.prefix_ids, device=device_of(model))
    jobs = [(setting, number) for setting in settings for number in range(plan.n)]
    drawn: list[Drawn] = []
    with evaluating(model):
        for first in tqdm(range(0, len(jobs), batch_size), desc="generating", unit="batch", disable=not progress):
            batch = jobs[first : first + batch_size]
            with hooked(model, scaler.hooks([setting for setting, _ in batch])):
                drawn += draw_continuations(model, ids, [number for _, number in batch], plan.options, stop=plan.stop)
    return [drawn[first : first + plan.n] for first in range(0, len(drawn), plan.n)]


def generated_texts(model: HostModel, continuations: ContinuationSet, drawn: Sequence[Drawn]) -> list[str]:
    """The texts of generations as they read behind the prefix."""
    return [text_after(model, continuations.prefix_ids, one.token_ids) for one in drawn]


def classify_generations(
    continuations: ContinuationSet, drawn: Sequence[Drawn], texts: Sequence[str], classify: Classifier
) -> Tensor:
    """The cluster of each generation, int64 ``(n,)``; `NOTHING` where there is no visible text.

    ValueError: the classifier gives another number of labels than it got rows, or no whole numbers.
    """
    labels = torch.full((len(drawn),), NOTHING)
    seen = [i for i, text in enumerate(texts) if text.strip()]
    if not seen:
        return labels
    names = np.asarray(classify(generation_set(continuations, [drawn[i] for i in seen], [texts[i] for i in seen])))
    if names.shape != (len(seen),) or not np.issubdtype(names.dtype, np.integer):
        kind = f"{names.dtype} of shape {names.shape}"
        raise ValueError(f"classify must give one whole number per generation, ({len(seen)},), got {kind}.")
    labels[seen] = torch.as_tensor(names.astype(np.int64))
    return labels


def generation_set(continuations: ContinuationSet, drawn: Sequence[Drawn], texts: Sequence[str]) -> ContinuationSet:
    """Generations as a set of their own, of the same prefix, equally weighted and without views."""
    return replace(
        continuations,
        token_ids=pad_rows([one.token_ids for one in drawn], PADDING, torch.int64),
        lengths=torch.tensor([len(one.token_ids) for one in drawn]),
        texts=tuple(texts),
        log_probs=pad_rows([one.log_probs for one in drawn], 0.0, torch.float32),
        weights=torch.full((len(drawn),), 1 / len(drawn), dtype=torch.float64),
        embeddings=None,
        signatures=None,
        sources=None,
        columns={},
        metadata={},
    )


def nearest_cluster(
    continuations: ContinuationSet,
    labels: Sequence[int] | np.ndarray,
    embedder: Any = None,
    *,
    mode: str = "contextual",
) -> Classifier:
    """A classifier by meaning alone: the cluster whose mean embedding is nearest.

    What causes a generation is what steering changes, so a generation is placed by what it says; one in which the
    embedder sees no text falls in none, `NOTHING`. ``labels`` are the clusters of the rows ``(n,)``; ``embedder`` and
    ``mode`` are what made the embeddings, see ``embed_continuations``.

    Raises:
        ValueError: a set without embeddings, or labels of another length; when it is used, an embedder of another
            width.
    """
    centers, names = cluster_means(continuations, labels)

    def classify(generations: ContinuationSet) -> np.ndarray:
        found = np.full(len(generations), NOTHING)
        seen = visible_rows(generations, embedder).numpy()
        if not seen.any():
            return found
        vectors = embed_continuations(generations.select(seen), embedder, mode=mode).embeddings
        assert vectors is not None
        if vectors.shape[1] != centers.shape[1]:
            raise ValueError(
                f"The embedder gives vectors of width {vectors.shape[1]}, and the continuations' embeddings have width "
                f"{centers.shape[1]}; give the embedder and mode that they were made with."
            )
        found[seen] = names[torch.cdist(vectors.double(), centers).argmin(dim=1).numpy()]
        return found

    return classify


def cluster_means(continuations: ContinuationSet, labels: Sequence[int] | np.ndarray) -> tuple[Tensor, np.ndarray]:
    """Weighted mean embedding of each cluster, float64 ``(K, d_e)``, and the clusters' labels ``(K,)``."""
    if continuations.embeddings is None:
        raise ValueError("The continuations have no embeddings; make them with embed_continuations first.")
    entries = np.asarray(labels)
    if entries.shape != (len(continuations),):
        raise ValueError(f"labels must have shape ({len(continuations)},), one per continuation, got {entries.shape}.")
    names = np.unique(entries)
    vectors, weights = continuations.embeddings.double(), continuations.weights
    members = [torch.as_tensor(entries == name) for name in names]
    means = [(weights[m, None] * vectors[m]).sum(dim=0) / weights[m].sum() for m in members]
    return torch.stack(means), names
