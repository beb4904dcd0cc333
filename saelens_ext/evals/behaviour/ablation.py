"""Whether ablating the regions that were found takes a behaviour away, beside controls and side effects."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saelens_ext import _checks, _files
from saelens_ext.concepts.token_activations import read_texts
from saelens_ext.evals.behaviour.behaviour import OpeningOdds, PromptSplit
from saelens_ext.evals.behaviour.conditions import BASES, NOTHING, control_conditions, random_name, region_conditions
from saelens_ext.evals.behaviour.localisation import Localisation
from saelens_ext.evals.behaviour.passes import Asking, Condition, ablating
from saelens_ext.evals.evidence import Evidence, corrected, evidence_table
from saelens_ext.evals.verdicts import LEVEL
from saelens_ext.host.chat_template import Prompt, in_words
from saelens_ext.host.models import HostModel, resolve_hook
from saelens_ext.host.prompt_passes import logits_of, prompt_ids
from saelens_ext.ops.modes import evaluating, standard_modes
from saelens_ext.ops.precision import wide
from saelens_ext.ops.resampling import monte_carlo_p
from saelens_ext.ops.statistics import one_size_sign_flip_p_value
from saelens_ext.report.evidence_section import AnswerSet, EvidenceSection, EvidenceTable
from saelens_ext.steering.behaviour import Behaviour
from saelens_ext.steering.divergence_search import divergence, log_probabilities

LAYERS = ("own", "all")

_COLUMNS = ["prompt", "method", "metric", "value", "draw", "text"]
_LONGEST = 128
"""Tokens of a neutral text that are read."""


@dataclass(kw_only=True, eq=False)
class AblationEvidence(Evidence):
    """What ablations do to a behaviour; a unit is a prompt.

    ``cells`` has, for each condition, the verdict on every test prompt ("shown", and "odds" where openings were
    measured) and, but for random regions, the side effects: verdicts on contrast prompts ("contrast"), and the KL
    divergence per token and the perplexity ratio on neutral texts ("kl", "perplexity_ratio").
    """

    kind: ClassVar[str] = "behaviour"
    title: ClassVar[str] = "Ablation of a behaviour"
    question: ClassVar[str] = (
        "Does a behaviour go away when the regions that hold it are projected out of the activations, and not when "
        "others are?"
    )
    unit: ClassVar[str] = "prompt"
    unit_text: ClassVar[str] = (
        "Prompts that took no part in building the dictionary or in choosing regions. Intervals redraw prompts, and "
        "p-values flip the signs of the differences of single prompts; Holm's correction is over all comparisons. "
        "Against random regions, p is (1 + draws with as large a fall) / (1 + draws), corrected over the directions "
        "tested."
    )
    metrics: ClassVar[dict[str, str]] = {
        "shown": "rate of the behaviour on test prompts",
        "contrast": "rate on contrast prompts",
        "kl": "KL divergence from the model as it is, per token of neutral texts (nats)",
        "perplexity_ratio": "perplexity of neutral texts over that of the model as it is",
    }
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)
    other_bounds: ClassVar[dict[str, tuple[float, float]]] = {
        "shown": (0.0, 1.0), "contrast": (0.0, 1.0), "kl": (0.0, np.inf), "perplexity_ratio": (0.0, np.inf),
    }  # fmt: skip

    texts: dict[str, str] = field(default_factory=dict)
    """The prompt, of a conversation its roles and what each says, or the neutral text behind each unit."""
    sizes: dict[str, int] = field(default_factory=dict)
    """By tested method, its number of directions."""
    localisation: str = ""
    """What the localisation found, in words."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.cells["metric"] == "odds").any():
            words = {"odds": "log-odds of the behaviour's openings on test prompts (nats)"} | dict(type(self).metrics)
            self.metrics, self.bounds = words, (-np.inf, np.inf)  # pyright: ignore[reportAttributeAccessIssue]

    def comparisons(self, reference: str | None = None, *, metric: str | None = None) -> pd.DataFrame:
        """Differences between conditions on the same prompts, as :meth:`Evidence.comparisons` gives them.

        Where verdicts are yes or no, the p-value is over all assignments of signs, however many prompts there are.
        """
        table = super().comparisons(reference, metric=metric)
        return corrected(table.assign(p=exact_p_values(table, self.per_unit(metric))))

    def against_random(self) -> pd.DataFrame:
        """The tested directions against as many random regions.

        Returns:
            One row per tested method: method, difference (from no ablation, on the headline), n_draws, as_large (draws
            whose fall is as large or larger), p (one-sided, Monte Carlo) and p_holm.
        """
        own = self.cells[self.cells["metric"] == self.headline]
        base = own[own["method"] == NOTHING].set_index("prompt")["value"]
        falls = own.assign(fall=own["value"] - own["prompt"].map(base)).groupby(["method", "draw"])["fall"].mean()
        rows = []
        for method, m in self.sizes.items():
            null = falls.get(random_name(m), pd.Series(dtype=float)).dropna().to_numpy(dtype=np.float64)
            if len(null) and method in falls and np.isfinite(falls[method].iloc[0]):
                value = float(falls[method].iloc[0])
                p = monte_carlo_p(value, null, side="less")
                rows.append((method, value, len(null), int((null <= value).sum()), p))
        table = pd.DataFrame(rows, columns=["method", "difference", "n_draws", "as_large", "p"])
        return corrected(table)

    def verdict(self, reference: str | None = None) -> str:
        """What the evidence says in words: the tested directions beside controls, random regions and side effects.

        Args:
            reference: as for :meth:`comparisons`.
        """
        if not self.sizes and reference is None:
            return f"{self.localisation} No region was tested."
        parts = [self.localisation, super().verdict(reference), _random_sentences(self.against_random())]
        return " ".join(filter(None, [*parts, _beside(self.summary(), list(self.sizes))]))

    def answers(self, n: int = 5) -> pd.DataFrame:
        """Answers side by side: the first n test prompts, one column per condition but random regions."""
        own = self.cells[(self.cells["metric"] == "shown") & self.cells["prompt"].str.startswith("test")]
        own = own[own["text"].notna() & (own["text"] != "")]
        table = own.pivot_table(index="prompt", columns="method", values="text", aggfunc="first", sort=False).head(n)
        return table.rename(index=self.texts)

    def section(self) -> EvidenceSection:
        """What a page shows of this evidence."""
        answers = tuple(
            AnswerSet(prompt=str(prompt), answers={str(k): text for k, text in row.items() if isinstance(text, str)})
            for prompt, row in self.answers().iterrows()
        )
        return replace(super().section(), answers=answers)

    def _tables(self, *standard: EvidenceTable) -> tuple[EvidenceTable, ...]:
        table = self.against_random()
        note = "p = (1 + draws with as large a fall) / (1 + draws); p_holm is corrected over the directions tested."
        return (*standard, evidence_table("Against random regions", table, note)) if len(table) else standard


@standard_modes(gradients=False)
def ablate_behaviour(
    model: HostModel,
    found: Localisation,
    split: PromptSplit,
    behaviour: Behaviour | OpeningOdds,
    *,
    neutral_texts: Sequence[str],
    n_directions: Sequence[int] = (1,),
    basis: Sequence[str] = BASES,
    layers: str = "own",
    n_random: int = 20,
    n_bootstrap: int = 2000,
    n_permutations: int = 10_000,
    confidence: float = 0.95,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> AblationEvidence:
    """Project the regions that were found out of the activations, x <- x - Q Q^T (x - c), and ask the test prompts.

    It acts at every position and step of generation. Conditions and prompts share batches. Controls: nothing; a region
    without the behaviour that resembles the best candidate; the region that holds most prompts without it; as many
    random regions; a Gaussian direction; the difference of means of the last positions of ``split.choose``, which used
    the labels, and whose c is the mean of those without the behaviour.

    Args:
        model: the one that was localised in.
        found: what :func:`~saelens_ext.evals.behaviour.localisation.localise_behaviour` found; without a candidate
            only controls are tried.
        split: the same prompts.
        behaviour: judges answers, or `OpeningOdds`.
        neutral_texts: texts of another kind, on which the divergence from the model as it is and the perplexity are
            measured; their first 128 tokens are read. May be empty.
        n_directions: numbers of candidates to ablate together.
        basis: of an `ExemplarPartition`: "exemplar", "mean" or both; the first is that of the controls.
        layers: "own", the hook that the dictionary writes to, or "all", the same hook of every layer, with the mean
            activation of ``split.build`` as the centre of each other layer.
        n_random: draws of random regions; with t tested directions, a claim against them needs at least 20 t.
        n_bootstrap: resamples of prompts, for intervals.
        n_permutations: signs drawn for p-values; differences of yes and no are tested exactly.
        confidence: of the intervals, in (0, 1).
        batch_size: answers in a forward pass.
        seed: of everything random.
        progress: show a progress bar.

    Returns:
        The evidence. What could not be tried is in its ``failures``.

    Raises:
        ValueError: an unknown basis or layers, a number below 1, or as
            :func:`~saelens_ext.evals.behaviour.localisation.localise_behaviour`.

    Source: arXiv 2605.14347, refusal ablation. Held-out prompts, random regions, side effects and tests are ours; the
    difference of means is that of arXiv 2406.11717, set to the mean of the prompts without the behaviour as in arXiv
    2411.09003.
    """
    _checks.choice(layers, LAYERS, "layers")
    for name in _checks.listed(basis, "basis", "basis"):
        _checks.choice(name, BASES, "basis")
    numbers = [_checks.positive(m, "n_directions") for m in _checks.listed(n_directions, "n_directions", "number")]
    centers = acting_centers(model, found, split, layers)
    lacking = lacking_centers(model, found, split, list(centers))
    asking = Asking(
        model=model, behaviour=behaviour, batch_size=batch_size, centers=centers, **_template(found),
        max_new_tokens=int(found.settings.get("max_new_tokens", 60)),
    )  # fmt: skip
    tested, failures = region_conditions(found, numbers, basis)
    controls, missed = control_conditions(found, numbers, basis, lacking, n_random=n_random, seed=seed)
    conditions = [*tested, Condition(name=NOTHING, description="The model as it is."), *controls]
    rows = list(asked_rows(asking, split.test, conditions, "test", progress))
    shown = [condition for condition in conditions if not condition.name.startswith("random")]
    if split.contrast:
        rows += [
            row | {"metric": "contrast"}
            for row in asked_rows(asking, split.contrast, shown, "contrast", progress)
            if row["metric"] == "shown"
        ]
    rows += _side_effects(asking, list(neutral_texts), [condition for condition in shown if condition.name != NOTHING])
    settings = {"n_directions": numbers, "basis": list(basis), "layers": layers, "n_random": n_random, "seed": seed}
    settings |= {"n_bootstrap": n_bootstrap, "n_permutations": n_permutations, "confidence": confidence}
    parts = {"test": split.test, "contrast": split.contrast, "neutral": tuple(neutral_texts)}
    return AblationEvidence(
        cells=pd.DataFrame(rows, columns=_COLUMNS),
        kinds={condition.name: str(condition.kind) for condition in conditions},
        descriptions={condition.name: condition.description for condition in conditions},
        settings=_files.json_safe(found.settings | settings | {"hooks": list(asking.centers)}),
        failures=(*failures, *missed),
        texts={unit_name(part, number): in_words(one) for part, own in parts.items() for number, one in enumerate(own)},
        sizes={one.name: len(one.directions) for one in tested if one.directions is not None},
        localisation=found.claim(),
    )


def exact_p_values(comparisons: pd.DataFrame, per_unit: pd.DataFrame) -> np.ndarray:
    """The p-values of comparisons, over all assignments of signs where differences are of one size."""
    exact = [
        one_size_sign_flip_p_value((per_unit[row["method"]] - per_unit[row["other"]]).dropna().to_numpy(np.float64))
        for row in comparisons.to_dict("records")
    ]
    return np.where(np.isnan(exact), comparisons["p"].to_numpy(dtype=np.float64), exact)


def unit_name(part: str, number: int) -> str:
    """The name of a prompt, in an order that sorting keeps."""
    return f"{part} {number:04d}"


def asked_rows(
    asking: Asking, prompts: Sequence[Prompt], conditions: Sequence[Condition], part: str, progress: bool = False
) -> Iterator[dict[str, Any]]:
    """Ask prompts under conditions; one row of cells per verdict."""
    for condition, verdicts in zip(conditions, asking.ask(prompts, conditions, progress=progress), strict=True):
        for number, verdict in enumerate(verdicts):
            where = {"prompt": unit_name(part, number), "method": condition.name, "draw": condition.draw}
            text = None if condition.name.startswith("random") else verdict.text or None
            yield where | {"metric": "shown", "value": verdict.shown, "text": text}
            if np.isfinite(verdict.odds):
                yield where | {"metric": "odds", "value": verdict.odds, "text": None}


def _template(found: Localisation) -> dict[str, Any]:
    """How the chat template was used when it was localised."""
    options = found.settings.get("chat_template_options")
    return {"chat_template": bool(found.settings.get("chat_template", True)), "chat_template_options": options}


@torch.no_grad()
def acting_centers(model: HostModel, found: Localisation, split: PromptSplit, layers: str) -> dict[str, Tensor]:
    """The hooks to act at, each with its centre.

    Raises:
        ValueError: "all" layers of a hook that is in none.
    """
    own = resolve_hook(model, found.settings["hook_name_out"])
    if layers == "own":
        return {own: found.center}
    place = re.fullmatch(r"blocks\.\d+\.(.+)", own)
    if place is None:
        raise ValueError(f"The hook {own} is in no layer, so there are no others like it; use layers='own'.")
    hooks = [resolve_hook(model, f"blocks.{layer}.{place[1]}") for layer in range(int(model.cfg.n_layers))]
    sums, n = dict.fromkeys(hooks, torch.zeros(())), 0
    for first in range(0, len(split.build), 16):
        read = read_texts(model, hooks, split.build[first : first + 16], **_template(found))
        sums = {hook: total + wide(read.activations[hook]).sum(dim=0).cpu() for hook, total in sums.items()}
        n += len(read.positions)
    return {hook: found.center if hook == own else (total / n).float() for hook, total in sums.items()}


def lacking_centers(
    model: HostModel, found: Localisation, split: PromptSplit, hooks: Sequence[str]
) -> dict[str, Tensor]:
    """By hook the mean last position of the choose prompts that do not show the behaviour, ``(d,)``.

    Where the dictionary writes it is known from the localisation; other hooks are read.
    """
    own = resolve_hook(model, found.settings["hook_name_out"])
    others = [hook for hook in hooks if resolve_hook(model, hook) != own]
    centers = dict.fromkeys(hooks, found.lacking)
    if others:
        prompts = [one for one, shown in zip(split.choose, found.prompts["shown"], strict=True) if shown < 0.5]
        read = read_texts(model, others, prompts, positions="last", **_template(found))
        centers |= {hook: wide(read.activations[hook]).mean(dim=0).float() for hook in others}
    return centers


def _side_effects(asking: Asking, texts: Sequence[str], conditions: Sequence[Condition]) -> list[dict[str, Any]]:
    """KL divergence per token and perplexity ratio of each text under each condition."""
    rows: list[dict[str, Any]] = []
    with evaluating(asking.model):
        for number, text in enumerate(texts):
            ids = prompt_ids(asking.model, text)[None, :_LONGEST]
            if ids.shape[1] < 2:
                raise ValueError(f"The neutral text {text!r} has {ids.shape[1]} token; it needs 2 for a prediction.")
            before = log_probabilities(logits_of(asking.model, ids)[0])
            for condition in conditions:
                with ablating(asking.model, asking.centers, [condition.basis()]):
                    after = log_probabilities(logits_of(asking.model, ids)[0])
                following = ids[0, 1:, None].to(before.device)
                losses = [-scores[:-1].gather(-1, following).mean() for scores in (before, after)]
                values = {"kl": float(divergence(before, after))}
                values["perplexity_ratio"] = float((losses[1] - losses[0]).exp())
                where = {"prompt": unit_name("neutral", number), "method": condition.name, "draw": 0, "text": None}
                rows += [where | {"metric": metric, "value": value} for metric, value in values.items()]
    return rows


# --- in words ---


def _random_sentences(table: pd.DataFrame) -> str:
    """What comparisons with random regions say."""
    sentences = []
    for row in table.to_dict("records"):
        start = (
            f"Of {row['n_draws']} draws of random regions {row['as_large'] or 'none'} did as much as {row['method']}"
        )
        least = min(1.0, len(table) / (1 + row["n_draws"]))
        if least >= LEVEL:
            end = f"p = {row['p']:.2g} before correction; with so few draws none below {LEVEL:g} is possible after it"
        else:
            end = f"corrected p = {row['p_holm']:.2g}" + ("" if row["p_holm"] < LEVEL else ", which is not a claim")
        sentences.append(f"{start} ({end}).")
    return " ".join(sentences)


def _beside(summary: pd.DataFrame, methods: list[str]) -> str:
    """What the tested ablations do besides."""
    sentences = []
    for method in methods:
        own = summary[summary["method"] == method].set_index("metric")["estimate"]
        parts = [
            text.format(own[metric])
            for metric, text in (
                ("kl", "a divergence of {:.3g} nats per token"),
                ("perplexity_ratio", "a perplexity of {:.3g} times the former on neutral texts"),
                ("contrast", "a rate of {:.2g} on contrast prompts"),
            )
            if metric in own
        ]
        if parts:
            sentences.append(f"Side effects of {method}: {', '.join(parts)}.")
    return " ".join(sentences)
