"""Draws of another sampler as the model has them: its tokens, its log-probabilities, and how far the two differ."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile
from typing import Any

import torch
from torch import Tensor

from saelens_ext.continuations.collected import Collected
from saelens_ext.continuations.samplers.sampler import Draw, Sampler
from saelens_ext.host.continued_text import ids_after, text_after, text_read_as
from saelens_ext.host.models import HostModel, tokenizer_of
from saelens_ext.host.tokens import token_strings
from saelens_ext.host.turn_ends import end_ids
from saelens_ext.ops.modes import evaluating
from saelens_ext.steering.sampling import Drawn, SamplingOptions, continuation_log_probs

logger = logging.getLogger(__name__)

LARGE = 0.1
"""Nats per token. What bfloat16 makes of the same weights stays below; a model that differs by as much gives twenty
tokens e^2 times another probability."""
CUT_OTHERWISE = 0.1
"""Fraction of tokens with other borders. Sampling rarely cuts a text otherwise than its tokenizer does."""
_HALF = "\ufffd"
_FEWEST = 4
"""Draws to make at a time where fewer are missing, since many draws may be the same."""


@dataclass(frozen=True, kw_only=True)
class _Elsewhere(Drawn):
    """A draw in the model's tokens; its log-probabilities follow."""

    draw: Draw
    by_ids: bool
    """Whether its tokens came with it."""


class ScoredDraws:
    """Draws rows of one prefix from a sampler."""

    def __init__(self, model: HostModel, sampler: Sampler, prefix: str, ids: Tensor, templated: bool):
        self._model, self._sampler, self._ids = model, sampler, ids
        self._text, self._templated = prefix, templated
        self._sent = text_read_as(tokenizer_of(model), prefix, ids.tolist()) or prefix
        self._ends = end_ids(model)
        self._prompt_tokens: set[int] = set()
        self._n_wrong = 0

    def fill(
        self,
        collected: Collected,
        options: SamplingOptions,
        stops: Sequence[str],
        limit: int,
        batch_size: int,
        progress: bool,
    ) -> None:
        """Draw until there are enough rows, or ``limit`` draws were made."""

        def draw(numbers: range) -> list[_Elsewhere]:
            # Other than the model's own, these may cost money, so there are few more than are missing.
            numbers = numbers[: max(collected.n_missing, _FEWEST)]
            found = list(self._sampler.draw(self._sent, self._ids.tolist(), numbers, options, stops))[: len(numbers)]
            if not found:
                raise ValueError(f"The sampler {type(self._sampler).__name__} gave no continuation of {self._text!r}.")
            texts = [self._read(one) for one in found]
            # Their text may be longer, where a stop text was cut off. One that is another tells of all: half
            # characters read alike in every vocabulary.
            self._n_wrong += sum(not (t is None or t.startswith(one.text)) for one, t in zip(found, texts))
            return [self._as_drawn(*one) for one in zip(found, texts, strict=True)]

        collected.fill(draw, limit, batch_size, progress)

    def describe(self) -> dict[str, Any]:
        """What the sampler is."""
        return dict(self._sampler.describe())

    def _as_drawn(self, draw: Draw, read: str | None) -> _Elsewhere:
        """A draw in the model's tokens: its own where they ``read`` as its text."""
        if draw.prompt_tokens is not None:
            self._prompt_tokens.add(draw.prompt_tokens)
        if read == draw.text and not self._n_wrong:
            return _Elsewhere(self._ids_of(draw), torch.zeros(0), draw.ended_by, read, draw=draw, by_ids=True)
        # A limit of tokens may cut a character in two, and its first half is no text.
        text = draw.text.rstrip(_HALF)
        ids = ids_after(self._model, self._text, [text], templated=self._templated)[0] if text else []
        return _Elsewhere(ids, torch.zeros(0), draw.ended_by, text, draw=draw, by_ids=False)

    def _ids_of(self, draw: Draw) -> list[int]:
        """The tokens that came with a draw, without what ended it."""
        return list(takewhile(lambda one: one not in self._ends, map(int, draw.token_ids or ())))

    def _read(self, draw: Draw) -> str | None:
        """What the tokens that came with a draw read as here; None where there are none."""
        if draw.token_ids is None:
            return None
        ids = self._ids_of(draw)
        known = all(0 <= one < int(self._model.cfg.d_vocab) for one in ids)
        return text_after(self._model, self._ids.tolist(), ids) if known else ""

    def scored(self, rows: Sequence[Drawn], batch_size: int) -> tuple[list[Drawn], dict[str, Any]]:
        """The rows with the model's log-probabilities, and how the sampler's differ; large differences are logged."""
        with evaluating(self._model):
            ids = [row.token_ids for row in rows]
            scores = continuation_log_probs(self._model, self._ids, ids, batch_size=batch_size)
        differences: list[float] = []
        n_otherwise = n_seen = 0
        for row, score in zip(rows, scores, strict=True):
            if isinstance(row, _Elsewhere):
                found, otherwise = self._differences(row, score)
                differences += found
                n_otherwise += otherwise
                n_seen += len(found) + otherwise
        otherwise = n_otherwise / n_seen if n_seen else 0.0
        about = {"n_tokens": len(differences), "cut_otherwise": otherwise}
        if differences:
            size = sum(map(abs, differences)) / len(differences)
            about |= {"mean": sum(differences) / len(differences), "mean_absolute": size}
            about["largest"] = max(differences, key=abs)
        self._warn(about)
        return [replace(row, log_probs=score) for row, score in zip(rows, scores, strict=True)], about

    def _differences(self, row: _Elsewhere, scores: Tensor) -> tuple[list[float], int]:
        """The sampler's log-probability less the model's, of every token that both have; and how many they do not."""
        theirs = row.draw.log_probs or []
        if row.by_ids:
            pairs = list(zip(theirs, scores.tolist()))
            return [a - b for a, b in pairs if a is not None and math.isfinite(a)], 0
        pieces, text = token_strings(tokenizer_of(self._model), row.token_ids), row.text or ""
        tokens = row.draw.tokens or []
        if not theirs or "".join(pieces) != text or not _same_text("".join(tokens), text):
            return [], 0  # a character in two tokens, or no tokens: there are no borders to compare
        own = dict(zip(_spans(pieces), scores.tolist()))
        each = [(span, a) for span, a in zip(_spans(tokens), theirs) if span[1] <= len(text)]
        found = [a - own[span] for span, a in each if span in own and a is not None and math.isfinite(a)]
        return found, sum(span not in own for span, _ in each)

    def _warn(self, about: dict[str, Any]) -> None:
        n, name = len(self._ids), type(self._sampler).__name__
        why = []
        if other := sorted(self._prompt_tokens - {n}):
            why.append(f"it read the prefix as {', '.join(map(str, other))} tokens, and the model reads {n}")
        if self._n_wrong:
            why.append(f"the token ids of {self._n_wrong} draws do not read as their texts here")
        if about["cut_otherwise"] > CUT_OTHERWISE:
            why.append(f"it cuts {about['cut_otherwise']:.0%} of the tokens otherwise")
        if why:
            said = (
                "The tokens of the %s are not the model's: %s. Another tokenizer, BOS or template? Texts were scored."
            )
            logger.warning(said, name, "; ".join(why))
        if not about["n_tokens"]:
            said = "The %s gave no log-probability to compare: whether the model that drew is this one is not checked."
            logger.warning(said, name)
        if about.get("mean_absolute", 0.0) > LARGE:
            said = (
                "The log-probabilities of the %s differ from the model's by %.2f nats per token on average, over %d "
                "tokens (above %g): what is audited is not quite what drew. Another model, weights of fewer bits, or "
                "log-probabilities after temperature and top-p?"
            )
            logger.warning(said, name, about["mean_absolute"], about["n_tokens"], LARGE)


def _same_text(tokens: str, text: str) -> bool:
    """Whether tokens make up a text, or what the sampler tells of them: an end behind it, or fewer of them."""
    return bool(tokens) and (tokens.startswith(text) or text.startswith(tokens))


def _spans(pieces: Sequence[str]) -> list[tuple[int, int]]:
    ends = list(accumulate(map(len, pieces)))
    return list(zip([0, *ends], ends))
