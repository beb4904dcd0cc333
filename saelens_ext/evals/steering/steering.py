"""Which methods steer better: each steers towards every concept at matched strengths, and judges rate what is said.

Symbols
    cell     a method's direction for a concept, at one sign and target divergence
    score    a judge's score of one text, in [0, 2]: the harmonic mean of its ratings of concept and fluency
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from saelens_ext import _checks
from saelens_ext.continuations.subject import Model
from saelens_ext.evals.attempts import Attempts
from saelens_ext.evals.concepts_data import Concept, check_concepts
from saelens_ext.evals.evidence import Evidence, evidence_table
from saelens_ext.evals.methods import Method, check_methods
from saelens_ext.evals.over_concepts import over_concepts
from saelens_ext.evals.steering.arms import (
    BASELINES,
    EXPLAINED,
    KINDS,
    NO_COLUMN,
    PROMPTING,
    check_columns,
)
from saelens_ext.evals.steering.ratings import rated_texts
from saelens_ext.evals.steering.texts import TEXT_KEY, UNSTEERED, Asked, as_table, judged, scores_of
from saelens_ext.evals.steering.units import SteeringHow, measure, own_columns, prepared
from saelens_ext.host.chat_template import Prompt, in_words, listed_prompts
from saelens_ext.ops.modes import standard_modes
from saelens_ext.ops.resampling import unit_bootstrap
from saelens_ext.ops.statistics import rank_correlation
from saelens_ext.report.evidence_section import EvidenceSection, Line, LineFigure
from saelens_ext.steering.judges import Judge
from saelens_ext.steering.sampling import SamplingOptions

PROMPT = "The following text is about {concept}. {prompt}"


@dataclass(kw_only=True, eq=False)
class SteeringEvidence(Evidence):
    """Steering towards concepts by several methods; a unit is a concept."""

    kind: ClassVar[str] = "steering"
    title: ClassVar[str] = "Steering towards concepts"
    question: ClassVar[str] = (
        "At the same effect on the model's prediction, does a method bring about a concept in fluent text better than "
        "matched controls do?"
    )
    unit: ClassVar[str] = "concept"
    unit_text: ClassVar[str] = (
        "A unit is a concept. Each method steers towards it at several target divergences and signs; half of the "
        "prompts choose among these, and the score is that of the other half. A method that reaches no target scores "
        "0. Intervals and tests are over concepts."
    )
    groups: ClassVar[tuple[str, ...]] = ("judge",)
    metrics: ClassVar[dict[str, str]] = {
        "score": "held-out score (0 to 2)",
        "score_reached": "held-out score where a target was reached",
        "concept_rating": "rating of the concept (0 to 2)",
        "fluency_rating": "rating of the fluency (0 to 2)",
        "wrong_way": "share of prompts with less of the concept than unsteered",
        "sd_over_prompts": "standard deviation of the score over prompts",
        "kl_everywhere": "divergence over all positions (nats)",
        "unreached": "share of targets and signs not reached",
    }
    bounds: ClassVar[tuple[float, float]] = (0.0, 2.0)
    other_bounds: ClassVar[dict[str, tuple[float, float]]] = {
        "score_reached": (0.0, 2.0), "concept_rating": (0.0, 2.0), "fluency_rating": (0.0, 2.0),
        "wrong_way": (0.0, 1.0), "unreached": (0.0, 1.0), "sd_over_prompts": (0.0, np.inf),
        "kl_everywhere": (0.0, np.inf),
    }  # fmt: skip

    texts: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Every text with every judge's ratings: concept, method, draw, column (which of the method's directions; -1 where
    it has one for each concept), sign, target, kl and coefficient (what it was steered by), prompt, half ("choose" or
    "report"), number, text, judge, concept_rating, fluency_rating, score.
    """

    def curve(self) -> pd.DataFrame:
        """Mean ratings by judge, method, sign and target over all concepts that reach it; nothing is chosen."""
        keys, ratings = ["judge", "method", "sign", "target"], ["concept_rating", "fluency_rating", "score"]
        steered = self.texts[self.texts["method"] != UNSTEERED]
        per_concept = steered.groupby([*keys, "concept"], sort=False, dropna=False)[ratings].mean()
        grouped = per_concept.groupby(keys, sort=False, dropna=False)
        return grouped.mean().assign(n_concepts=grouped.size()).reset_index()

    def steered_with(self) -> pd.DataFrame:
        """Which of its directions each method steered with: concept, method, draw and column."""
        own = self.texts[self.texts["column"] != NO_COLUMN]
        keys = ["concept", "method", "draw", "column"]
        return own[keys].drop_duplicates().astype({"draw": int, "column": int}).reset_index(drop=True)

    def agreement(self) -> pd.DataFrame:
        """How judges agree on the same texts: Spearman's correlation of their scores, and Cohen's kappa with quadratic
        weights of their ratings rounded to 0, 1 and 2, with intervals over concepts; one row per rating and pair of
        judges that both rated some text.
        """
        from sklearn.metrics import cohen_kappa_score

        def correlation(rows: np.ndarray) -> float:
            return float(np.nan_to_num(rank_correlation(*rows.T)))  # constant ratings say nothing of agreement

        def kappa(rows: np.ndarray) -> float:
            first, second = np.rint(rows.T).astype(int)
            if len({*first, *second}) == 1:
                return 1.0  # all the same to both
            return float(cohen_kappa_score(first, second, labels=[0, 1, 2], weights="quadratic"))

        judges, rows = list(dict.fromkeys(self.texts["judge"])), []
        for rating in ("concept_rating", "fluency_rating", "score"):
            # Texts without a target, unsteered or told what to write about, count as well.
            by_text = self.texts.groupby([*TEXT_KEY, "judge"], sort=False, dropna=False)[rating]
            table = by_text.mean().unstack("judge")
            for number, first in enumerate(judges):
                for second in judges[number + 1 :]:
                    both = table[[first, second]].dropna()
                    if both.empty:
                        continue
                    units = [part.to_numpy() for _, part in both.groupby(level="concept", sort=False)]
                    for name, statistic in (("spearman", correlation), ("kappa", kappa)):
                        found = unit_bootstrap(statistic, units, **self._resampling(), bounds=(-1, 1))
                        where = {"first": first, "second": second, "rating": rating, "statistic": name}
                        rows.append({**where, **found._asdict(), "n_texts": len(both)})
        return pd.DataFrame(rows)

    def with_ratings(self, judge: str, ratings: pd.DataFrame) -> "SteeringEvidence":
        """The evidence with another judge, such as people whose ratings
        :func:`~saelens_ext.evals.steering.ratings.read_ratings` has read.

        Args:
            judge: a new name.
            ratings: ``id`` of texts, as :func:`~saelens_ext.evals.steering.ratings.text_ids` gives them,
                ``concept_rating`` and ``fluency_rating``. Texts that are not in it count as not rated.

        Raises:
            ValueError: a name that is taken, or an id that is no text's.
        """
        texts = pd.concat([self.texts, rated_texts(self.texts, judge, ratings)], ignore_index=True)
        own = texts[texts["judge"] == judge]
        cells = pd.concat([self.cells, scores_of(own, self.cells)], ignore_index=True)
        return replace(self, texts=texts, cells=cells)

    def section(self) -> EvidenceSection:
        section = super().section()
        curve = self.curve()
        tables = [
            evidence_table("Without any choice", curve, "Means over the concepts that reach a target."),
            evidence_table("What each method steers with", self.steered_with(), "Columns: latents or regions."),
        ]
        if self.texts["judge"].nunique() > 1:
            tables.append(evidence_table("Agreement of the judges", self.agreement(), "Over concepts."))
        first = curve["judge"].iloc[0]
        shown = curve[curve["judge"] == first].groupby(["method", "sign"], sort=False)
        lines = [
            Line(
                label=f"{method}{' (down)' if sign < 0 else ''}",
                x=tuple(own["target"]),
                y=tuple(own["score"]),
                kind=self.kinds.get(str(method), "control"),
            )
            for (method, sign), own in shown
            if len(own) > 1
        ]
        figure = LineFigure(
            title=f"Score by divergence ({first})",
            x_label="target divergence (nats)",
            y_label="mean score (0 to 2)",
            lines=tuple(lines),
            note="Every line is over the concepts that reach a target; nothing is chosen.",
        )
        return replace(section, tables=(*section.tables, *tables), figures=(figure,) if lines else ())


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


@standard_modes(gradients=False)
def compare_steering(
    model: Model,
    methods: Iterable[Method],
    concepts: Iterable[Concept],
    judges: Judge | Mapping[str, Judge],
    *,
    prompts: Sequence[Prompt],
    targets: Sequence[float | int] = (0.05, 0.1, 0.25, 0.5),
    signs: Sequence[int] = (1, -1),
    n: int = 8,
    columns: Mapping[str, Mapping[str, int]] | None = None,
    baselines: Sequence[str] = tuple(BASELINES),
    calibration_prompts: Sequence[Prompt] | None = None,
    prompting: str = PROMPT,
    options: SamplingOptions = SamplingOptions(),
    chat_template_options: Mapping[str, Any] | None = None,
    n_permutations: int = 10_000,
    confidence: float | int = 0.95,
    batch_size: int = 32,
    seed: int = 0,
    folder: str | Path | None = None,
    n_workers: int = 1,
    workers: str = "joblib",
    actor_options: dict[str, Any] | None = None,
    progress: bool = False,
) -> SteeringEvidence:
    """Steer towards concepts with methods and baselines at matched divergence, and have the texts judged.

    Every method acts at its own hook, at the coefficients at which the model's prediction has moved by the same
    divergence. A prompt's random numbers are the same in every cell. Judges see a prompt's texts in random order,
    without the names of methods. Half of the prompts choose each method's target and sign for a concept; the score is
    that of the other half. Texts that a judge fails on, or gives no usable rating, are left out of its means, and
    ``failures`` say so; no other is left out.

    Memory: the activations at a concept's sentences (for "pca" and "kmeans" at those of all, at the hooks where methods
    act), and the texts.

    Args:
        model: any TransformerLens model, or a function without arguments that loads it.
        methods: with directions; see :class:`~saelens_ext.evals.methods.Method`.
        concepts: at least 1, and 6 or more for a claim. Their sentences choose each method's direction, and judges
            are asked for their ``description``, or else their name.
        judges: one, or several by name; see :class:`~saelens_ext.steering.judges.Judge`.
        prompts: at least 2 different ones, what is continued, texts or conversations as for :func:`sample_texts`; every
            other one chooses.
        targets: divergences in nats.
        signs: +1, -1 or both.
        n: continuations per cell and prompt.
        columns: by method and concept, which column to steer with instead of the one that detects the concept best.
        baselines: of "diff_means", "random", "pca", "kmeans" (at every method's hook) and "prompting".
        calibration_prompts: where the divergence is matched; by default the prompts that choose.
        prompting: how the model is told to write about a concept, with ``{concept}`` and ``{prompt}``, which in a
            conversation is its last question.
        options: how to sample.
        chat_template_options: passed to the chat template of conversations.
        n_permutations: assignments of signs in tests of differences.
        confidence: of the intervals, in (0, 1).
        batch_size: continuations, or coefficients, per forward pass.
        seed: of the order in which judges read, of baselines and of resampling.
        folder: where every concept's texts are kept when they are sampled, but for concepts on which something failed;
            what is there is not sampled again, and judged anew. Concepts may be added at the end where the baselines
            are without "pca" and "kmeans", in which the sentences of all take part.
        n_workers: concepts at a time, each by a worker with a model of its own: ``model`` must then be a function, and
            ``folder``, if any, be on storage that all share. It is called here too, to tell what is measured and make
            what concepts share, and that model is let go. Methods travel to the workers; judges stay here. With the
            same number of threads the results are the same to the bit.
        workers: "joblib", processes or what ``joblib.parallel_config`` names; or "ray", actors on the cluster that
            ``ray.init`` was called for, or on this machine.
        actor_options: Ray's resources of an actor, such as ``{"num_gpus": 1}``; one CPU by default.
        progress: show a progress bar.

    Returns:
        The evidence, with every text in ``texts`` and every target without choice in ``curve()``.

    Raises:
        ValueError: no method, concept or judge, fewer than 2 different prompts, a name used twice, a column or a
            baseline that is none, a number out of range, nothing that could be steered with, a folder of other
            settings, or several workers and a model that is no function.
        RuntimeError: a worker died; with a folder the same call goes on from what was finished.

    Source: arXiv 2506.10920 (steering with features at matched divergence) and AxBench (arXiv 2501.17148; a factor
    chosen on one half), with baselines, controls and intervals.
    """
    _checks.between(confidence, 0, 1, "confidence")
    planned = check_concepts(list(concepts))
    asked = listed_prompts(prompts)
    n_different = len(set(map(in_words, asked)))
    if n_different != len(asked) or len(asked) < 2:
        raise ValueError(
            f"prompts must be at least 2 different ones, got {len(asked)} ({n_different} different): half of them "
            "choose the target and the sign, the others score."
        )
    for number, name in enumerate(baselines):
        _checks.choice(name, list(BASELINES), f"baselines[{number}]")
    named_judges = dict(judges) if isinstance(judges, Mapping) else {"judge": judges}
    if not named_judges:
        raise ValueError("judges is empty; give at least one.")
    given = check_methods(methods, *BASELINES.values(), UNSTEERED)
    chosen, attempts = check_columns(columns, given, planned), Attempts()
    calibration = calibration_prompts if calibration_prompts is not None else asked[::2]
    how = SteeringHow(
        prompts=asked, calibration_prompts=listed_prompts(calibration, "calibration_prompts"), targets=targets,
        signs=signs, n=n, baselines=baselines, prompting=prompting, options=options, batch_size=batch_size, seed=seed,
        chat_template_options=chat_template_options,
    )  # fmt: skip
    keys = [[number, own_columns(chosen, concept)] for number, concept in enumerate(planned)]
    each = over_concepts(model, planned, n_workers, workers, actor_options, keys)
    shared, store = each.opened(partial(prepared, how, given, planned, folder, attempts))
    said, cells = list[dict[str, Any]](), list[Asked]()
    for one in each.measured(partial(measure, how, shared, planned, chosen), store, progress):
        attempts.add(one)
        said += one["texts"]
        cells += [Asked(*cell) for cell in one["asked"]]
    about = {concept.name: concept.description or concept.name for concept in planned}
    texts = judged(as_table(said), named_judges, about, asked, attempts, seed=seed)
    attempts.rows.extend(_records(scores_of(texts, cells)))
    added = {
        name: base
        for name in dict.fromkeys(row["method"] for row in attempts.rows)
        for base in KINDS
        if name == base or name.startswith(f"{base} at ")
    }
    kinds = {method.name: str(method.kind) for method in given} | {name: KINDS[base] for name, base in added.items()}
    return SteeringEvidence(
        cells=attempts.cells(["concept", "judge", "method", "metric", "value", "draw"]),
        kinds=kinds,
        descriptions={method.name: method.description for method in given}
        | {name: EXPLAINED[base] for name, base in added.items()},
        settings={
            "targets": list(map(float, targets)), "signs": list(signs), "n": n, "n_prompts": len(asked),
            "confidence": confidence, "n_permutations": n_permutations, "seed": seed, "judges": list(named_judges),
            "prompting": prompting if PROMPTING in kinds else None, "sampling": asdict(options),
            "chat_template_options": chat_template_options, "model": shared.model,
        },
        failures=attempts.summary(len(planned)),
        texts=texts,
    )  # fmt: skip
