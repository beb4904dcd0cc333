"""Which examples of a profile make a label, and which others it is scored on.

Symbols
    k       latents
    m       rows of the table: every example of every latent, then the random activations
    window  what a context is cut from: no two contexts of different windows overlap
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from saelens_ext.analysis.background import Background
from saelens_ext.analysis.examples import Examples
from saelens_ext.analysis.profile import DictionaryProfile
from saelens_ext.host.tokens import one_line, special_token_ids, token_strings

DENSE = 0.5
"""Fraction of all activations from which on random members say nothing: then strong examples are scored instead."""
N_OTHERS = 512
"""Random activations at most, where they have to be taken from the examples of other latents."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """The rows of one latent."""

    making: np.ndarray
    """Examples that make its label, the strongest first."""
    members: np.ndarray
    """Other examples of it, one per window, from windows that made nothing."""
    others: np.ndarray
    """Random activations that are none of its members, from windows that made nothing."""


class Made:
    """Labels of all latents before they are scored."""

    name: str
    """What made them."""
    texts: list[str]
    """One per latent, empty for one without."""
    outputs: Sequence[str] = ()
    sentences: Sequence[dict[str, list[str]]] = ()

    def scores(self, latent: int, rows: np.ndarray) -> np.ndarray:
        """How well the label of a latent fits each of some rows."""
        raise NotImplementedError


class ExampleRows:
    """The examples of a profile as one table; ``seed`` chooses random activations where the profile has kept none.

    Raises:
        ValueError: the profile holds no example, or the tokenizer is not the one that made its tokens.
    """

    def __init__(self, profile: DictionaryProfile, tokenizer: PreTrainedTokenizerBase, seed: int):
        self._tokenizer, self._profile = tokenizer, profile
        tables = [table for table in (profile.top, profile.random) if table is not None]
        parts = [_flat(table, source) for source, table in enumerate(tables)]
        columns = [np.concatenate(column) for column in zip(*parts)]
        self.latents, self.source, self.values, self.contexts, self.windows, self.positions = columns
        self.n_examples = len(self.latents)
        if self.n_examples == 0:
            raise ValueError(
                f"The profile holds no example of any of its {profile.d_sae} latents "
                f"({profile.n_activations} activations were read): profile the dictionary on more text."
            )
        pool = self._others(seed)
        # What a label is made against must not be what it is scored against.
        self.making_pool, self.pool = pool[::2], pool[1::2]
        self._check_tokenizer()

    def _others(self, seed: int) -> np.ndarray:
        """Rows of random activations: those that the profile has kept, else examples of any latent."""
        background = self._profile.background
        if background is None:
            generator = np.random.default_rng(seed)
            return np.sort(generator.permutation(self.n_examples)[:N_OTHERS])
        n = len(background.positions)
        added = (np.full(n, -1), np.full(n, -1), np.full(n, np.nan), *_places(background, slice(None)))
        columns = [self.latents, self.source, self.values, self.contexts, self.windows, self.positions]
        columns = [np.concatenate(pair) for pair in zip(columns, added)]
        self.latents, self.source, self.values, self.contexts, self.windows, self.positions = columns
        return self.n_examples + np.arange(n)

    @cached_property
    def _members(self) -> dict[int, np.ndarray]:
        """For each latent the rows of random activations that are members of it."""
        background = self._profile.background
        if background is None or not len(background.active):
            return {}
        rows, latents = background.active[background.active[:, 1].sort(stable=True).indices].T.numpy()
        starts = np.flatnonzero(np.diff(latents, prepend=-1))
        return dict(zip(latents[starts].tolist(), np.split(self.n_examples + rows, starts[1:])))

    def _check_tokenizer(self) -> None:
        largest, known = int(self.contexts.max()), len(self._tokenizer)
        if largest >= known:
            raise ValueError(
                f"The profile holds token id {largest}, and the tokenizer given has {known} tokens: give that of the "
                "model that was profiled."
            )

    # --- texts ---

    @cached_property
    def strings(self) -> dict[int, str]:
        """The text of every token."""
        ids = [int(token) for token in np.unique(self.contexts) if token >= 0]
        return dict(zip(ids, token_strings(self._tokenizer, ids)))

    @cached_property
    def _special(self) -> set[int]:
        return {-1, *special_token_ids(self._tokenizer)}

    def token(self, row: int) -> str:
        """The token at an activation."""
        return self.strings[int(self.contexts[row, self._profile.context])]

    def text(self, row: int) -> str:
        """Its context without special tokens."""
        return "".join(self.strings[token] for token in self.contexts[row].tolist() if token not in self._special)

    def marked(self, row: int) -> str:
        """Its context on one line, the token between ``<<`` and ``>>``."""
        half, context = self._profile.context, self.contexts[row].tolist()
        parts = context[:half], context[half : half + 1], context[half + 1 :]
        before, token, after = ("".join(self.strings[t] for t in part if t not in self._special) for part in parts)
        return one_line(f"{before}<<{token or self.token(row)}>>{after}")

    # --- rows ---

    def splits(self, make: bool) -> Iterator[Split]:
        """The rows of each latent; with ``make=False`` no example is used up for making its label."""
        dense = (self._profile.counts > DENSE * self._profile.n_activations).numpy()
        known = ((self.source == 0) | ~dense[self.latents])[: self.n_examples]
        order = np.argsort(self.latents[: self.n_examples], kind="stable")
        order = order[known[order]]
        ends = np.searchsorted(self.latents[order], np.arange(self._profile.d_sae + 1))
        for latent in range(self._profile.d_sae):
            rows = order[ends[latent] : ends[latent + 1]]
            making = self._making(rows) if make else rows[:0]
            used = self.windows[making], self._texts[making]
            members = self._fresh(rows[self.source[rows] == 1], *used)
            if len(members) < 2:
                members = self._fresh(rows, *used)
            others = self.pool[~np.isin(self._places[self.pool], self._places[rows])]
            others = np.setdiff1d(others, self._members.get(latent, []))
            yield Split(making=making, members=members, others=others[self._is_fresh(others, *used)])

    @cached_property
    def _texts(self) -> np.ndarray:
        """A number for every different context: ``(m,)``."""
        return np.unique(self.contexts, axis=0, return_inverse=True)[1].reshape(-1)

    @cached_property
    def _places(self) -> np.ndarray:
        """A number for every different place in the stream: ``(m,)``."""
        return self.windows.astype(np.int64) * (int(self.positions.max()) + 1) + self.positions

    def _making(self, rows: np.ndarray) -> np.ndarray:
        """The strongest examples: all of them where random ones can score, else those of every other window."""
        top = rows[self.source[rows] == 0]
        if len(np.setdiff1d(self.windows[rows], self.windows[top])) >= 2:
            return top
        ranked = list(dict.fromkeys(self.windows[top].tolist()))
        return top[np.isin(self.windows[top], ranked[::2])]

    def _is_fresh(self, rows: np.ndarray, windows: np.ndarray, texts: np.ndarray) -> np.ndarray:
        return ~(np.isin(self.windows[rows], windows) | np.isin(self._texts[rows], texts))

    def _fresh(self, rows: np.ndarray, windows: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """The first row of each window, without those of the windows and the texts given."""
        rows = rows[self._is_fresh(rows, windows, texts)]
        return rows[np.sort(np.unique(self.windows[rows], return_index=True)[1])]


def _flat(examples: Examples, source: int) -> tuple[np.ndarray, ...]:
    """The examples that there are, in order of latents and ranks."""
    filled = examples.token_ids >= 0
    latents = filled.nonzero()[:, 0].numpy()
    return latents, np.full(len(latents), source), examples.values[filled].numpy(), *_places(examples, filled)


def _places(examples: Examples | Background, filled: Any) -> tuple[np.ndarray, ...]:
    """Contexts, windows and positions; the window is the document where older profiles kept no more."""
    windows = examples.document_ids if examples.sequence_ids is None else examples.sequence_ids
    return tuple(column[filled].numpy() for column in (examples.contexts, windows, examples.positions))
