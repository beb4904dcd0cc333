"""What the columns of an attribution signature are: one row per source.

A source is a vector at one hook and one position of the prefix that the target's gradient is multiplied with:
``"latent"`` (activation x decoder direction), ``"error"`` (what a dictionary does not reconstruct), ``"bias"`` (a
dictionary's decoder bias), ``"mlp"`` (the output of an MLP that has no dictionary), ``"embedding"`` (the token's and
its position's).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import pandas as pd

KINDS = ("latent", "error", "bias", "mlp", "embedding")

NO_LATENT = -1


@dataclass(frozen=True)
class SourceTable:
    """Descriptions of m sources, one entry per source in each field; ValueError for different lengths."""

    kinds: tuple[str, ...]
    """One of `KINDS`; a matrix of the user's may have others."""
    hooks: tuple[str, ...]
    """Where the source writes, by the name that fires on the model."""
    positions: tuple[int, ...]
    """Column of the prefix, counted from 0 with BOS."""
    latents: tuple[int, ...]
    """Index of the latent in its dictionary; -1 for other kinds."""
    activations: tuple[float, ...]
    """Activation of a latent; the norm of the source's vector for other kinds."""
    tokens: tuple[str, ...]
    """The prefix's token at that position."""
    dictionaries: tuple[int, ...]
    """Which of the dictionaries given, counted from 0; -1 for sources without one."""

    def __post_init__(self) -> None:
        lengths = {field.name: len(getattr(self, field.name)) for field in fields(self)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"Every field of a SourceTable needs one entry per source, got {lengths}.")

    def __len__(self) -> int:
        return len(self.kinds)

    @property
    def keys(self) -> list[tuple[str, str, int, int]]:
        """Kind, hook, position and latent of each source, which together say what it is."""
        return list(zip(self.kinds, self.hooks, self.positions, self.latents, strict=True))

    def select(self, columns: Sequence[int]) -> "SourceTable":
        """The table of some of the sources, in the order given."""
        return SourceTable(*(tuple(getattr(self, field.name)[i] for i in columns) for field in fields(self)))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per source, one column per field, in the singular."""
        singular = {"dictionaries": "dictionary"}
        return pd.DataFrame({singular.get(f.name, f.name[:-1]): list(getattr(self, f.name)) for f in fields(self)})

    @classmethod
    def joined(cls, tables: Sequence["SourceTable"]) -> "SourceTable":
        """Several tables below one another."""
        return cls(*(tuple(x for table in tables for x in getattr(table, field.name)) for field in fields(cls)))
