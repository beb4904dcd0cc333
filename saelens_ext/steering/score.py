"""How well directions steer: matched strengths, sampled continuations, a judge, and one held-out number.

A cell is one (direction, sign, target); it holds a score for every prompt and continuation. Choosing a direction's
best target on the scores that are then reported would reward luck, the more the noisier the method. So continuations
are split in two halves: the target is chosen by the mean score of the one, and the mean of the other is reported, as
AxBench does with its steering factors. Without a choice, ``curve`` has the mean for every target.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pandas as pd
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.host.chat_template import Prompt, different_prompts, in_words, listed_prompts
from saelens_ext.host.models import HostModel
from saelens_ext.ops.modes import standard_modes
from saelens_ext.steering.divergence_search import MatchedStrength
from saelens_ext.steering.interventions import add_direction
from saelens_ext.steering.judges import Judge
from saelens_ext.steering.sampling import SamplingOptions, sample_texts
from saelens_ext.steering.strength import PAPER_TARGETS, StrengthSearch, match_strengths

Half = Literal["choose", "report"]


@dataclass(frozen=True, kw_only=True)
class ScoredContinuation:
    """One continuation of one cell."""

    direction: int
    """Index of the direction."""
    concept: str
    """What it was judged for."""
    sign: int
    target: float
    """Divergence asked for, in nats."""
    kl: float
    """Divergence attained on the calibration prompts, in nats."""
    coefficient: float
    """In units of the activation."""
    prompt: str
    """Of a conversation its roles and what each says."""
    half: Half
    """Whether it takes part in choosing the target, or in the reported score."""
    text: str
    concept_rating: float | int
    """In [0, 2], as the two below; NaN where the judge gave no usable answer."""
    fluency_rating: float | int
    score: float


@dataclass(frozen=True, kw_only=True)
class DirectionScore:
    """The held-out score of one direction, for one sign or for the better of the signs asked for."""

    direction: int
    sign: int | None
    """The sign scored; None when no target was reached."""
    target: float
    """The divergence chosen, in nats; NaN when no target was reached."""
    score: float
    """Mean score over the reporting half, in [0, 2]; NaN if no target was reached or no answer was usable."""
    choosing_score: float
    """Mean over the half that chose; optimistic, since it is a maximum. Not a result."""
    n_scored: int
    """Continuations behind ``score``."""
    n_missing: int
    """Continuations of the reporting half that the judge gave no usable answer for."""
    n_unreached: int
    """Targets asked for that the direction cannot reach, which were not sampled."""


@dataclass(frozen=True, kw_only=True)
class SteeringScores:
    """Everything that was measured, and what follows from it."""

    continuations: tuple[ScoredContinuation, ...]
    """One row per continuation."""
    searches: tuple[StrengthSearch, ...]
    """Matched strengths, one search per direction; targets that were not reached are in here."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row per continuation."""
        return _frame(self.continuations, ScoredContinuation)

    def curve(self) -> pd.DataFrame:
        """Mean ratings and score of each cell over its continuations, missing ones left out; no target is chosen."""
        keys, ratings = ["direction", "sign", "target"], ["concept_rating", "fluency_rating", "score"]
        return self.to_dataframe().groupby(keys, sort=False)[ratings].mean().reset_index()

    def by_sign(self) -> list[DirectionScore]:
        """For each direction and sign, the held-out score at the target chosen for that sign."""
        return [self._score(direction, (sign,)) for direction, signs in enumerate(self._signs()) for sign in signs]

    def by_direction(self) -> list[DirectionScore]:
        """For each direction, the held-out score at the sign and target chosen together."""
        return [self._score(direction, signs) for direction, signs in enumerate(self._signs())]

    def _signs(self) -> list[tuple[int, ...]]:
        return [tuple(dict.fromkeys(strength.sign for strength in search.strengths)) for search in self.searches]

    def summary(self) -> pd.DataFrame:
        """:meth:`by_sign` as a table."""
        return _frame(self.by_sign(), DirectionScore)

    def _score(self, direction: int, signs: tuple[int, ...]) -> DirectionScore:
        strengths = [s for s in self.searches[direction].strengths if s.sign in signs]
        rows = [row for row in self.continuations if row.direction == direction and row.sign in signs]
        cells = dict.fromkeys((row.sign, row.target) for row in rows)
        means = {cell: _mean([row.score for row in _of(rows, cell, "choose")]) for cell in cells}
        known = {cell: mean for cell, mean in means.items() if not math.isnan(mean)}
        # max takes the first of equals, which is the smaller effect where targets ascend.
        sign, target = max(known, key=lambda cell: known[cell]) if known else (None, math.nan)
        reported = [] if sign is None else [row.score for row in _of(rows, (sign, target), "report")]
        n_scored = sum(not math.isnan(score) for score in reported)
        return DirectionScore(
            direction=direction,
            sign=sign,
            target=target,
            score=_mean(reported),
            choosing_score=math.nan if sign is None else known[sign, target],
            n_scored=n_scored,
            n_missing=len(reported) - n_scored,
            n_unreached=sum(not s.reached for s in strengths),
        )


@standard_modes()
def steering_score(
    model: HostModel,
    hook_name: str,
    directions: Tensor,
    concepts: Sequence[str | tuple[str, str]],
    judge: Judge,
    *,
    prompts: Prompt | Sequence[Prompt] = "I think that",
    targets: Sequence[float | int] = PAPER_TARGETS,
    signs: Sequence[int] = (1, -1),
    n: int = 8,
    options: SamplingOptions = SamplingOptions(),
    calibration_prompts: Prompt | Sequence[Prompt] | None = None,
    chat_template_options: Mapping[str, Any] | None = None,
    average_over: Literal["last", "all"] = "last",
    tolerance: float = 0.01,
    max_strength: float | int = 100.0,
) -> SteeringScores:
    """Steer with directions at matched strength and have the text judged.

    Args:
        model: any TransformerLens model.
        hook_name: any alias of the hook.
        directions: ``(m, d)`` or ``(d,)``; only their directions count.
        concepts: what each direction should bring about: one description for both signs, or a pair for + and -.
        judge: rates continuations; it is called outside the steering.
        prompts: what is continued, texts or conversations as for :func:`sample_texts`. With several, every other one
            chooses the target; with one, every other continuation.
        targets: divergences in nats, ascending.
        signs: +1, -1 or both.
        n: continuations per cell and prompt; at least 2 when there is one prompt.
        options: how to sample. The draws of a prompt are the same in every cell, which makes cells comparable.
        calibration_prompts: where the divergence is measured; by default ``prompts``.
        chat_template_options: passed to the chat template of conversations.
        average_over: as in :func:`match_strength`, and likewise ``tolerance`` and ``max_strength``.

    Returns:
        The whole table and the held-out scores that follow from it.

    Raises:
        ValueError: as :func:`match_strength` and :func:`sample_texts`; another number of concepts than of directions;
            nothing left for one of the halves; or a judge that gives another number of scores than it was asked for.

    Source: arXiv 2506.10920 for targets and ratings, arXiv 2501.17148 (AxBench) for choosing on one half.
    """
    rows = directions[None] if directions.ndim == 1 else directions
    if len(concepts) != len(rows):
        raise ValueError(f"{len(rows)} directions need as many concepts, got {len(concepts)}.")
    given = different_prompts(prompts)
    _check_halves(len(given), _checks.positive(n, "n"), options)
    template: dict[str, Any] = {"chat_template_options": chat_template_options}
    calibration = given if calibration_prompts is None else listed_prompts(calibration_prompts, "calibration_prompts")
    searches = match_strengths(
        model,
        hook_name,
        rows,
        targets,
        prompts=calibration,
        average_over=average_over,
        signs=signs,
        tolerance=tolerance,
        max_strength=max_strength,
        **template,
    )
    table = []
    for index, (row, concept, search) in enumerate(zip(rows, concepts, searches, strict=True)):
        for strength in search.strengths:
            if strength.reached:
                with add_direction(model, hook_name, row, strength.coefficient):
                    said = sample_texts(model, given, n=n, options=options, **template)
                about = concept if isinstance(concept, str) else concept[0 if strength.sign == 1 else 1]
                table += _judged(judge, index, about, strength, given, said)
    return SteeringScores(continuations=tuple(table), searches=tuple(searches))


def _check_halves(n_prompts: int, n: int, options: SamplingOptions) -> None:
    """Refuse what would put the same continuation on both sides of the split, or none on one."""
    if n_prompts == 1 and n < 2:
        raise ValueError(f"n must be at least 2 with a single prompt, got {n}: one half chooses, the other is scored.")
    if n_prompts == 1 and options.temperature == 0:
        raise ValueError(
            "temperature is 0 and there is one prompt, whose continuations are all the same: none can be held out. "
            "Give several prompts or a temperature above 0."
        )


def _judged(
    judge: Judge, direction: int, concept: str, strength: MatchedStrength, prompts: list[Prompt], said: list[list[str]]
) -> list[ScoredContinuation]:
    rows = []
    for number, (prompt, texts) in enumerate(zip(prompts, said, strict=True)):
        scores = judge(concept, prompt, texts)
        if len(scores) != len(texts):
            raise ValueError(f"The judge must give one score per continuation: {len(texts)}, got {len(scores)}.")
        for place, (text, score) in enumerate(zip(texts, scores, strict=True)):
            half: Half = "choose" if (place if len(prompts) == 1 else number) % 2 == 0 else "report"
            rows.append(
                ScoredContinuation(
                    direction=direction,
                    concept=concept,
                    sign=strength.sign,
                    target=strength.target,
                    kl=strength.kl,
                    coefficient=strength.coefficient,
                    prompt=in_words(prompt),
                    half=half,
                    text=text,
                    concept_rating=score.concept,
                    fluency_rating=score.fluency,
                    score=score.score,
                )
            )
    return rows


def _of(rows: Sequence[ScoredContinuation], cell: tuple[int, float], half: Half) -> list[ScoredContinuation]:
    return [row for row in rows if (row.sign, row.target) == cell and row.half == half]


def _mean(scores: Sequence[float]) -> float:
    """Mean of the scores that are there; NaN when none is."""
    known = [score for score in scores if not math.isnan(score)]
    return sum(known) / len(known) if known else math.nan


def _frame(rows: Sequence[ScoredContinuation] | Sequence[DirectionScore], kind: type) -> pd.DataFrame:
    return pd.DataFrame([asdict(row) for row in rows], columns=list(kind.__dataclass_fields__))
