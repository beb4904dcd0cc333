"""Which directions of two dictionaries are the same, and how often chance would say so.

Symbols
    k, k'  latents of the two dictionaries; they may differ
    d      width of the activations, the same for both
    u_i    direction of a latent: its row of ``W_dec``, of unit length
    b      a dictionary's origin, ``b_dec``
    r      radius: typical |x - b| of the activations that the dictionary was made from
    cosine <u_i, u'_j>; a direction and its opposite do not match
    null   best cosines of real directions with made-up dictionaries of the same size

Nearest neighbours are found from either side. They need not agree: a direction that the other dictionary lacks still
has a nearest one there, and one wide direction can be the nearest of many narrow ones. Mutual pairs are those that
agree. The optimal one-to-one assignment is given too, because others report it; with k other than k' it leaves out |k -
k'| latents whatever they are, and it forces pairs on the rest, so its cosines are read against the cutoff as well.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pandas as pd
import torch
from sae_lens import SAE
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.analysis.match_null import Null, Searcher
from saelens_ext.ops.modes import standard_modes
from saelens_ext.ops.precision import wide
from saelens_ext.ops.spherical import unit_directions

logger = logging.getLogger(__name__)

Center = Literal["own", "shared"]
Dictionary = SAE[Any] | Tensor

ASSIGNMENT_BYTES = 2**30
"""Cosines that the one-to-one assignment may hold, in bytes: 11 585 latents on either side."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SideMatch:
    """What one dictionary's directions find in the other; tensors on the CPU, one entry per latent."""

    nearest: Tensor
    """Latent of the other dictionary with the largest cosine: int64 ``(k,)``, -1 for a latent without direction."""
    cosine: Tensor
    """That cosine: float64 ``(k,)``, NaN for a latent without direction."""
    mutual: Tensor
    """Whether that latent's nearest is this one: bool ``(k,)``."""
    fan_in: Tensor
    """Latents of the other dictionary whose nearest is this one: int64 ``(k,)``."""
    cutoff: float
    """Best cosine that ``level`` of the null's directions stay within, at the size of the other dictionary."""

    @property
    def above(self) -> Tensor:
        """Latents whose nearest is nearer than the cutoff: bool ``(k,)``."""
        return self.cosine > self.cutoff

    @property
    def share(self) -> float:
        """Fraction of all latents above the cutoff, in [0, 1]; chance alone gives about 1 - level."""
        return float(self.above.double().mean())

    def summary(self) -> dict[str, Any]:
        """The main figures, JSON-safe."""
        found = self.cosine[~self.cosine.isnan()]
        return {
            "n": len(self.nearest),
            "n_without_direction": int((self.nearest < 0).sum()),
            "cutoff": self.cutoff,
            "share_above_cutoff": self.share,
            "share_mutual": float(self.mutual.double().mean()),
            "share_mutual_above_cutoff": float((self.mutual & self.above).double().mean()),
            "median_cosine": float(found.median()) if len(found) else None,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class DictionaryMatch:
    """How the directions of two dictionaries match."""

    first: SideMatch
    """What the first's directions find in the second."""
    second: SideMatch
    """What the second's directions find in the first."""
    pairs: Tensor | None
    """Optimal one-to-one pairs (first, second), by falling cosine: int64 ``(p, 2)``; None if not computed."""
    pair_cosines: Tensor | None
    """Their cosines: float64 ``(p,)``."""
    settings: dict[str, Any]
    """``center``, ``null``, ``level``, ``n_null`` and ``seed``."""

    @property
    def pair_cutoff(self) -> float:
        """The cutoff of one-to-one pairs: the stricter of the two sides'."""
        return max(self.first.cutoff, self.second.cutoff)

    def summary(self) -> dict[str, Any]:
        """The main figures, JSON-safe."""
        found: dict[str, Any] = {"first": self.first.summary(), "second": self.second.summary(), **self.settings}
        found["share_expected_by_chance"] = 1 - self.settings["level"]
        if self.pairs is not None and self.pair_cosines is not None:
            above = int((self.pair_cosines > self.pair_cutoff).sum())
            k, k_other = len(self.first.nearest), len(self.second.nearest)
            found["one_to_one"] = {
                "n_pairs": len(self.pairs),
                "n_above_cutoff": above,
                "share_of_first": above / k,
                "share_of_second": above / k_other,
                "n_left_out_by_size": abs(k - k_other),
                "median_cosine": float(self.pair_cosines.median()) if len(self.pairs) else None,
            }
        return found

    def to_dataframe(self) -> pd.DataFrame:
        """One row per latent of either dictionary: its nearest, mutual and one-to-one partners, -1 for none."""
        sides = [pd.DataFrame(self._columns(side)) for side in ("first", "second")]
        return pd.concat(sides, ignore_index=True).set_index(["side", "latent"])

    def _columns(self, side: str) -> dict[str, Any]:
        match: SideMatch = getattr(self, side)
        k = len(match.nearest)
        columns: dict[str, Any] = {
            "side": [side] * k,
            "latent": range(k),
            "nearest": match.nearest.numpy(),
            "cosine": match.cosine.numpy(),
            "mutual": match.mutual.numpy(),
            "above_cutoff": match.above.numpy(),
            "fan_in": match.fan_in.numpy(),
        }
        if self.pairs is not None and self.pair_cosines is not None:
            own, other = (0, 1) if side == "first" else (1, 0)
            partner = torch.full((k,), -1)
            cosine = torch.full((k,), torch.nan, dtype=torch.float64)
            partner[self.pairs[:, own]], cosine[self.pairs[:, own]] = self.pairs[:, other], self.pair_cosines
            columns |= {"one_to_one": partner.numpy(), "one_to_one_cosine": cosine.numpy()}
        return columns

    def pairs_dataframe(self) -> pd.DataFrame:
        """One row per mutual pair, the nearest first."""
        rows = self.first.mutual.nonzero().squeeze(1)
        rows = rows[self.first.cosine[rows].sort(descending=True, stable=True).indices]
        partners = self.first.nearest[rows]
        above = self.first.above[rows] & self.second.above[partners]
        columns = {"first": rows, "second": partners, "cosine": self.first.cosine[rows], "above_both_cutoffs": above}
        return pd.DataFrame({name: column.numpy() for name, column in columns.items()})


@standard_modes(gradients=False)
def match_dictionaries(
    first: Dictionary,
    second: Dictionary,
    *,
    center: Center | Tensor = "own",
    radius: float | int | Sequence[float | int] | None = None,
    null: Null | Tensor = "directions",
    level: float = 0.99,
    n_null: int | None = None,
    one_to_one: bool | None = None,
    seed: int = 0,
    max_bytes: int = 2**26,
) -> DictionaryMatch:
    """Match the directions of two dictionaries of the same activations' width.

    Exchanging the dictionaries exchanges the two sides of the result and nothing else.

    Memory: ``max_bytes`` of work space, two float32 copies of the directions, a made-up dictionary's factor of at most
    ``(d, d)``, and the cosines of the one-to-one assignment, at most 1 GiB with a few copies of it.

    Args:
        first: a SAELens SAE, ours or not, or directions ``(k, d)``.
        second: the other.
        center: "own" compares directions as they are, each about its own origin. "shared" moves both to the mean of the
            two origins, a tensor ``(d,)`` to that point: with the same activations but other origins, directions that
            meant the same point do so again. It needs the radius.
        radius: r of both, or of each: how far from the origin a direction's activation lies. By default what the
            dictionaries record as ``metadata.typical_norm``.
        null: what chance is. "directions": random directions with the mean and the covariance of the dictionary that
            they replace, the stricter of the two; "rotation": that dictionary turned at random, which says whether
            anything is shared but the space; or activations ``(n, d)``, of which as many as there are latents are
            drawn, the control by random exemplars.
        level: fraction of the null's best cosines that the cutoff is above, in (0, 1).
        n_null: made-up dictionaries per side; by default at least 5 and as many as give 1000 best cosines.
        one_to_one: compute the optimal assignment (Hungarian). By default if the k x k' cosines take no more than 1
            GiB; the time grows with the cube of the size, minutes at ten thousand.
        seed: of the null.
        max_bytes: work space of the search, in bytes.

    Raises:
        ValueError: other widths, no directions, entries that are not finite, an option out of range, no radius where
            one is needed, too few activations or null draws, or an assignment that is too large.

    Examples:
        >>> match = sx.match_dictionaries(partition, partition)
        >>> bool((match.first.cosine > 1 - 1e-5).all())
        True

    Source: matching after arXiv 2605.14347, section on base and instruct models, which uses the assignment and a cutoff
    of 0.7 alone; the nearest neighbours from both sides and the cutoff from a null are ours.
    """
    _checks.between(level, 0, 1, "level")
    if not isinstance(center, Tensor):
        _checks.choice(center, get_args(Center), "center")
    if not isinstance(null, Tensor):
        _checks.choice(null, get_args(Null), "null")
    sides, origins = _both_directions(first, second, center, radius)
    searcher = Searcher(null, level, n_null, seed, max_bytes)
    found = [searcher.find(sides[i], sides[1 - i], origins[1 - i]) for i in (0, 1)]
    matches = [_side(found[i], found[1 - i], searcher.cutoffs[i]) for i in (0, 1)]
    pairs, cosines = _assignment(sides[0], sides[1], one_to_one)
    settings = {
        "center": center if isinstance(center, str) else "given",
        "null": null if isinstance(null, str) else "activations",
        "level": level,
        "n_null": searcher.n_null,
        "seed": seed,
    }
    return DictionaryMatch(first=matches[0], second=matches[1], pairs=pairs, pair_cosines=cosines, settings=settings)


# --- directions ---


def _both_directions(
    first: Dictionary, second: Dictionary, center: Center | Tensor, radius: float | int | Sequence[float | int] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Directions of both, zero for a latent without one, and the origins they are about; float32, on one device."""
    rows = [direction_rows(dictionary, name).float() for dictionary, name in ((first, "first"), (second, "second"))]
    if rows[0].shape[1] != rows[1].shape[1]:
        raise ValueError(
            f"first has directions of width {rows[0].shape[1]} and second of {rows[1].shape[1]}; only dictionaries of "
            "the same width can be matched. Are both of the same kind of hook in models of the same size?"
        )
    device, d = rows[0].device, rows[0].shape[1]
    units = [unit_directions(part.to(device), part.new_zeros(d))[0] for part in rows]
    origins = [_origin(dictionary, d, device) for dictionary in (first, second)]
    if isinstance(center, str) and center == "own":
        return units, origins
    if isinstance(center, Tensor):
        shared = _checks.width(center.detach().float().to(device), d, "center")
    else:
        shared = (origins[0] + origins[1]) / 2
    moved = []
    for unit, origin, r in zip(units, origins, _radii(first, second, radius)):
        points = torch.where(unit.any(dim=1, keepdim=True), origin + r * unit, shared)
        moved.append(unit_directions(points, shared)[0])
    return moved, [shared, shared]


def direction_rows(dictionary: Dictionary, name: str) -> Tensor:
    """The directions of a dictionary ``(k, d)``; ValueError where it has none, or they are not finite."""
    rows = dictionary if isinstance(dictionary, Tensor) else dictionary.W_dec
    rows = rows.detach()
    if rows.ndim != 2 or 0 in rows.shape or not bool(rows.any()):
        raise ValueError(f"{name} has no directions: shape {tuple(rows.shape)}; it needs rows (k, d), not all zero.")
    return _checks.finite(rows, name)


def _origin(dictionary: Dictionary, d: int, device: torch.device) -> Tensor:
    origin = None if isinstance(dictionary, Tensor) else getattr(dictionary, "b_dec", None)
    return torch.zeros(d, device=device) if origin is None else origin.detach().float().to(device)


def _radii(first: Dictionary, second: Dictionary, radius: float | int | Sequence[float | int] | None) -> list[float]:
    if radius is None:
        recorded = [None if isinstance(part, Tensor) else part.cfg.metadata.typical_norm for part in (first, second)]
        radii = [norm for norm in recorded if norm is not None]
    else:
        radii = list(radius) if isinstance(radius, Sequence) else [radius, radius]
    if len(radii) != 2:
        raise ValueError(
            "A shared centre needs the radius of both dictionaries, and one records no typical_norm: pass radius=, the "
            "median of |x - b_dec| over some activations, as a number or one for each; or center='own'."
        )
    return [float(_checks.between(float(r), 0, math.inf, "radius")) for r in radii]


def _side(own: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], cutoff: float) -> SideMatch:
    (index, cosine), (back, _) = own, other
    mutual = (index >= 0) & (back[index.clamp_min(0)] == torch.arange(len(index)))
    fan_in = back[back >= 0].bincount(minlength=len(index))
    return SideMatch(nearest=index, cosine=cosine, mutual=mutual, fan_in=fan_in, cutoff=cutoff)


def _assignment(first: Tensor, second: Tensor, wanted: bool | None) -> tuple[Tensor | None, Tensor | None]:
    """Pairs with the largest sum of cosines, by falling cosine."""
    rows, columns = (part.any(dim=1).nonzero().squeeze(1) for part in (first, second))
    size = 8 * len(rows) * len(columns)
    if wanted is False:
        return None, None
    if size > ASSIGNMENT_BYTES:
        sentence = f"Assigning {len(rows)} latents to {len(columns)} needs {size} bytes, more than {ASSIGNMENT_BYTES}"
        if wanted:
            raise ValueError(f"{sentence}. Use one_to_one=False, and read the mutual pairs.")
        logger.info("%s; it is left out.", sentence)
        return None, None
    cosines = (wide(first[rows]) @ wide(second[columns]).T).clamp_(-1, 1).cpu().numpy()
    i, j = (torch.from_numpy(part) for part in linear_sum_assignment(cosines, maximize=True))
    matched = torch.from_numpy(cosines[i.numpy(), j.numpy()])
    order = matched.sort(descending=True, stable=True).indices
    return torch.stack([rows.cpu()[i], columns.cpu()[j]], dim=1)[order], matched[order]
