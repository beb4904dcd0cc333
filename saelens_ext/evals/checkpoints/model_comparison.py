"""Two models compared by the regions of their activations on the same texts: which are lost and gained by training.

Symbols
    side    "first": the base model; "second": the tuned one
    replica a partition of a side's activations, with the documents in another random order
    state   of a region, as :func:`compare_checkpoints` gives it: persisted, dropped, introduced or undecided
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from saelens_ext import _checks
from saelens_ext.activations.kept_stream import KeptStream
from saelens_ext.activations.stream import ActivationBatch, ActivationStream
from saelens_ext.analysis.labels import label_latents
from saelens_ext.analysis.profile import DictionaryProfile, profile_dictionary
from saelens_ext.concepts.token_activations import Positions, read_texts
from saelens_ext.dictionaries.fit_result import ExemplarFitResult
from saelens_ext.evals.checkpoints.checkpoint_evidence import CHANGED, SIDES, CheckpointEvidence
from saelens_ext.evals.checkpoints.checkpoints import compare_checkpoints
from saelens_ext.evals.checkpoints.prompt_shift import TEXTS, PromptShift, Reading, prompt_shift
from saelens_ext.evals.evidence import evidence_table
from saelens_ext.evals.replicas import replicas
from saelens_ext.host.chat_template import Prompt
from saelens_ext.host.models import HostModel, tokenizer_of
from saelens_ext.ops.modes import standard_modes
from saelens_ext.ops.precision import wide
from saelens_ext.report.evidence_report import write_evidence_report

Calibrated = Literal["base", "own"]
_CONTEXTS = 5
_REGIONS_SHOWN = 20


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelComparison:
    """What :func:`compare_models` found."""

    checkpoints: CheckpointEvidence
    """Which regions persist, are dropped and are introduced, and whether the models differ more than seeds do."""
    fits: dict[str, dict[str, ExemplarFitResult]]
    """By side, "first" (base) and "second" (tuned), its replicas by name, "0" the first."""
    profiles: dict[str, DictionaryProfile]
    """By side, what the regions of its replica "0" hold, with their contexts."""
    shift: PromptShift
    """How many positions of texts and prompts lie in introduced and dropped regions, with both models."""
    tokenizer: PreTrainedTokenizerBase
    """Of the base model."""

    def gained(self) -> pd.DataFrame:
        """The introduced regions of the tuned model's replica "0", the largest first.

        Returns:
            One row per region: "latent", "members", "own" (mean cosine with the nearest region of the side's other
            replicas), "across" (median cosine with the nearest of the other side), "label" and "contexts", the member
            tokens nearest to the exemplar with what is around them.
        """
        return self._changed[SIDES[1]].copy()

    def lost(self) -> pd.DataFrame:
        """The dropped regions of the base model's replica "0", as :meth:`gained`."""
        return self._changed[SIDES[0]].copy()

    def matched_pairs(self, n: int = _REGIONS_SHOWN) -> pd.DataFrame:
        """Persisted regions of the base model's replica "0" beside the nearest of the tuned model's, the largest first.

        Args:
            n: at most so many.

        Returns:
            One row per region: "latent" and "nearest" (of the tuned model's replica "0"), "members" of either, "cosine"
            of their directions, "across" as in :meth:`gained`, "label" and "nearest_label", "contexts" and
            "nearest_contexts".
        """
        rows = self._states(SIDES[0], "persisted")
        counts = [self.profiles[side].counts for side in SIDES]
        rows = rows.assign(members=counts[0][rows["latent"].tolist()].tolist())
        rows = rows.sort_values("members", ascending=False, kind="stable").head(_checks.positive(n, "n"))
        first, second = (wide(self.fits[side]["0"].dictionary.exemplars.detach()).cpu() for side in SIDES)
        latents = rows["latent"].tolist()
        cosines, nearest = (first[latents] @ second.T).max(dim=1)
        told = [self._described(*pair) for pair in zip(SIDES, (latents, nearest.tolist()))]
        columns = {
            "latent": latents, "members": rows["members"].tolist(), "nearest": nearest.tolist(),
            "nearest_members": counts[1][nearest].tolist(), "cosine": cosines.tolist(),
            "across": rows["across"].tolist(), "label": told[0]["label"], "nearest_label": told[1]["label"],
            "contexts": told[0]["contexts"], "nearest_contexts": told[1]["contexts"],
        }  # fmt: skip
        return pd.DataFrame(columns)

    def verdict(self) -> str:
        """Whether the models differ, how many regions changed, and whether texts and prompts lie in them."""
        return f"{self.checkpoints.verdict()}\n{self.shift.verdict()}"

    def save_html(self, path: str | Path) -> Path:
        """Write the comparison as one page: states, regions lost and gained with contexts, and shifts of prompts."""
        section, shown = self.checkpoints.section(), f"the largest {_REGIONS_SHOWN}"
        parts = [
            (f"Regions {CHANGED[side]}", table, f"Replica 0 of the {side} side, {shown} of {len(table)}.")
            for side, table in ((SIDES[1], self.gained()), (SIDES[0], self.lost()))
        ]
        note = f"Persisted regions of replica 0 of the first side beside the nearest of the second, {shown}."
        parts.append(("Matched regions side by side", self.matched_pairs(), note))
        tables = [
            evidence_table(title, _joined_contexts(table).head(_REGIONS_SHOWN), note) for title, table, note in parts
        ]
        sections = [replace(section, tables=(*tables, *section.tables)), self.shift.section()]
        about = {"hook": self.profiles[SIDES[0]].hook_name}
        return write_evidence_report(path, sections, about=about, title="Two models compared")

    @cached_property
    def _changed(self) -> dict[str, pd.DataFrame]:
        """By side, the regions that are not on the other: labels take long, and are made once."""
        found = {}
        for side in SIDES:
            rows = self._states(side, CHANGED[side])
            latents = rows["latent"].tolist()
            columns = {
                "latent": latents,
                "members": self.profiles[side].counts[latents].tolist(),
                "own": rows["own"].to_numpy(),
                "across": rows["across"].to_numpy(),
            }
            table = pd.DataFrame(columns | self._described(side, latents))
            found[side] = table.sort_values("members", ascending=False, kind="stable").reset_index(drop=True)
        return found

    def _states(self, side: str, state: str) -> pd.DataFrame:
        rows = self.checkpoints.latents
        return rows[(rows["side"] == side) & (rows["replica"] == "0") & (rows["state"] == state)]

    def _described(self, side: str, latents: list[int]) -> dict[str, list[Any]]:
        """Labels and contexts of regions of a side's replica "0"."""
        profile = self.profiles[side]
        labels = label_latents(profile, self.tokenizer, latents=sorted(set(latents)), n_null=1) if latents else {}
        return {
            "label": [labels[latent].text for latent in latents],
            "contexts": [self._contexts(profile, latent) for latent in latents],
        }

    def _contexts(self, profile: DictionaryProfile, latent: int) -> list[str]:
        found = profile.contexts(latent, self.tokenizer, n=_CONTEXTS)
        return [f"{row.before}⟦{row.token}⟧{row.after}" for row in found.itertuples()]


def _joined_contexts(table: pd.DataFrame) -> pd.DataFrame:
    """The table with contexts as one text, as a page shows them."""
    names = [name for name in table.columns if name.endswith("contexts")]
    return table.assign(**{name: [" | ".join(texts) for texts in table[name]] for name in names})


@standard_modes(gradients=False)
def compare_models(
    base: HostModel,
    tuned: HostModel,
    texts: Any,
    *,
    hook_name: str,
    prompts: Mapping[str, Sequence[Prompt]] | None = None,
    positions: Positions = "last",
    chat_template: bool = False,
    chat_template_options: Mapping[str, Any] | None = None,
    percentile: float | int = 10.0,
    calibration: Calibrated = "base",
    n_replicas: int = 4,
    context_size: int = 128,
    max_tokens: int | None = None,
    batch_size: int = 16,
    level: float = 0.95,
    confidence: float | int = 0.95,
    seed: int = 0,
    progress: bool = False,
) -> ModelComparison:
    """Find which regions of activations training added to a model or took away (model diffing).

    Both models read the same texts, once each. Of the activations at one hook, each side gets ``n_replicas``
    partitions, which differ in the random order of the documents; no order is used on both sides.
    :func:`compare_checkpoints` then tells what training changed from what an order changes.

    Args:
        base: the model before training.
        tuned: the model after it, of the same width, with the same tokenizer.
        texts: a dataset as for :class:`~saelens_ext.activations.stream.ActivationStream`. Regions form only around what
            is in it: include text of the kind that training was about.
        hook_name: where to read both.
        prompts: lists of prompts by name, other than ``texts``: whether their positions move into introduced regions;
            texts or conversations, as for :func:`~saelens_ext.read_texts`.
        positions: which positions of prompts: "last", "content" or "all", as for :func:`~saelens_ext.read_texts`.
        chat_template: make each text among the prompts a user's message.
        chat_template_options: passed to the chat template.
        percentile: of the pairwise distances within which an activation joins a region.
        calibration: "base": centre and threshold of both sides are those of the base model's first replica, so that
            partitions differ by activations alone; "own": each side has its own. Replicas of a side share theirs.
        n_replicas: per side, at least 2; with fewer than 4 no test of drift can be significant.
        context_size: tokens in a window.
        max_tokens: activations to read; all by default.
        batch_size: windows, or prompts, in a forward pass.
        level: fraction of chance's best cosines that a match must be above.
        confidence: of the intervals.
        seed: of the orders, the null and the resampling.
        progress: show progress bars.

    Raises:
        ValueError: fewer than 2 replicas, models that read other tokens or have other widths, no prompts under a name,
            a name that is taken, and as for fits, streams and :func:`compare_checkpoints`.

    Examples:
        >>> found = sx.compare_models(
        ...     model, model, texts, hook_name="blocks.1.hook_out", percentile=20, n_replicas=2, context_size=32
        ... )
        >>> set(found.checkpoints.latents["state"]) <= {"persisted", "undecided", "dropped", "introduced"}
        True

    Source: the comparison of base and instruct models of arXiv 2605.14347, by one dictionary each.
    """
    _checks.choice(calibration, get_args(Calibrated), "calibration")
    if _checks.positive(n_replicas, "n_replicas") < 2:
        raise ValueError(f"n_replicas must be at least 2, got {n_replicas}: one says nothing of what an order changes.")
    for name, listed in (prompts or {}).items():
        if name == TEXTS or not listed:
            raise ValueError(f"prompts[{name!r}] must hold a prompt, and be named other than {TEXTS!r}.")
    options: dict[str, Any] = {"context_size": context_size, "batch_size": batch_size, "max_tokens": max_tokens}
    kept = [
        KeptStream(ActivationStream(model, texts, hook_name, progress=progress, **options)) for model in (base, tuned)
    ]
    joined = [_reading(ActivationBatch.join(list(stream))) for stream in kept]
    if not torch.equal(joined[0].token_ids, joined[1].token_ids):
        raise ValueError("The models split the texts into different tokens; a comparison needs one tokenizer.")
    fits: dict[str, dict[str, ExemplarFitResult]] = {}
    for number, (side, read) in enumerate(zip(SIDES, joined)):
        like = fits[SIDES[0]]["0"] if number and calibration == "base" else None
        options = {"percentile": percentile, "hook_name": hook_name}
        fits[side] = replicas(read.x, read.documents, n_replicas, like, [seed, number], **options)
    checkpoints = compare_checkpoints(*fits.values(), level=level, confidence=confidence, seed=seed)
    how: dict[str, Any] = {"positions": positions, "batch_size": batch_size}
    how |= {"chat_template": chat_template, "chat_template_options": chat_template_options}
    readings = {TEXTS: joined} | {
        name: [_reading(read_texts(model, hook_name, listed, **how)) for model in (base, tuned)]
        for name, listed in (prompts or {}).items()
    }
    return ModelComparison(
        checkpoints=checkpoints,
        fits=fits,
        profiles={
            side: profile_dictionary(fits[side]["0"].dictionary, stream, hook_name=hook_name)
            for side, stream in zip(SIDES, kept)
        },
        shift=prompt_shift(fits, checkpoints, readings, confidence=confidence, seed=seed),
        tokenizer=tokenizer_of(base),
    )


def _reading(batch: ActivationBatch) -> Reading:
    (x,) = batch.activations.values()
    return Reading(x, batch.token_ids, batch.document_ids)
