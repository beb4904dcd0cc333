"""Steering along a direction over prefix sources, and what it does to continuations.

The latents of largest weight are scaled by 1 + eps sign(w) at their own hooks and positions; what a dictionary does
not reconstruct is kept, nothing is frozen, and everything that comes after sees the change. The symbols are those of
`latents`.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np
import pandas as pd
from sae_lens import SAE
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.continuations.continuation_set import ContinuationSet
from saelens_ext.continuations.source_table import SourceTable
from saelens_ext.continuations.steering.generate import (
    Classifier,
    GenerationPlan,
    classify_generations,
    generate_steered,
    generated_texts,
)
from saelens_ext.continuations.steering.latents import LatentScaler, Setting, SteeringDirection, choose_latents
from saelens_ext.continuations.steering.passes import MEASURES, SteeredPasses
from saelens_ext.host.flat_sae import dictionaries_of
from saelens_ext.host.models import HostModel
from saelens_ext.ops.modes import standard_modes
from saelens_ext.steering.sampling import SamplingOptions

PAPER_STRENGTHS = (-1.0, -0.5, -0.1, 0.0, 0.1, 0.5, 1.0)
"""The published strengths, and 0."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SteeringResult:
    """What a direction did to continuations."""

    direction: SteeringDirection
    """Which latents were scaled, and what fraction of the direction's weight is on them."""
    strengths: tuple[float, ...]
    """eps, S of them, in the order given."""
    rows: tuple[int, ...]
    """Which continuations were measured, n of them."""
    baseline: dict[str, Tensor]
    """Each measure without steering, float64 ``(n,)``."""
    changes: dict[str, Tensor]
    """Its change at each strength, float64 ``(S, n)``; exactly 0 at strength 0. ``"demeaned_logit"``: mean over the
    continuation's tokens, each read where it is predicted; ``"mean_log_prob"`` and ``"log_prob"``: log-probability in
    nats, per token and in total."""
    generations: tuple[tuple[str, ...], ...] = ()
    """For each strength the open-ended samples, where they were asked for."""
    generation_labels: tuple[tuple[int, ...], ...] = ()
    """Their clusters, -1 without visible text, where a classifier was given."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row per continuation, strength and measure, with its change and its value without steering."""
        parts = []
        for measure, changes in self.changes.items():
            for strength, change in zip(self.strengths, changes, strict=True):
                where = {"row": list(self.rows), "strength": strength, "measure": measure}
                values = {"change": change.numpy(), "baseline": self.baseline[measure].numpy()}
                parts.append(pd.DataFrame(where | values))
        return pd.concat(parts, ignore_index=True)

    def generation_shares(self) -> pd.DataFrame:
        """Fraction of open-ended samples in each cluster: one row per strength and cluster.

        ValueError: nothing was generated, or no classifier was given.
        """
        if not self.generation_labels:
            raise ValueError("No sample was placed in a cluster; call steer_continuations with generate and classify.")
        labels = np.asarray(self.generation_labels)
        shares = [
            {"strength": strength, "cluster": int(name), "share": float((row == name).mean()), "n": len(row)}
            for strength, row in zip(self.strengths, labels, strict=True)
            for name in np.unique(labels)
        ]
        return pd.DataFrame(shares)


@standard_modes()
def steer_continuations(
    model: HostModel,
    dictionaries: SAE[Any] | Sequence[SAE[Any]],
    continuations: ContinuationSet,
    direction: SteeringDirection | Sequence[float | int] | np.ndarray | Tensor,
    *,
    top: int = 10,
    sign: str = "all",
    strengths: Sequence[float | int] = PAPER_STRENGTHS,
    rows: Sequence[SupportsIndex] | np.ndarray | Tensor | None = None,
    generate: int = 0,
    classify: Classifier | None = None,
    sampling: SamplingOptions | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> SteeringResult:
    """Scale the latents of a direction and measure continuations, at several strengths.

    Args:
        model: any TransformerLens model, no SAE attached; hooks of the user's act as well.
        dictionaries: those that the continuations were attributed with, in the same order.
        continuations: with ``sources``, from ``attribute_continuations``.
        direction: one weight per source, for example a row of ``continuations.signatures`` or a centre of them; or what
            ``choose_latents`` made of one, and then ``top`` and ``sign`` are not used.
        top: latents to scale at most. Sources of other kinds cannot be scaled and are skipped; the result's
            ``direction`` says what fraction of the weight is on latents.
        sign: scale latents of any sign (``"all"``), or of ``"positive"`` or ``"negative"`` weight alone.
        strengths: eps, one or more, finite. Activations are scaled by 1 + eps sign(w).
        rows: continuations to measure; all by default.
        generate: open-ended samples to draw at each strength, with the same random numbers for all.
        classify: from a set of generations to their clusters, see ``nearest_cluster``.
        sampling: how to generate; by default as the continuations were sampled, with another seed.
        batch_size: rows per forward pass. It bounds memory: logits of a batch's continuation tokens are held at once.
        progress: show a bar.

    Returns:
        Changes of all measures. They do not depend on the batch size beyond rounding.

    Raises:
        ValueError: a set without sources, no latent to scale, strengths that are empty or not finite, no such row,
            an unknown sign, dictionaries other than those of the attribution, or a place that cannot be edited.

    Source: arXiv 2606.08236, steering, measured where tokens are predicted.
    """
    saes = dictionaries_of(dictionaries)
    sources = sources_of_set(continuations)
    given = checked_strengths(strengths)
    _checks.positive(batch_size, "batch_size")
    chosen = list(range(len(continuations))) if rows is None else checked_rows(rows, len(continuations))
    plan = GenerationPlan.like(continuations, generate, sampling) if generate else None
    if not isinstance(direction, SteeringDirection):
        direction = choose_latents(sources, direction, top=top, sign=sign)
    scaler = LatentScaler(model, saes, sources)
    passes = SteeredPasses(model, scaler, continuations, batch_size)
    levels = [0.0, *dict.fromkeys(s for s in given if s != 0)]
    jobs = [(level, row) for level in range(len(levels)) for row in chosen]
    values = passes.measure([Setting(direction, level) for level in levels], jobs, progress=progress)
    values = values.reshape(len(levels), len(chosen), len(MEASURES))
    changes = values[[levels.index(s) for s in given]] - values[0]
    samples: dict[str, Any] = {}
    if plan is not None:
        settings = [Setting(direction, s) for s in given]
        drawn = generate_steered(model, scaler, continuations, settings, plan, batch_size=batch_size, progress=progress)
        texts = [generated_texts(model, continuations, part) for part in drawn]
        samples["generations"] = tuple(map(tuple, texts))
        if classify is not None:
            labels = [classify_generations(continuations, *pair, classify) for pair in zip(drawn, texts)]
            samples["generation_labels"] = tuple(tuple(part.tolist()) for part in labels)
    return SteeringResult(
        direction=direction,
        strengths=given,
        rows=tuple(chosen),
        baseline={name: values[0, :, i] for i, name in enumerate(MEASURES)},
        changes={name: changes[..., i] for i, name in enumerate(MEASURES)},
        **samples,
    )


# --- checks that validation shares ---


def sources_of_set(continuations: ContinuationSet) -> SourceTable:
    """The table of sources; ValueError without one."""
    if continuations.sources is None:
        raise ValueError("The continuations name no sources: use attribute_continuations or with_signatures.")
    return continuations.sources


def checked_strengths(strengths: Sequence[float | int]) -> tuple[float, ...]:
    """Strengths as floats; ValueError for none, or one that is not finite or there twice."""
    numbers = tuple(float(s) for s in strengths)
    if not numbers or not np.isfinite(numbers).all() or len(set(numbers)) < len(numbers):
        raise ValueError(f"strengths must be one or more different finite numbers, got {strengths!r}.")
    return numbers


def checked_rows(rows: Sequence[SupportsIndex] | np.ndarray | Tensor, n: int) -> list[int]:
    """Rows as a list; ValueError for none, or one beyond the set."""
    chosen = [operator.index(row) for row in rows]
    if not chosen or not all(0 <= row < n for row in chosen):
        raise ValueError(f"rows must be one or more of 0 to {n - 1}, got {list(rows)[:10]}.")
    return chosen
