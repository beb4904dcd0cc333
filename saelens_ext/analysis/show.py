"""One latent as a notebook and a terminal show it.

Whatever the corpus holds is text here: markup is escaped, and characters that could hide or reorder others are spelt
out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from saelens_ext.analysis.examples import Examples
from saelens_ext.host.tokens import token_strings, visible

_CHIP = "background:rgba(127,127,127,.18);border-radius:3px;padding:0 .3em;unicode-bidi:isolate"
_CONTEXT = "margin:.25em 0;white-space:pre-wrap;overflow-wrap:anywhere"
_QUIET = "opacity:.7;font-size:.9em"


@runtime_checkable
class LatentLabels(Protocol):
    """:class:`Labels`, of which only this is asked."""

    def __len__(self) -> int: ...
    def __getitem__(self, latent: int, /) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class ShownContext:
    """One example."""

    tokens: Sequence[str]
    """The text of every token."""
    mark: int
    """Index of the token that the example is of."""
    values: Sequence[float] | None
    """The latent's code at each token, NaN where it was not read; None where the profile has not kept them."""
    value: float
    """What ranks the example."""
    document: int
    """Row of the dataset."""


@dataclass(frozen=True, kw_only=True, repr=False)
class LatentView:
    """What :meth:`DictionaryProfile.show` gives: HTML in a notebook, plain text elsewhere."""

    name: str
    """Of the latent."""
    label: str
    """Its label; empty where none was given."""
    score: str
    """How well the label was found to fit."""
    statistics: dict[str, str]
    """Its figures by name."""
    promoted: Sequence[str]
    """Tokens that its direction promotes, the most promoted first."""
    contexts: Sequence[ShownContext]
    """Its examples, the best first."""

    def __repr__(self) -> str:
        head = f"{self.name}: {_plain(self.label)} ({_plain(self.score)})" if self.score else self.name
        lines = [_plain(head), "; ".join(f"{name} {value}" for name, value in self.statistics.items())]
        if self.promoted:
            lines.append("promotes " + ", ".join(repr(_plain(token)) for token in self.promoted))
        for one in self.contexts:
            parts = one.tokens[: one.mark], one.tokens[one.mark : one.mark + 1], one.tokens[one.mark + 1 :]
            before, token, after = (_plain("".join(part)) for part in parts)
            lines.append(f"{one.value:9.4g}  {before}<<{token}>>{after}")
        return "\n".join([*lines, *self._empty()])

    def _repr_html_(self) -> str:
        head = f"<b>{_html(self.name)}</b>"
        if self.score:
            head += f' <span style="{_CHIP}">{_html(self.label) or "no label"}</span>'
            head += f' <span style="{_QUIET}">{_html(self.score)}</span>'
        figures = " · ".join(f"{_html(name)} <b>{_html(value)}</b>" for name, value in self.statistics.items())
        parts = [f"<div>{head}</div>", f'<div style="{_QUIET}">{figures}</div>']
        if self.promoted:
            chips = " ".join(f'<span style="{_CHIP}">{_html(token)}</span>' for token in self.promoted)
            parts.append(f'<div style="margin:.25em 0">promotes {chips}</div>')
        largest = max((abs(v) for one in self.contexts for v in one.values or () if not math.isnan(v)), default=0.0)
        parts += [_context(one, largest) for one in self.contexts]
        parts += [f"<div>{line}</div>" for line in self._empty()]
        return f'<div style="max-width:60em">{"".join(parts)}</div>'

    def _empty(self) -> list[str]:
        return [] if self.contexts else ["It was active on no profiled token."]


def shown_contexts(examples: Examples, latent: int, tokenizer: PreTrainedTokenizerBase, n: int) -> list[ShownContext]:
    """The first ``n`` examples of a latent as text."""
    found = []
    half = examples.contexts.shape[2] // 2
    for number in range(min(n, examples.values.shape[1])):
        if int(examples.token_ids[latent, number]) < 0:
            break
        row = examples.contexts[latent, number]
        values = None if examples.token_values is None else examples.token_values[latent, number][row >= 0].tolist()
        found.append(
            ShownContext(
                tokens=token_strings(tokenizer, row[row >= 0]),
                mark=int((row[:half] >= 0).sum()),
                values=values,
                value=float(examples.values[latent, number]),
                document=int(examples.document_ids[latent, number]),
            )
        )
    return found


def _context(one: ShownContext, largest: float) -> str:
    """A line of tokens, each the more coloured the larger its value."""
    values = [math.nan] * len(one.tokens) if one.values is None else one.values
    tokens = "".join(
        _token(token, value, largest, number == one.mark)
        for number, (token, value) in enumerate(zip(one.tokens, values, strict=True))
    )
    place = f'<span style="{_QUIET}"> document {one.document}</span>'
    return f'<div style="{_CONTEXT}"><code>{one.value:.4g}</code> {tokens}{place}</div>'


def _token(token: str, value: float, largest: float, marked: bool) -> str:
    style = "unicode-bidi:isolate"
    if largest > 0 and value and not math.isnan(value):
        colour = "230,120,0" if value > 0 else "0,110,230"
        style += f";background:rgba({colour},{0.1 + 0.6 * abs(value) / largest:.2f})"
    if marked:
        style += ";font-weight:bold;text-decoration:underline"
    title = "not read" if math.isnan(value) else f"{value:.4g}"
    return f'<span style="{style}" title="{title}">{_html(token)}</span>'


def _plain(text: str) -> str:
    return visible(text).replace("\n", "↵").replace("\t", "⇥")


def _html(text: str) -> str:
    return escape(_plain(text))
