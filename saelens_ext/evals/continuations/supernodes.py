"""Latents that act together over prompts, and whether they follow what an entity does or what it is called.

Symbols
    f          a feature: a latent of a dictionary, whatever its position
    p          a prompt with two names; its swapped twin has them the other way round, the same tokens elsewhere
    r          a role: the place of the first name, or of the second
    S          a supernode: features whose effects rise and fall together over prompts
    e[S, r]    effect of S at the tokens of r: mean over continuations of the sum of its columns there, in logits;
               e'[S, r] is that of the twin on the same continuations

If S follows the role, e'[S, r] = e[S, r]; if it follows the name, e'[S, r] = e[S, other r]. The score of a prompt is

    sum over S, r of (e' - (e_role + e_name) / 2) (e_role - e_name) / 2,  over the sum of ((e_role - e_name) / 2)^2,

which is 1 where all follow the role, -1 where all follow the name, and 0 half way.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd

from saelens_ext import _checks, _files
from saelens_ext.continuations.attribution.attribute import attribute_continuations
from saelens_ext.continuations.audit_stages.config import AuditConfig
from saelens_ext.continuations.audit_stages.questions import Question
from saelens_ext.continuations.audit_stages.stages import sampled
from saelens_ext.continuations.clustering.baselines import SingleView
from saelens_ext.continuations.continuation_set import ContinuationSet
from saelens_ext.continuations.subject import Dictionaries, Inputs, Model, Sampling, Subject
from saelens_ext.evals.attempts import Attempts
from saelens_ext.evals.continuations.clusterings import check_prefixes
from saelens_ext.evals.evidence import Evidence, evidence_table
from saelens_ext.evals.over_units import Measured, OverUnits, whole
from saelens_ext.evals.sweep_store import SweepStore
from saelens_ext.host.chat_template import Prompt, checked_messages, in_words
from saelens_ext.ops.modes import standard_modes
from saelens_ext.report.evidence_section import EvidenceTable

SUPERNODES, SHUFFLED, SINGLE, HALFWAY = "supernodes", "shuffled", "single latents", "half way"
_DESCRIPTIONS = {
    SUPERNODES: "Latents grouped by how their effects rise and fall over prompts.",
    SHUFFLED: "Groups of the same sizes with latents drawn at random, mean of several draws.",
    SINGLE: "Every latent by itself.",
    HALFWAY: "As near to following the role as to following the name: a score of 0.",
}
READ = (
    "n", "temperature", "top_p", "max_new_tokens", "stop", "chat_template", "chat_template_options", "answer_after",
    "weights", "backend", "max_sources", "seed", "batch_size",
)  # fmt: skip
"""What is used of an audit's settings."""
Feature = tuple[str, int]
"""Hook and latent."""
Effects = dict[Feature, np.ndarray]
"""Of each feature: at the first name, at the second, and anywhere, ``(3,)``."""


class EntitySwap(NamedTuple):
    """A prompt in which two names have different roles."""

    prompt: Prompt
    """A text or a conversation."""
    first: str
    """A name, once in the prompt; it stands before ``second``."""
    second: str

    @property
    def swapped(self) -> Prompt:
        """The prompt with the names the other way round."""
        if isinstance(self.prompt, str):
            return self._exchanged(self.prompt)
        return [{**one, "content": self._exchanged(one["content"])} for one in self.prompt]

    def check(self) -> None:
        """ValueError unless each name is there once, in their order."""
        words = in_words(self.prompt)
        counts = words.count(self.first), words.count(self.second)
        if counts != (1, 1) or not self.first or words.find(self.first) + len(self.first) > words.find(self.second):
            raise ValueError(
                f"{words!r} must hold {self.first!r} once and then {self.second!r} once; it has them {counts[0]} and "
                f"{counts[1]} times."
            )

    def _exchanged(self, text: str) -> str:
        other = {self.first: self.second, self.second: self.first}
        return re.sub("|".join(map(re.escape, other)), lambda found: other[found[0]], text)


@dataclass(kw_only=True, eq=False)
class SupernodeEvidence(Evidence):
    """Scores of role against name; a unit is a prompt."""

    kind: ClassVar[str] = "supernodes"
    title: ClassVar[str] = "Supernodes"
    question: ClassVar[str] = "Do latents that act together over prompts follow what an entity does, or its name?"
    unit: ClassVar[str] = "prompt"
    unit_text: ClassVar[str] = "Prompts with two names, each beside its twin with the names the other way round."
    metrics: ClassVar[dict[str, str]] = {"role_score": "1 follows the role, -1 follows the name"}
    chance: ClassVar[float | None] = 0.0

    members: pd.DataFrame = field(default_factory=pd.DataFrame)
    """One row per feature: ``hook``, ``latent``, ``supernode``, ``effect`` (mean absolute effect over prompts)."""

    def _tables(self, *standard: EvidenceTable) -> tuple[EvidenceTable, ...]:
        """With the latents of each supernode."""
        note = "effect: mean over prompts of the absolute effect, in logits."
        strongest = self.members.sort_values(["supernode", "effect"], ascending=[True, False])
        shown = strongest.groupby("supernode").head(8)
        return *standard, evidence_table("Strongest latents of each", shown, note)


def read_swaps(path: str | Path) -> list[EntitySwap]:
    """Read prompts with two names from a JSONL file, one ``{"prompt": …, "first": …, "second": …}`` a line; a prompt is
    a text or a conversation.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no such object, naming it, or no line at all.
    """
    found = _files.read_json_lines(path, _swap)
    if not found:
        raise ValueError(f'The file {path} has no prompt; write {{"prompt": …, "first": …, "second": …}} in each line.')
    return found


def _swap(entry: Any) -> EntitySwap:
    names = EntitySwap._fields
    if not isinstance(entry, dict) or set(entry) != set(names):
        held = f"the keys {', '.join(map(str, entry)) or 'none'}" if isinstance(entry, dict) else f"{entry!r:.100}"
        raise ValueError(f"a prompt with two names is an object with {', '.join(names)}, got {held}.")
    prompt = entry["prompt"]
    prompt = checked_messages(prompt, "prompt") if isinstance(prompt, list) else _checks.text(prompt, "prompt")
    return EntitySwap(prompt, *(_checks.text(entry[name], name) for name in names[1:]))


@standard_modes()
def evaluate_supernodes(
    model: Model,
    swaps: Sequence[EntitySwap | tuple[Prompt, str, str]],
    dictionaries: Dictionaries,
    *,
    n_supernodes: int = 8,
    n_shuffles: int = 20,
    audit: AuditConfig = AuditConfig(),
    sampler: Sampling = None,
    n_bootstrap: int = 2000,
    n_permutations: int = 10_000,
    confidence: float = 0.95,
    folder: str | Path | None = None,
    n_workers: int = 1,
    workers: str = "joblib",
    actor_options: dict[str, Any] | None = None,
    progress: bool = False,
) -> SupernodeEvidence:
    """Group latents that act together over prompts, swap the names in each prompt, and see what the groups follow.

    Continuations are drawn from each prompt as an audit draws them, and attributed behind its twin too, with the same
    weights and the same answers marked. Features are grouped by k-means of their effects over the prompts as they are,
    each scaled to length 1 and weighted by its length before that; the twins take no part in it.

    Args:
        model: as for ``audit_continuations``.
        swaps: prompts with two names each, at least 6: text or conversation, first name, second name, each name once.
            Swapping them must change two runs of tokens and nothing else, as names of one token do.
        dictionaries: as for ``audit_continuations``.
        n_supernodes: groups; fewer where there are fewer features.
        n_shuffles: draws of the shuffled control.
        audit: how to sample, weight and attribute, and behind which marker answers stand; what it says of embedding,
            clustering and steering is not used.
        sampler: as for ``audit_continuations``.
        n_bootstrap: resamples of prompts, for intervals.
        n_permutations: signs drawn for p-values.
        confidence: of the intervals, in (0, 1).
        folder: where the effects in every prompt are kept when they are known; what is there is not computed again,
            also where prompts were added.
        n_workers: prompts at a time, each by a worker with a model of its own: ``model`` must then be a function, and
            ``folder``, if any, be on storage that all share. It is called here too, to tell what is measured, and that
            model is let go. With the same number of threads the results are the same to the bit.
        workers: "joblib", processes or what ``joblib.parallel_config`` names; or "ray", actors on the cluster that
            ``ray.init`` was called for, or on this machine.
        actor_options: Ray's resources of an actor, such as ``{"num_gpus": 1}``; one CPU by default.
        progress: show a progress bar.

    Raises:
        ValueError: fewer than 6 prompts or one twice, a prompt without its names, a folder of other settings, several
            workers and a model that is no function, or nothing that could be measured.
        RuntimeError: a worker died; with a folder the same call goes on from what was finished.
    """
    given = [EntitySwap(*swap) for swap in swaps]
    check_prefixes([in_words(swap.prompt) for swap in given], "swaps")
    for swap in given:
        swap.check()
    for value, name in ((n_supernodes, "n_supernodes"), (n_shuffles, "n_shuffles")):
        _checks.positive(value, name)
    each = OverUnits(
        inputs=Inputs(model=model, dictionaries=dictionaries, embedder=None, sampler=sampler, embeds=False),
        keys=[list(swap) for swap in given],
        kind="prompt",
        n_workers=n_workers,
        workers=workers,
        actor_options=actor_options,
        lasting=whole,
    )
    described = each.opened(lambda subject: subject.about)
    asked = {name: value for name, value in audit.identity.items() if name in READ}
    store = SweepStore.at(folder, {"audit": asked, **described})
    attempts, found = Attempts(), dict[str, tuple[Effects, Effects]]()
    every = each.measured(partial(partial, _prompt, given, audit), store, progress)
    for swap, one in zip(given, every, strict=True):
        attempts.add(one)
        if not one["failures"]:
            found[in_words(swap.prompt)] = _unpacked(one["own"]), _unpacked(one["twin"])
    features, own, twin = tables(list(found.values()))
    if not len(features):
        raise ValueError(f"No latent has an effect in any prompt. {'; '.join(map(str, attempts.failures[:3]))}")
    labels = supernodes(own[:, :, 2], n_supernodes, audit.seed)
    _score(attempts, list(found), own, twin, labels, n_shuffles, audit.seed)
    effect = np.abs(own[:, :, 2]).mean(axis=1)
    hooks, latents = zip(*features, strict=True)
    resampled = {"n_bootstrap": n_bootstrap, "n_permutations": n_permutations, "confidence": confidence}
    about = {"n_supernodes": n_supernodes, "n_shuffles": n_shuffles, "audit": asked, **described}
    return SupernodeEvidence(
        cells=attempts.cells(("prompt", "method", "metric", "value"), metric="role_score"),
        kinds={name: "unsupervised" if name == SUPERNODES else "control" for name in _DESCRIPTIONS},
        descriptions=dict(_DESCRIPTIONS),
        settings=_files.json_safe(about | resampled | {"seed": audit.seed}),
        failures=attempts.summary(len(given)),
        members=pd.DataFrame({"hook": hooks, "latent": latents, "supernode": labels, "effect": effect}),
    )


def _score(
    attempts: Attempts,
    prompts: Sequence[str],
    own: np.ndarray,
    twin: np.ndarray,
    labels: np.ndarray,
    n_shuffles: int,
    seed: int,
) -> None:
    """Put the scores of every prompt, with each way to group the features, among the cells."""
    generator = np.random.default_rng(seed)
    groups = {SUPERNODES: [labels], SINGLE: [np.arange(len(labels))]}
    groups[SHUFFLED] = [generator.permutation(labels) for _ in range(n_shuffles)]
    for number, prompt in enumerate(prompts):
        for method, each in groups.items():
            scores = [role_score(own[:, number, :2], twin[:, number, :2], one) for one in each]
            with attempts.of(method, prompt):
                if not np.isfinite(scores).all():
                    raise ValueError("no latent acts differently at the two names")
                attempts.rows.append({"prompt": prompt, "method": method, "value": float(np.mean(scores))})
        attempts.rows.append({"prompt": prompt, "method": HALFWAY, "value": 0.0})


def _prompt(given: Sequence[EntitySwap], config: AuditConfig, subject: Subject, number: int) -> Measured:
    attempts, found = Attempts(), {}
    with attempts.of("", in_words(given[number].prompt)):
        found = _both(subject, given[number], config)
    return {**attempts.packed(), **found}


def _both(subject: Subject, swap: EntitySwap, config: AuditConfig) -> dict[str, Any]:
    """Effects in a prompt and in its twin, on the same continuations: rows of hook, latent and what `Effects` says."""
    drawn = sampled(subject, Question(prompt=swap.prompt), config, n=config.n, seed=config.seed)
    ids = tuple(tuple(drawn.ids_of(row)) for row in range(len(drawn)))
    scored = Question(prompt=swap.swapped, given=ids).scored(subject.model, config)
    other = replace(scored, weights=drawn.weights, columns=drawn.columns)
    spans = name_spans(drawn.prefix_ids, other.prefix_ids)
    how: dict[str, Any] = {"backend": config.backend, "max_sources": config.max_sources, **config.per_pass}
    own, twin = (
        _effects(attribute_continuations(subject.model, subject.saes, one, **how), spans) for one in (drawn, other)
    )
    return {"own": _packed(own), "twin": _packed(twin)}


def _packed(effects: Effects) -> list[list[Any]]:
    return [[*feature, *effect.tolist()] for feature, effect in effects.items()]


def _unpacked(rows: Sequence[Sequence[Any]]) -> Effects:
    return {(hook, latent): np.array(effect) for hook, latent, *effect in rows}


def name_spans(ids: Sequence[int], swapped: Sequence[int]) -> list[tuple[int, int]]:
    """Columns of the prefix at which the two names stand: the two runs of tokens in which it differs from its twin."""
    differ = [i for i, pair in enumerate(zip(ids, swapped)) if pair[0] != pair[1]]
    starts = [i for i in differ if i - 1 not in differ]
    ends = [i + 1 for i in differ if i + 1 not in differ]
    if len(ids) != len(swapped) or len(starts) != 2:
        raise ValueError(
            f"with the names swapped, the prompt has {len(swapped)} tokens instead of {len(ids)} and differs in "
            f"{len(starts)} places; take names of one token each, that do not stand side by side"
        )
    return list(zip(starts, ends, strict=True))


def _effects(rows: ContinuationSet, spans: Sequence[tuple[int, int]]) -> Effects:
    assert rows.signatures is not None and rows.sources is not None
    mean = rows.weights.double() @ rows.signatures.double()
    found: Effects = {}
    for column, (kind, hook, position, latent) in enumerate(rows.sources.keys):
        if kind == "latent":
            at = found.setdefault((hook, latent), np.zeros(3))
            inside = [first <= position < last for first, last in spans]
            at += float(mean[column]) * np.array([*inside, True])
    return found


def tables(prompts: Sequence[tuple[Effects, Effects]]) -> tuple[list[Feature], np.ndarray, np.ndarray]:
    """The features with an effect in some prompt, and their effects in prompts and twins, each ``(F, P, 3)``."""
    features = sorted({f for own, _ in prompts for f, effect in own.items() if effect[2]})
    nothing, shape = np.zeros(3), (len(features), len(prompts), 3)
    own, twin = ([[pair[side].get(f, nothing) for pair in prompts] for f in features] for side in (0, 1))
    return features, np.reshape(own, shape), np.reshape(twin, shape)


def supernodes(profiles: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    """Group features by the direction of their effects over prompts ``(F, P)``: labels ``(F,)``."""
    size = np.linalg.norm(profiles, axis=1)
    if len(profiles) < 2:
        return np.zeros(len(profiles), dtype=int)
    view = SingleView(profiles / size[:, None], sample_weight=size, random_state=seed)
    return view.with_clusters(min(n, len(profiles))).labels


def role_score(own: np.ndarray, twin: np.ndarray, groups: np.ndarray) -> float:
    """The score of one prompt, from effects at the two names ``(F, 2)`` and the group of each feature; NaN if none
    differs between the names.
    """
    k = int(groups.max()) + 1
    e, after = (np.stack([np.bincount(groups, side, k) for side in values.T]) for values in (own, twin))
    half = (e - e[::-1]) / 2
    whole = float((half**2).sum())
    return float(((after - (e + e[::-1]) / 2) * half).sum()) / whole if whole > 0 else float("nan")
