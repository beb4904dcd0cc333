"""The texts of a comparison of steering: sampled, judged in random order, and scored on prompts that chose nothing."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from saelens_ext.evals.attempts import Attempts
from saelens_ext.evals.concepts_data import Concept
from saelens_ext.evals.steering.arms import NO_COLUMN, PROMPTING, Cell
from saelens_ext.host.chat_template import Prompt, in_words
from saelens_ext.host.models import HostModel
from saelens_ext.steering.interventions import unit_rows
from saelens_ext.steering.judges import Judge
from saelens_ext.steering.sampling import SamplingOptions, sample_steered, sample_texts

UNSTEERED = "unsteered"
TEXT_COLUMNS = [
    "concept", "method", "draw", "column", "sign", "target", "kl", "coefficient", "kl_everywhere", "prompt", "half",
    "number", "text", "judge", "concept_rating", "fluency_rating", "score",
]  # fmt: skip
TEXT_KEY = ["concept", "method", "draw", "sign", "target", "prompt", "number"]
"""What tells texts apart, whoever judged them."""
CHOOSE, REPORT = "choose", "report"
_STRENGTHS = ("kl", "coefficient", "kl_everywhere")
_RATINGS = ("concept_rating", "fluency_rating", "score")


class Asked(NamedTuple):
    """A cell that was asked for, and whether its target was reached."""

    concept: str
    method: str
    draw: int
    reached: bool


def said_texts(
    model: HostModel,
    cells: Sequence[Cell],
    concept: Concept,
    prompts: Sequence[Prompt],
    plain: Sequence[Sequence[str]],
    attempts: Attempts,
    *,
    n: int,
    options: SamplingOptions,
    chat_template_options: Mapping[str, Any] | None,
    batch_size: int,
    prompting: str | None,
) -> list[dict[str, Any]]:
    """What the model says in every cell of a concept that is reached, unsteered (``plain``, given for each prompt), and
    where it is told what to write about.
    """
    rows: list[dict[str, Any]] = []
    how: dict[str, Any] = {"n": n, "options": options, "batch_size": batch_size}
    how["chat_template_options"] = chat_template_options
    reached = [cell for cell in cells if cell.strength.reached]
    for hook, here in groupby(reached, key=lambda cell: cell.arm.hook_name):
        group = list(here)
        with attempts.of("", concept.name):
            offsets = torch.cat([unit_rows(cell.arm.direction[None]) * cell.strength.coefficient for cell in group])
            sampled = sample_steered(model, hook, offsets, prompts, **how)
            for cell, said in zip(group, sampled, strict=True):
                rows += _rows(_of_cell(cell), prompts, said)
    nothing = {"draw": 0, "column": NO_COLUMN, "sign": 1, "target": np.nan}
    nothing |= dict.fromkeys(_STRENGTHS, 0.0)
    rows += _rows({"concept": concept.name, "method": UNSTEERED, **nothing}, prompts, plain)
    if prompting is not None:
        with attempts.of(PROMPTING, concept.name):
            about = concept.description or concept.name
            said = sample_texts(model, [_told(prompting, about, prompt) for prompt in prompts], **how)
            unknown = dict.fromkeys(_STRENGTHS, np.nan)
            rows += _rows({"concept": concept.name, "method": PROMPTING, **nothing, **unknown}, prompts, said)
    return rows


def as_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The rows of :func:`said_texts`, also as JSON has them, which knows no NaN."""
    return pd.DataFrame(rows).astype(dict.fromkeys(("target", *_STRENGTHS), "float64"))


def _told(prompting: str, about: str, prompt: Prompt) -> Prompt:
    """A prompt that says what to write about; of a conversation the last question does."""
    if isinstance(prompt, str):
        return prompting.format(concept=about, prompt=prompt)
    last = max((place for place, one in enumerate(prompt) if one["role"] == "user"), default=0)
    question = prompting.format(concept=about, prompt=prompt[last]["content"])
    return [*prompt[:last], {**prompt[last], "content": question}, *prompt[last + 1 :]]


def judged(
    said: pd.DataFrame,
    judges: Mapping[str, Judge],
    about: Mapping[str, str],
    prompts: Sequence[Prompt],
    attempts: Attempts,
    *,
    seed: int,
) -> pd.DataFrame:
    """Every text with every judge's ratings; a judge reads all texts of a prompt and concept in random order."""
    found, given = [], {in_words(prompt): prompt for prompt in prompts}
    for name, judge in judges.items():
        generator = np.random.default_rng(seed)
        for (concept, prompt), part in said.groupby(["concept", "prompt"], sort=False):
            order = generator.permutation(len(part))
            shuffled = part.iloc[order]
            with attempts.of("", str(concept)):
                scores = judge(about[str(concept)], given[str(prompt)], shuffled["text"].tolist())
                if len(scores) != len(part):
                    raise ValueError(
                        f"The judge {name!r} gave {len(scores)} scores for {len(part)} texts; it must give one each."
                    )
                values = [(one.concept, one.fluency, one.score) for one in scores]
                ratings = pd.DataFrame(values, columns=list(_RATINGS), index=shuffled.index, dtype="float64")
                found.append(shuffled.join(ratings).assign(judge=name).sort_index())
    if not found:
        return pd.DataFrame(columns=TEXT_COLUMNS)
    texts = pd.concat(found, ignore_index=True)[TEXT_COLUMNS]
    for method, part in texts.groupby("method", sort=False):
        missing = part["score"].isna().groupby(part["judge"], sort=False).agg(["sum", "size"])
        if missing["sum"].any():
            with attempts.of(str(method), ""):
                counts = (f"{n} of {all_} texts by {judge!r}" for judge, n, all_ in missing.itertuples() if n)
                raise ValueError(f"no usable rating of {', '.join(counts)}; they are left out of the means")
    return texts


def scores_of(texts: pd.DataFrame, cells: Sequence[Asked] | pd.DataFrame) -> pd.DataFrame:
    """The metrics of every judge, concept, method and draw.

    Args:
        texts: judged.
        cells: the cells asked for, or the metrics of another judge, which know how many were reached.
    """
    asked = _asked(cells)
    rows: list[dict[str, Any]] = []
    keys = ["judge", "concept", "method", "draw"]
    parts = texts[texts["method"] != UNSTEERED].groupby(keys, sort=False)
    steered: dict[Any, pd.DataFrame] = {key: part for key, part in parts}
    unsteered = texts[texts["method"] == UNSTEERED].groupby(["judge", "concept"])
    plain: dict[Any, Any] = {key: part.groupby("prompt")["concept_rating"].mean() for key, part in unsteered}
    for judge in dict.fromkeys(texts["judge"]):
        known = [key[1:] for key in steered if key[0] == judge]
        for concept, method, draw in dict.fromkeys([*known, *asked]):
            where = {"judge": judge, "concept": concept, "method": method, "draw": draw}
            part = steered.get((judge, concept, method, draw))
            missed = asked.get((concept, method, draw))
            values = {} if missed is None else {"unreached": missed}
            if part is not None:
                values |= _held_out(part, plain.get((judge, concept), pd.Series(dtype="float64")))
            elif missed == 1:
                values["score"] = 0.0
            rows += [{**where, "metric": metric, "value": value} for metric, value in values.items()]
    return pd.DataFrame(rows, columns=[*keys, "metric", "value"])


def _held_out(part: pd.DataFrame, plain: pd.Series) -> dict[str, float]:
    """The metrics of one method on one concept: half of the prompts choose target and sign, the others are reported."""
    means = part[part["half"] == CHOOSE].groupby(["sign", "target"], sort=False, dropna=False)["score"].mean().dropna()
    if means.empty:  # no usable rating
        return {}
    sign, target = means.index[int(means.to_numpy().argmax())]
    same = (part["sign"] == sign) & ((part["target"] == target) | (part["target"].isna() & pd.isna(target)))
    report = part[same & (part["half"] == REPORT)]
    by_prompt = report.groupby("prompt", sort=False)[list(_RATINGS)].mean()
    score = float(report["score"].mean())
    difference = (by_prompt["concept_rating"] - plain.reindex(by_prompt.index)).dropna()
    found = {
        "score": score,
        "score_reached": score,
        "concept_rating": float(report["concept_rating"].mean()),
        "fluency_rating": float(report["fluency_rating"].mean()),
        "wrong_way": float((difference < 0).mean()) if len(difference) else np.nan,
        "sd_over_prompts": float(by_prompt["score"].std()),
        "kl_everywhere": float(report["kl_everywhere"].mean()),
    }
    return {name: value for name, value in found.items() if np.isfinite(value)}


def _asked(cells: Sequence[Asked] | pd.DataFrame) -> dict[tuple[str, str, int], float]:
    """By concept, method and draw, the share of targets and signs that were not reached."""
    if isinstance(cells, pd.DataFrame):
        own = cells[cells["metric"] == "unreached"].drop_duplicates(["concept", "method", "draw"])
        return {(row["concept"], row["method"], row["draw"]): row["value"] for row in own.to_dict("records")}
    found: dict[tuple[str, str, int], list[bool]] = {}
    for cell in cells:
        found.setdefault(cell[:3], []).append(not cell.reached)
    return {key: float(np.mean(missed)) for key, missed in found.items()}


def _of_cell(cell: Cell) -> dict[str, Any]:
    return {
        "concept": cell.arm.concept,
        "method": cell.arm.method,
        "draw": cell.arm.draw,
        "column": cell.arm.column,
        "sign": cell.strength.sign,
        "target": cell.strength.target,
        "kl": cell.strength.kl,
        "coefficient": cell.strength.coefficient,
        "kl_everywhere": cell.kl_everywhere,
    }


def _rows(where: dict[str, Any], prompts: Sequence[Prompt], said: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
    for place, (prompt, texts) in enumerate(zip(prompts, said, strict=True)):
        half = CHOOSE if place % 2 == 0 else REPORT
        for number, text in enumerate(texts):
            yield {**where, "prompt": in_words(prompt), "half": half, "number": number, "text": text}
