"""Where in a continuation its answer is: behind the reasoning that leads to it, or at some of its tokens."""

import logging
from bisect import bisect_right
from collections.abc import Sequence
from numbers import Integral

import torch
from transformers import PreTrainedTokenizerBase

from saelens_ext import _checks
from saelens_ext.continuations.continuation_set import ContinuationSet
from saelens_ext.host.continued_text import text_behind
from saelens_ext.host.models import HostModel, tokenizer_of
from saelens_ext.ops.modes import standard_modes

logger = logging.getLogger(__name__)

MISSING = ("raise", "exclude")


@standard_modes()
def mark_answers(
    model: HostModel,
    continuations: ContinuationSet,
    *,
    after: str = "",
    span: tuple[int | None, int | None] | None = None,
    missing: str = "raise",
) -> ContinuationSet:
    """Say which part of each continuation is its answer.

    Every later stage goes by it: the answer alone is embedded, behind the prompt; its tokens alone make the target of
    attribution, whose signatures are still of the prefix; and effects of steering are measured on it. Log-probabilities
    and weights stay those of the whole continuation.

    Args:
        model: of the continuations, with its tokenizer.
        continuations: the set.
        after: the marker that the answer stands behind, ``"</think>"`` for example; the last one, where there are
            several. The answer's first token is the one that holds its first visible character.
        span: instead, the first token of the answer and the one past its last, as in a slice: negative from the end,
            None for the end itself.
        missing: ``"raise"`` an error where a continuation has no answer with visible text, or ``"exclude"`` such
            continuations, with a logged warning.

    Returns:
        The set with the columns ``answer_start`` and ``answer_end`` (tokens), ``answer_text_start`` and
        ``answer_text_end`` (characters of the text).

    Raises:
        ValueError: both or neither of after and span, an empty marker, or one of another type; continuations without
            an answer, or none with one.

    Examples:
        >>> given = sx.score_continuations(model, "The assert", [" is so = one", " was so = two"])
        >>> sx.mark_answers(model, given, after=" =").answers
        (' one', ' two')
    """
    _checks.choice(missing, MISSING, "missing")
    if bool(after) == (span is not None):
        raise ValueError(f"Give either after, a text, or span, a pair of tokens; got {after!r} and {span!r}.")
    if after:
        _checks.text(after, "after")
    elif not _is_span(span):
        raise ValueError(
            f"span must be a pair of whole numbers or None, as (-3, None) for the last three tokens; got {span!r}."
        )
    tokenizer, n = tokenizer_of(model), len(continuations)
    places = [_place(tokenizer, continuations, row, after, span) for row in range(n)]
    has = [place is not None for place in places]
    if not all(has):
        of = f"behind {after!r}" if after else f"at the tokens {span}"
        first = continuations.texts[has.index(False)]
        lacking = f"{n - sum(has)} of {n} continuations have no text {of}, such as {first!r:.200}"
        if missing == "raise" or not any(has):
            remedy = "missing='exclude' leaves them out."
            if not any(has):
                remedy = f"Is {after!r} what the model writes?" if after else "Give other tokens."
            raise ValueError(f"{lacking}. Raise max_new_tokens if they were cut off before. {remedy}")
        logger.warning("%s; they are left out.", lacking)
        continuations = continuations.select(has)
    found = torch.tensor([place for place in places if place is not None])
    names = ("answer_start", "answer_end", "answer_text_start", "answer_text_end")
    return continuations.with_columns(dict(zip(names, found.T.contiguous(), strict=True)))


def _is_span(span: object) -> bool:
    ends = span if isinstance(span, tuple | list) else ()
    return len(ends) == 2 and all(one is None or isinstance(one, Integral) for one in ends)


def _place(
    tokenizer: PreTrainedTokenizerBase,
    continuations: ContinuationSet,
    row: int,
    after: str,
    span: tuple[int | None, int | None] | None,
) -> tuple[int, int, int, int] | None:
    """First and past-the-last token and character of an answer; None where there is none."""
    ids, text, prefix = continuations.ids_of(row), continuations.texts[row], continuations.prefix_ids

    def length(n: int) -> int:
        return min(len(text_behind(tokenizer, prefix, ids[:n])), len(text))

    if span is not None:
        start, end, _ = slice(*span).indices(len(ids))
        characters = length(start), length(end)
        visible = start < end and bool(text[slice(*characters)].strip())
        return (start, end, *characters) if visible else None
    token = _behind_token(tokenizer, ids, after)
    place = text.rfind(after) + len(after) if token is None else length(token)
    if (token is None and after not in text) or not text[place:].strip():
        return None
    # The token that holds the first visible character; texts grow with their tokens.
    seen = len(text) - len(text[place:].lstrip())
    return bisect_right(range(1, len(ids)), seen, key=length), len(ids), place, len(text)


def _behind_token(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], marker: str) -> int | None:
    """The place behind the last token that is the marker, which may be special and have no text."""
    token = tokenizer.convert_tokens_to_ids(marker)
    if not isinstance(token, int) or token == tokenizer.unk_token_id or token not in ids:
        return None
    return len(ids) - list(reversed(ids)).index(token)
