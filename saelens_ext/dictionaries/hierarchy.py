"""Dictionaries of falling size in which each feature gathers features of the one below, and the trees this gives.

Symbols: those of :mod:`saelens_ext.ops.semi_nmf.deep`.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from saelens_ext import _checks, _files
from saelens_ext.dictionaries.snmf import SNMFDictionary
from saelens_ext.ops.modes import standard_modes

FORMAT = _files.Format("hierarchy", "saelens_ext.HierarchicalSNMF", version=2, oldest=2, stated=("ranks",))


@dataclass(frozen=True)
class ConceptNode:
    """A feature and those of the level below that it gathers."""

    level: int
    """0 is the finest."""
    feature: int
    """Index in the dictionary of that level."""
    weight: float
    """Its link to its parent over the parent's largest, in (0, 1]; 1 for a root."""
    children: tuple["ConceptNode", ...]
    """By falling weight."""

    def __str__(self) -> str:
        return "\n".join(self._lines(0))

    def _lines(self, depth: int) -> list[str]:
        own = f"{'  ' * depth}level {self.level} feature {self.feature}" + (f" ({self.weight:.2f})" if depth else "")
        return [own] + [line for child in self.children for line in child._lines(depth + 1)]


@dataclass(kw_only=True, frozen=True)
class HierarchicalSNMF:
    """SNMF dictionaries from the finest to the coarsest, tied by non-negative links and refined together."""

    dictionaries: list[SNMFDictionary]
    """One per level, the finest first; each can be used by itself."""
    links: list[Tensor]
    """From each level to the next: ``(r_l, r_(l+1))`` >= 0, entry (i, j) how much feature i is in feature j, both of
    unit length."""
    hook_name: str
    """The hook, as given to the stream."""
    losses: list[float]
    """Of each level: squared error of the codes that reach it through the links, over the activations' sum of
    squares.
    """
    losses_before: list[float]
    """The same before the levels were refined together."""
    encode_losses: list[float]
    """Of each level's dictionary by itself: the same with the codes of its own ``encode``."""
    history: list[float]
    """The objective of the joint refinement at its start and after each iteration; never rises."""
    n_seen: int
    """Activations that the hierarchy was fitted to."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Features of each level."""
        return tuple(dictionary.cfg.d_sae for dictionary in self.dictionaries)

    @standard_modes()
    def trees(self, level: int = -1, *, min_weight: float | int = 0.15, max_children: int = 4) -> list[ConceptNode]:
        """The tree below each feature of a level.

        Args:
            level: of the roots; 0 is the finest, -1 the coarsest.
            min_weight: links below this fraction of a feature's largest are left out; in (0, 1].
            max_children: the strongest links that are kept.

        Raises:
            ValueError: no such level, or an option out of range.

        Source: arXiv 2506.10920, whose trees use these limits (but the links from before its refinement).
        """
        if not -len(self.dictionaries) <= level < len(self.dictionaries):
            raise ValueError(
                f"level must be one of 0 to {len(self.dictionaries) - 1}, or negative from the coarsest, got {level!r}."
            )
        _checks.between(min_weight, 0, 1, "min_weight", closed_high=True)
        _checks.positive(max_children, "max_children")
        level %= len(self.dictionaries)
        return [
            self._node(level, feature, 1.0, float(min_weight), max_children) for feature in range(self.ranks[level])
        ]

    def _node(self, level: int, feature: int, weight: float, min_weight: float, max_children: int) -> ConceptNode:
        children: tuple[ConceptNode, ...] = ()
        if level > 0:
            column = self.links[level - 1][:, feature]
            largest = float(column.max())
            # A feature without links gathers nothing.
            values, below = column.sort(descending=True, stable=True)
            kept = [
                (float(v) / largest, int(i))
                for v, i in zip(values[:max_children], below)
                if largest > 0 and v >= min_weight * largest
            ]
            children = tuple(self._node(level - 1, i, share, min_weight, max_children) for share, i in kept)
        return ConceptNode(level, feature, weight, children)

    def save(self, path: str | Path) -> Path:
        """Write each level into ``level_<l>`` of a directory, as SAELens saves a SAE, and the links beside them."""
        path = Path(path)
        return FORMAT.save(self, path, {path / f"level_{level}": d for level, d in enumerate(self.dictionaries)})

    @classmethod
    @standard_modes()
    def load(cls, path: str | Path, device: str = "cpu") -> "HierarchicalSNMF":
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is truncated, foreign, newer than this package, or levels and links do not fit each
                other.
        """
        path = Path(path)
        ranks = FORMAT.read(path)[0].get("ranks")
        levels = [path / f"level_{level}" for level in range(len(ranks) if isinstance(ranks, list) else 0)]
        dictionaries = [SNMFDictionary.load_from_disk(level, device=device) for level in levels]
        return FORMAT.load(cls, path, {"dictionaries": dictionaries}, device)
