"""Ratings by people: texts written out without what they were made by, and read back."""

import csv
import hashlib
from pathlib import Path

import numpy as np
import pandas as pd

from saelens_ext import _checks, _files
from saelens_ext.evals.steering.texts import TEXT_COLUMNS, TEXT_KEY
from saelens_ext.steering.judges import MAX_RATING, JudgeScore

COLUMNS = ("id", "concept", "prompt", "text", "concept_rating", "fluency_rating")


def export_for_people(texts: pd.DataFrame, path: str | Path, *, n: int = 100, seed: int = 0) -> Path:
    """Write texts to be rated as a CSV file that tells nothing of how they were made.

    Texts are drawn evenly from methods, unsteered ones among them, and stand in random order. Raters fill in the last
    two columns, each with 0, 1 or 2.

    Args:
        texts: ``texts`` of the evidence of :func:`~saelens_ext.evals.steering.steering.compare_steering`.
        path: of the file.
        n: texts at most.
        seed: of the draw and the order.

    Returns:
        The path.
    """
    texts = texts.drop_duplicates(TEXT_KEY)
    texts = texts.assign(id=text_ids(texts))
    generator = np.random.default_rng(seed)
    shuffled = texts.iloc[generator.permutation(len(texts))]
    # The first of every method, then the second of every method, and so on.
    turn = shuffled.groupby("method", sort=False).cumcount()
    drawn = shuffled.iloc[np.argsort(turn.to_numpy(), kind="stable")[: _checks.positive(n, "n")]]
    drawn = drawn.iloc[generator.permutation(len(drawn))].assign(concept_rating="", fluency_rating="")
    _files.write_together({Path(path): lambda file: drawn.to_csv(file, columns=list(COLUMNS), index=False)})
    return Path(path)


def read_ratings(path: str | Path) -> pd.DataFrame:
    """Read a file of :func:`export_for_people` that was filled in; rows without a rating are left out.

    Returns:
        One row per text: id, concept_rating and fluency_rating in [0, 2].

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column is missing, an id stands twice, a rating is no number from 0 to 2 (its line is named), or
            no text is rated.
    """
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in ("id", "concept_rating", "fluency_rating") if name not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"{path} lacks the columns {', '.join(missing)}; it is not a file of export_for_people.")
        rows = {}
        for row in reader:
            given = [(row[name] or "").strip() for name in ("concept_rating", "fluency_rating")]
            if not any(given):
                continue
            try:
                ratings = [float(value) for value in given]
                JudgeScore(*ratings)
            except ValueError as error:
                raise ValueError(
                    f"Line {reader.line_num} of {path} rates {row['id']} with {given}; both must be numbers from 0 to "
                    f"{MAX_RATING:g}."
                ) from error
            if row["id"] in rows:
                raise ValueError(f"Line {reader.line_num} of {path} rates {row['id']} a second time.")
            rows[row["id"]] = ratings
    if not rows:
        raise ValueError(f"{path} holds no rating yet: fill in concept_rating and fluency_rating with 0, 1 or 2.")
    return pd.DataFrame([(key, *values) for key, values in rows.items()], columns=["id", *COLUMNS[-2:]])


def text_ids(texts: pd.DataFrame) -> list[str]:
    """A name for each text that says nothing of how it was made, the same for equal rows."""
    keys = ("\x1f".join(map(str, row)) for row in texts[TEXT_KEY].itertuples(index=False))
    return [hashlib.sha256(key.encode()).hexdigest()[:12] for key in keys]


def rated_texts(texts: pd.DataFrame, judge: str, ratings: pd.DataFrame) -> pd.DataFrame:
    """The texts with the ratings of another judge.

    Raises:
        ValueError: a name that is taken, or an id that is no text's.
    """
    if judge in set(texts["judge"]):
        raise ValueError(f"A judge is called {judge!r} already; there are {', '.join(dict.fromkeys(texts['judge']))}.")
    own = texts.drop_duplicates(TEXT_KEY)
    own = own.assign(id=text_ids(own))
    unknown = sorted(set(ratings["id"]) - set(own["id"]))
    if unknown:
        raise ValueError(f"{len(unknown)} ratings are of no text of this comparison, the first of {unknown[0]!r}.")
    kept = own.drop(columns=["concept_rating", "fluency_rating", "score"]).merge(ratings, on="id", how="inner")
    scores = [JudgeScore(c, f).score for c, f in zip(kept["concept_rating"], kept["fluency_rating"])]
    return kept.assign(judge=judge, score=scores)[TEXT_COLUMNS]
