"""A prefix and continuations of it, with everything that later steps find out about each, row by row.

A set never changes: each step returns a new one with one more view of the same rows.

Symbols
    n     continuations (rows); T the longest one's tokens
    p_t   log-probability of token t in nats, at temperature 1 under the whole distribution
    w     weights, positive, summing to 1
    ESS   effective sample size (sum w)^2 / sum w^2, in [1, n]
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saelens_ext import _checks, _files
from saelens_ext.continuations.source_table import SourceTable
from saelens_ext.ops.modes import standard_modes

PADDING = -1
"""Token id beyond a continuation's end."""
WEIGHTINGS = ("uniform", "frequency", "path", "length_normalised")

_FORMAT = _files.Format("continuations", "saelens_ext.ContinuationSet", version=2, oldest=2)
_VIEWS = ("token_ids", "lengths", "log_probs", "weights", "embeddings", "signatures")


@dataclass(frozen=True, kw_only=True, eq=False)
class ContinuationSet:
    """Continuations of one prefix; every view has one row per continuation.

    Made by ``sample_continuations`` or ``score_continuations``.

    Raises:
        ValueError: views with different numbers of rows, an empty continuation, weights that are not positive, or
            numbers that are not finite.
    """

    prompt: str
    """What the user gave: the prefix before a chat template was put around it."""
    prefix: str
    """The text that every continuation goes on from, without BOS where BOS was added; with a chat template what the
    template made of the prompt."""
    prefix_ids: tuple[int, ...]
    """The tokens that every stage puts before a continuation, BOS included where there is one."""
    token_ids: Tensor
    """``(n, T)`` int64, -1 beyond a continuation's end."""
    lengths: Tensor
    """``(n,)`` int64, tokens per continuation, at least 1."""
    texts: tuple[str, ...]
    """Untrimmed: with a leading space and a stop text, as in the tokens. Equal texts may have different tokens."""
    log_probs: Tensor
    """p_t, float32 ``(n, T)``, 0 beyond a continuation's end."""
    weights: Tensor
    """w, float64 ``(n,)``."""
    embeddings: Tensor | None = None
    """Semantic view, float32 ``(n, d_e)``, unit rows."""
    signatures: Tensor | None = None
    """Mechanistic view, float32 ``(n, d_a)``: what each source of the prefix did for each continuation."""
    sources: SourceTable | None = None
    """What the columns of ``signatures`` are, ``d_a`` rows."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """Further numbers, one per row, by name (``"count"``: how often it was sampled; totals of an attribution)."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """JSON-safe: how the set was made; ``"prepend_bos"`` says whether the prefix starts with BOS."""

    def __post_init__(self) -> None:
        rows = len(self.texts)
        views = self._views() | dict(self.columns)
        wrong = {name: len(view) for name, view in views.items() if len(view) != rows}
        if rows == 0 or wrong:
            raise ValueError(f"A ContinuationSet needs one row or more and views of as many: {rows} texts, {wrong}.")
        if not self.prefix_ids:
            raise ValueError("prefix_ids is empty; a continuation needs at least one token to go on from.")
        empty = (self.lengths < 1).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"Continuations {empty[:10]} have no token; leave empty continuations out.")
        for name in ("log_probs", "embeddings", "signatures"):
            if name in views:
                _checks.finite(views[name], name)
        _checked_weights(self.weights, rows)
        if self.sources is not None and (self.signatures is None or len(self.sources) != self.signatures.shape[1]):
            raise ValueError(f"sources describes {len(self.sources)} columns; signatures must have as many.")

    def __len__(self) -> int:
        return len(self.texts)

    # --- the rows ---

    @property
    @standard_modes()
    def mask(self) -> Tensor:
        """``(n, T)`` bool, True at real tokens."""
        return torch.arange(self.token_ids.shape[1]) < self.lengths[:, None]

    @property
    @standard_modes()
    def answer_mask(self) -> Tensor:
        """``(n, T)`` bool, True at tokens of the answers that :func:`mark_answers` found; at all real ones without."""
        if "answer_start" not in self.columns:
            return self.mask
        places = torch.arange(self.token_ids.shape[1])
        return (places >= self.columns["answer_start"][:, None]) & (places < self.columns["answer_end"][:, None])

    @property
    def answers(self) -> tuple[str, ...]:
        """The text of each answer; the whole one where none are marked."""
        if "answer_start" not in self.columns:
            return self.texts
        ends = (self.columns[f"answer_text_{end}"].tolist() for end in ("start", "end"))
        return tuple(text[start:end] for text, start, end in zip(self.texts, *ends, strict=True))

    def targeted_ids(self, rows: Sequence[int]) -> Tensor:
        """Tokens of some continuations, as wide as the longest of them, -1 outside of their answers, ``(b, T)``."""
        chosen = list(rows)
        ids = torch.where(self.answer_mask[chosen], self.token_ids[chosen], PADDING)
        return ids[:, : int(self.lengths[chosen].max())]

    def ids_of(self, row: int) -> list[int]:
        """The tokens of one continuation, without padding."""
        return self.token_ids[row, : int(self.lengths[row])].tolist()

    def both_views(self) -> tuple[np.ndarray, np.ndarray]:
        """``embeddings`` and ``signatures`` in float64; a ValueError where one is missing."""
        if self.embeddings is None or self.signatures is None:
            views = {"embeddings": self.embeddings, "signatures": self.signatures}
            missing = " and no ".join(name for name, view in views.items() if view is None)
            raise ValueError(f"{self.prompt!r} has no {missing}: use embed_continuations and attribute_continuations.")
        return self.embeddings.double().numpy(), self.signatures.double().numpy()

    @property
    @standard_modes()
    def total_log_probs(self) -> Tensor:
        """Log-probability of each whole continuation in nats, float64 ``(n,)``."""
        return self.log_probs.double().sum(dim=1)

    @property
    @standard_modes()
    def mean_log_probs(self) -> Tensor:
        """The same per token, float64 ``(n,)``."""
        return self.total_log_probs / self.lengths

    @property
    @standard_modes()
    def effective_sample_size(self) -> float:
        """ESS: how many equally weighted rows the weights are worth."""
        return float(self.weights.sum() ** 2 / self.weights.square().sum())

    @standard_modes()
    def select(self, rows: Sequence[int] | Sequence[bool] | Tensor | np.ndarray) -> "ContinuationSet":
        """The set of some rows, in the order given, with their weights scaled to sum to 1.

        Args:
            rows: indices, or one bool per row.

        Raises:
            ValueError: no row, or a mask of another length.
            IndexError: no such row.
        """
        chosen = torch.as_tensor(np.asarray(rows))
        if chosen.dtype == torch.bool:
            if len(chosen) != len(self):
                raise ValueError(f"A mask of rows needs {len(self)} entries, got {len(chosen)}.")
            chosen = chosen.nonzero().flatten()
        if chosen.numel() == 0:
            raise ValueError("No row is selected; a ContinuationSet needs at least one.")
        views = {name: view[chosen] for name, view in self._views().items()}
        return replace(
            self,
            texts=tuple(self.texts[i] for i in chosen.tolist()),
            columns={name: view[chosen] for name, view in self.columns.items()},
            **views | {"weights": views["weights"] / views["weights"].sum()},
        )

    def _views(self) -> dict[str, Tensor]:
        return {name: view for name in _VIEWS if (view := getattr(self, name)) is not None}

    # --- with one more view ---

    @standard_modes()
    def with_weights(self, weights: str | Sequence[float | int] | Tensor | np.ndarray) -> "ContinuationSet":
        """The set with other weights.

        Args:
            weights: one positive number per row (scaled to sum to 1), or one of ``"uniform"``; ``"frequency"``, how
                often each was sampled; ``"path"``, the probability of the whole continuation; ``"length_normalised"``,
                the exponential of its mean log-probability per token (arXiv 2606.08236, equation 1).

        Raises:
            ValueError: an unknown name; numbers of another count, not finite, zero or negative.
        """
        if isinstance(weights, str):
            return replace(self, weights=self._named_weights(_checks.choice(weights, WEIGHTINGS, "weights")))
        numbers = torch.as_tensor(np.asarray(weights, dtype=np.float64))
        _checked_weights(numbers, len(self))
        return replace(self, weights=numbers / numbers.sum())

    def _named_weights(self, name: str) -> Tensor:
        if name == "frequency":
            count = self.columns.get("count", torch.ones(len(self))).double()
            return count / count.sum()
        scores = {"path": self.total_log_probs, "length_normalised": self.mean_log_probs}
        # The floor keeps a weight positive where a continuation is too unlikely for the exponential.
        return scores.get(name, torch.zeros(len(self), dtype=torch.float64)).softmax(dim=0).clamp_min(1e-300)

    @standard_modes()
    def with_embeddings(self, embeddings: Tensor | np.ndarray) -> "ContinuationSet":
        """The set with a semantic view, ``(n, d_e)``.

        Raises:
            ValueError: another number of rows, no column, or numbers that are not finite.
        """
        return replace(self, embeddings=_matrix(embeddings, len(self), "embeddings"))

    @standard_modes()
    def with_signatures(self, signatures: Tensor | np.ndarray, sources: SourceTable | None = None) -> "ContinuationSet":
        """The set with a mechanistic view of your own making.

        Args:
            signatures: ``(n, d_a)``.
            sources: what the columns are, where that is known; steering along a cluster needs it.

        Raises:
            ValueError: another number of rows or of sources, no column, or numbers that are not finite.
        """
        return replace(self, signatures=_matrix(signatures, len(self), "signatures"), sources=sources)

    @standard_modes()
    def with_columns(self, columns: Mapping[str, Tensor]) -> "ContinuationSet":
        """The set with further numbers per row, which replace those of the same name."""
        return replace(self, columns={**self.columns, **columns})

    # --- out and in ---

    def to_dataframe(self) -> pd.DataFrame:
        """One row per continuation: text, tokens, log-probabilities, weight and the further columns."""
        frame = pd.DataFrame({"text": list(self.texts), "n_tokens": self.lengths.tolist()})
        frame["log_prob"], frame["mean_log_prob"] = self.total_log_probs.numpy(), self.mean_log_probs.numpy()
        frame["weight"] = self.weights.numpy()
        return frame.assign(**{name: column.numpy() for name, column in sorted(self.columns.items())})

    def save(self, folder: str | Path) -> Path:
        """Write the set into a folder as safetensors and JSON, all or nothing.

        Returns:
            The folder.
        """
        return _FORMAT.save(self, Path(folder))

    @classmethod
    @standard_modes()
    def load(cls, folder: str | Path) -> "ContinuationSet":
        """Read a set that :meth:`save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is truncated, not ours, or of a newer format.
        """
        return _FORMAT.load(cls, Path(folder))


def pad_rows(rows: Sequence[Sequence[float | int] | Tensor], value: float | int, dtype: torch.dtype) -> Tensor:
    """Rows of different lengths as one matrix ``(n, T)``, filled with ``value``."""
    return torch.nn.utils.rnn.pad_sequence(
        [torch.as_tensor(row, dtype=dtype) for row in rows], batch_first=True, padding_value=value
    )


def _checked_weights(weights: Tensor, rows: int) -> None:
    if weights.shape != (rows,):
        raise ValueError(f"weights must have shape ({rows},), one per continuation, got {tuple(weights.shape)}.")
    wrong = (~(torch.isfinite(weights) & (weights > 0))).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"weights must be finite and above 0, got {float(weights[wrong[0]])} in row {wrong[0]} "
            f"({len(wrong)} such rows). Leave continuations without weight out with .select()."
        )


def _matrix(values: Tensor | np.ndarray, rows: int, name: str) -> Tensor:
    matrix = torch.as_tensor(np.asarray(values) if not isinstance(values, Tensor) else values).detach().cpu().float()
    if matrix.ndim != 2 or matrix.shape[0] != rows or matrix.shape[1] == 0:
        raise ValueError(f"{name} must have shape ({rows}, d), one row per continuation, got {tuple(matrix.shape)}.")
    return _checks.finite(matrix, name).contiguous()
