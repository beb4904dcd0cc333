"""What describes latents in words: anything that can be shown examples and asked."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np
from transformers import PreTrainedTokenizerBase

from saelens_ext.analysis.labels_examples import ExampleRows, Made, Split
from saelens_ext.analysis.logit_lens import LensResult
from saelens_ext.host.tokens import one_line, token_strings

N_SHOWN, N_TOKENS, N_RATED = 10, 25, 10
"""Examples and tokens that a labeller is shown, and how many members and random activations it is asked about."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a labeller is shown of one latent; every text is one line in which nothing is invisible."""

    latent: int
    """Its index."""
    contexts: list[str]
    """The strongest contexts, the activating token of each between ``<<`` and ``>>``."""
    values: list[float]
    """Their activations; for a region the cosine distances to its exemplar, the nearest first."""
    promoted: list[str] = field(default_factory=list)
    """Tokens that its direction promotes, the most promoted first; empty without a lens."""
    suppressed: list[str] = field(default_factory=list)
    """Tokens that it suppresses."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a labeller says of one latent; empty where it gave no usable answer."""

    input: str
    """What the latent responds to: its label."""
    output: str = ""
    """What it makes the model say."""
    activating: list[str] = field(default_factory=list)
    """Sentences written to activate it."""
    neutral: list[str] = field(default_factory=list)
    """Sentences written not to."""


@runtime_checkable
class Labeller(Protocol):
    """Describes latents, and says how well a description fits a context."""

    def describe(self, evidence: list[Evidence]) -> list[Description]:
        """One description per latent, in order."""
        ...

    def rate(self, questions: list[tuple[str, list[str]]]) -> list[list[float]]:
        """How well each description fits each of its contexts; larger is better, NaN where no answer was usable."""
        ...


class LabellerLabels(Made):
    """The descriptions of a labeller, and its own ratings of how well they fit.

    ``splits`` say which rows may be shown and which are kept for the score (:func:`to_rate`); ``seed`` orders the
    contexts to be rated.
    """

    def __init__(
        self,
        labeller: Labeller,
        rows: ExampleRows,
        splits: Sequence[Split],
        lens: LensResult | None,
        tokenizer: PreTrainedTokenizerBase,
        chosen: Sequence[int],
        seed: int,
    ):
        self.name = str(getattr(labeller, "model", type(labeller).__name__))
        asked = [latent for latent in chosen if len(splits[latent].making)]
        shown = [_evidence(latent, rows, splits[latent], lens, tokenizer) for latent in asked]
        found = dict(zip(asked, labeller.describe(shown), strict=True))
        blank = Description(input="")
        described = [found.get(latent, blank) for latent in range(len(splits))]
        self.texts = [one_line(one.input) for one in described]
        self.outputs = [one_line(one.output) for one in described]
        self.sentences = [{"activating": one.activating, "neutral": one.neutral} for one in described]
        self._ratings = self._rate(labeller, rows, splits, asked, np.random.default_rng(seed))

    def _rate(
        self,
        labeller: Labeller,
        rows: ExampleRows,
        splits: Sequence[Split],
        asked: Sequence[int],
        generator: np.random.Generator,
    ) -> dict[tuple[int, int], float]:
        """The rating of every row that is to be scored, by latent and row."""
        pairs = [(n, np.concatenate([splits[n].members, splits[n].others])) for n in asked if self.texts[n]]
        pairs = [(latent, generator.permutation(shown)) for latent, shown in pairs]
        questions = [(self.texts[latent], [rows.marked(row) for row in shown.tolist()]) for latent, shown in pairs]
        answers = labeller.rate(questions)
        return {
            (latent, int(row)): rating
            for (latent, shown), ratings in zip(pairs, answers, strict=True)
            for row, rating in zip(shown, ratings, strict=True)
        }

    def scores(self, latent: int, rows: np.ndarray) -> np.ndarray:
        """The labeller's ratings."""
        return np.array([self._ratings[latent, row] for row in rows.tolist()], dtype=np.float64)


def to_rate(splits: Sequence[Split], seed: int) -> list[Split]:
    """The splits with as few members and random activations as a labeller is asked about."""
    random = np.random.default_rng(seed)
    return [replace(s, members=s.members[:N_RATED], others=random.permutation(s.others)[:N_RATED]) for s in splits]


def _evidence(
    latent: int, rows: ExampleRows, split: Split, lens: LensResult | None, tokenizer: PreTrainedTokenizerBase
) -> Evidence:
    making = split.making[:N_SHOWN]

    def tokens(name: str) -> list[str]:
        ids = [] if lens is None else getattr(lens, name)[latent, :N_TOKENS].tolist()
        return [one_line(text) for text in token_strings(tokenizer, ids)]

    return Evidence(
        latent=latent,
        contexts=[rows.marked(row) for row in making.tolist()],
        values=rows.values[making].tolist(),
        promoted=tokens("promoted_ids"),
        suppressed=tokens("suppressed_ids"),
    )
