"""Concepts given by labelled sentences: one's own from a file, or 24 that arrive in a wheel."""

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow

from saelens_ext import _checks, _files

WHEEL = "sae-probes==0.4.2"

DEFAULT_CONCEPTS: dict[str, str] = {
    "21_headline_istrump": "headlines about Donald Trump",
    "22_headline_isobama": "headlines about Barack Obama",
    "23_headline_ischina": "headlines about China",
    "24_headline_isiran": "headlines about Iran",
    "66_living-room": "text that ends in 'living room'",
    "67_social-security": "text that ends in 'social security'",
    "68_credit-card": "text that ends in 'credit card'",
    "69_blood-pressure": "text that ends in 'blood pressure'",
    "72_gene-expression": "text that ends in 'gene expression'",
    "74_magnetic-field": "text that ends in 'magnetic field'",
    "76_trial-court": "text that ends in 'trial court'",
    "78_north-america": "text that ends in 'North America'",
    "80_side-effects": "text that ends in 'side effects'",
    "96_spam_is": "spam messages",
    "105_click_bait": "clickbait headlines",
    "113_movie_sent": "favourable sentences about films",
    "130_temp_cat_Frequency": "questions about how often",
    "133_context_type_Causality": "questions about why",
    "139_news_class_Politics": "news of the world",
    "140_news_class_Technology": "news of business",
    "141_news_class_Entertainment": "news of science and technology",
    "149_twt_emotion_happiness": "happy messages",
    "150_twt_emotion_sadness": "sad messages",
    "152_it_tick_Hardware": "help-desk tickets about hardware",
}
"""Sets of sae-probes by name, and what their positive sentences are by looking at them (the three sets of news are
misnamed there)."""

_POSITIVE_LABELS = ("1", "True", "yes", "bigram", "clickbait", "correct", "incorrect", "A", "female")
_KEYS = ("name", "positives", "negatives", "hard_negatives", "description")


@_checks.normalising
@dataclass(frozen=True, kw_only=True)
class Concept:
    """What some sentences show and others do not."""

    name: str
    """Different for each concept."""
    positives: tuple[str, ...]
    """Sentences that show it."""
    negatives: tuple[str, ...]
    """Sentences that do not."""
    hard_negatives: tuple[str, ...] = ()
    """Sentences that do not, and look as if they did; never used to choose, and reported apart."""
    description: str = ""
    """What a positive sentence shows, in words."""

    def __post_init__(self) -> None:
        _checks.text(self.name, "name")
        for side in ("positives", "negatives", "hard_negatives"):
            given = getattr(self, side)
            where = f"{side} of the concept {self.name!r}"
            if side != "hard_negatives" or len(given):
                object.__setattr__(self, side, tuple(_checks.texts(given, where, "sentence")))
        shared = shared_sentences(self.positives, (*self.negatives, *self.hard_negatives))
        if shared:
            raise ValueError(
                f"The concept {self.name!r} has {len(shared)} sentences both as positive and as negative, for example "
                f"{shared[0]!r} (compared without case and outer spaces). Take them out of one side."
            )


def normal_form(sentence: str) -> str:
    """What equal sentences have in common: no outer spaces, lower case."""
    return sentence.strip().lower()


def shared_sentences(first: Iterable[str], second: Iterable[str]) -> list[str]:
    """Sentences of the first collection that are in the second too, but for case and outer spaces."""
    known = {normal_form(sentence) for sentence in second}
    return [sentence for sentence in first if normal_form(sentence) in known]


def read_concepts(path: str | Path) -> list[Concept]:
    """Read concepts from a JSONL file.

    Args:
        path: one JSON object a line, with "name", "positives", "negatives" and, if wanted, "hard_negatives" and
            "description"; empty lines are skipped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no such object, naming it; a name given twice; no concept at all.
    """
    return check_concepts(_files.read_json_lines(path, _concept), f"The file {path}")


def check_concepts(concepts: Sequence[Concept], what: str = "concepts") -> list[Concept]:
    """Return the concepts as a list; ValueError where there is none or two have one name."""
    names = [concept.name for concept in concepts]
    if not names:
        raise ValueError(f"{what} has no concept; give at least one, and 6 or more for a claim.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{what} has the name {twice[0]!r} {names.count(twice[0])} times; give each concept its own.")
    return list(concepts)


def packaged_concepts(
    names: Sequence[str] | None = None,
    *,
    n_per_side: int = 100,
    words: tuple[int, int] = (4, 60),
    seed: int = 0,
) -> list[Concept]:
    """Concepts from the labelled sets that the wheel of sae-probes ships; read where they lie.

    Args:
        names: sets by name, such as ``"96_spam_is"``, of two labels; by default those of `DEFAULT_CONCEPTS`.
        n_per_side: different sentences of either label, drawn at random.
        words: the fewest and the most words of a sentence.
        seed: of the draw.

    Raises:
        ImportError: the wheel is not installed.
        ValueError: no such set, one of more than two labels, or too few sentences of that length.

    Source: Kantamneni et al., "Are sparse autoencoders useful? A case study in sparse probing", arXiv 2502.16681; the
    sets are those of its authors and have licences of their own.
    """
    _checks.positive(n_per_side, "n_per_side")
    chosen = list(DEFAULT_CONCEPTS) if names is None else _checks.listed(names, "names", "name")
    found = [_packaged(each, _rows(each, f"names[{i}]"), n_per_side, words, seed) for i, each in enumerate(chosen)]
    return check_concepts(found, "names")


def packaged_texts(name: str, *, n: int = 100, words: tuple[int, int] = (4, 2_000), seed: int = 0) -> list[str]:
    """Different texts of a set of sae-probes, whatever their labels; read where they lie.

    Args:
        name: of the set, such as ``"97_news_class"``; any of them, of however many labels.
        n: how many at most, drawn at random.
        words: the fewest and the most words of a text.
        seed: of the draw.

    Raises:
        ImportError: the wheel is not installed.
        ValueError: no such set.
    """
    rows = _of_length(_rows(name, "name"), words).drop_duplicates("key")
    order = np.random.default_rng(seed).permutation(len(rows))[: _checks.positive(n, "n")]
    return rows["prompt"].iloc[order].tolist()


def _rows(name: str, what: str) -> pd.DataFrame:
    """The texts of a set with their labels."""
    folder = _folder()
    known = [path.name.removesuffix(".csv.zst") for path in sorted(folder.glob("*.csv.zst"))]
    path = folder / f"{_checks.choice(name, known, what)}.csv.zst"
    table = pd.read_csv(pyarrow.input_stream(str(path), compression="zstd"))
    return table[["prompt", "target"]].dropna().astype(str)


def _of_length(rows: pd.DataFrame, words: tuple[int, int]) -> pd.DataFrame:
    """The rows of so many words, each with the normal form of its text as "key"."""
    is_allowed = [words[0] <= len(text.split()) <= words[1] for text in rows["prompt"]]
    return rows[is_allowed].assign(key=lambda own: own["prompt"].map(normal_form))


def _packaged(name: str, rows: pd.DataFrame, n_per_side: int, words: tuple[int, int], seed: int) -> Concept:
    labels = sorted(set(rows["target"]))
    positive = [label for label in labels if label in _POSITIVE_LABELS]
    if len(labels) != 2 or not positive:
        raise ValueError(
            f"The set {name!r} has the labels {labels[:5]}, {len(labels)} in all; a concept needs a set of two labels, "
            "one of them such as 1, True or yes."
        )
    rows = _of_length(rows, words)
    # A sentence that is there with both labels teaches nothing.
    rows = rows[rows.groupby("key")["target"].transform("nunique") == 1].drop_duplicates("key")
    is_positive = rows["target"] == positive[0]
    sides = {"positives": rows[is_positive], "negatives": rows[~is_positive]}
    for side, own in sides.items():
        if len(own) < n_per_side:
            raise ValueError(
                f"The set {name!r} has {len(own)} different {side} of {words[0]} to {words[1]} words, fewer than "
                f"n_per_side={n_per_side}. Lower n_per_side or widen words."
            )
    generator = np.random.default_rng(seed)
    drawn = {side: own["prompt"].iloc[generator.permutation(len(own))[:n_per_side]] for side, own in sides.items()}
    return Concept(
        name=name.split("_", 1)[1],
        description=DEFAULT_CONCEPTS.get(name, ""),
        **{side: tuple(sentences) for side, sentences in drawn.items()},
    )


def _concept(fields: Any) -> Concept:
    if not isinstance(fields, dict):
        raise ValueError(f"expected an object with {', '.join(_KEYS)}, got {type(fields).__name__}.")
    _checks.known_keys(fields, _KEYS, "A concept")
    missing = [key for key in _KEYS[:3] if key not in fields]
    if missing:
        raise ValueError(f"the concept lacks {', '.join(missing)}.")
    return Concept(**{"hard_negatives": (), "description": ""} | fields)


def _folder() -> Path:
    spec = importlib.util.find_spec("sae_probes")
    if spec is None or spec.origin is None:
        raise ImportError(f"The packaged concepts come with a wheel: pip install --no-deps {WHEEL}")
    return Path(spec.origin).parent / "data" / "cleaned_data"
