"""Directions about a centre, and the nearest of many directions.

Symbols:
    a: an activation, ``(d,)``.
    m = mean(a), s = mean(a / |a|), u = s / |s|.
    c = <m, u> u: the spherical centre. It is the projection of the mean activation on the mean direction, and equals
        the mean when all norms are equal; unlike the mean, a few activations of huge norm hardly turn it.
    (a - c) / |a - c|: the direction of a, a unit row. Its length |a - c| is returned beside it.
    cosine distance: 1 - cosine of two directions, in [0, 2].

Source: Rumbelow, Exemplar Partitioning (arXiv 2605.14347), section on construction.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from saelens_ext._checks import finite, positive, width
from saelens_ext.ops.grid_products import (
    GRID,
    ROW_LIMIT,
    UNIT_TOLERANCE,
    distance,
    exact_cosine,
    nearest_column,
    new_tile,
    no_candidates,
    scan,
)
from saelens_ext.ops.modes import standard_modes
from saelens_ext.ops.precision import where_float64_is, wide

_SMALLEST_NORM = torch.finfo(torch.float32).tiny
_LARGEST_ENTRY = 1e150  # its square is still finite in float64
_SUM_ROWS = 256
_CPU_ENTRIES, _GPU_ENTRIES = 2**20, 2**26  # entries worked on at a time: what the cache holds, what memory allows


class SphericalCenter:
    """The spherical centre of a stream of activations of width d; bit for bit the same however it is cut into batches.

    Rows are added up in float64, in blocks of 256 counted from the start of the stream, by a fixed tree.

    Source: Rumbelow, Exemplar Partitioning (arXiv 2605.14347).
    """

    def __init__(self, d: int) -> None:
        self._d = positive(d, "d")
        self._total = torch.zeros(2 * d, dtype=torch.float64)
        self._pending = torch.empty(0, d, dtype=torch.float64)
        self._n_seen = 0

    @property
    def n_seen(self) -> int:
        """Activations seen."""
        return self._n_seen

    @standard_modes(gradients=False)
    def update(self, x: Float[Tensor, "n d_x"]) -> "SphericalCenter":
        """Add a batch ``(n, d)`` of any float dtype; n may be 0. The sums live on the first batch's device, or on the
        CPU where that has no float64.

        ValueError: An entry is NaN or infinite, or the width is not ``d``.
        """
        x = where_float64_is(checked_activations(x, self._d))
        if self._n_seen == 0:
            self._total, self._pending = self._total.to(x.device), self._pending.to(x.device)
        self._n_seen += len(x)
        head = min(len(x), _SUM_ROWS - len(self._pending))
        first = torch.cat((self._pending, x[:head].to(self._total)))
        for block in (first, *(x[head:].split(_SUM_ROWS) if head < len(x) else ())):
            whole = len(block) == _SUM_ROWS
            if whole:
                self._total += _summed(block.to(self._total))
            self._pending = block[:0].to(self._total) if whole else block.to(self._total, copy=True)
        return self

    @property
    def center(self) -> Float32[Tensor, " d"]:
        """The centre of all activations so far, ``(d,)`` float32; zero where their directions cancel and have no mean.

        ValueError: No activation was seen.
        """
        if self._n_seen == 0:
            raise ValueError("The centre of no activations is undefined; call update() first.")
        total = self._total + _summed(self._pending) if len(self._pending) else self._total
        mean, direction = (total / self._n_seen).chunk(2)
        length = direction.norm()
        if length < 1e-12:
            return torch.zeros_like(mean, dtype=torch.float32)
        direction = direction / length
        return ((mean * direction).sum() * direction).float()


def spherical_center(x: Float[Tensor, "n d"]) -> Float32[Tensor, " d"]:
    """The spherical centre c = <mean(a), u> u, u = mean(a/|a|) normalised, of the rows of ``x``, in their units.

    Raises:
        ValueError: ``x`` is empty or has a non-finite entry.

    Source: Rumbelow, Exemplar Partitioning (arXiv 2605.14347).
    """
    return SphericalCenter(x.shape[-1]).update(x).center.to(x.device)


def _summed(x: Tensor) -> Tensor:
    """Sums over rows of ``x`` and of its unit rows, ``(2 d,)``, in an order that depends on the row count only."""
    inverse = _inverse_norms(x)
    units = x * torch.where(inverse.isfinite(), inverse, 0.0)[:, None]
    return _folded(torch.cat((x, units), dim=1), dim=0)[0]


def _inverse_norms(x: Tensor) -> Tensor:
    # rsqrt and not sqrt, which a vector library may round otherwise at the end of a tensor than in its middle.
    return _folded(x * x, dim=1)[:, 0].rsqrt()


def _folded(x: Tensor, dim: int) -> Tensor:
    """Sum over ``dim`` in place, by adding the upper half to the lower until one is left.

    Elementwise additions only: torch's own sums may take another order for another number of rows.
    """
    size = x.shape[dim]
    while size > 1:
        half = (size + 1) // 2
        x.narrow(dim, 0, size - half).add_(x.narrow(dim, half, size - half))
        size = half
    return x


def checked_activations(x: Tensor, d: int, name: str = "x") -> Tensor:
    """Return ``x`` detached; raise ValueError unless it is ``(n, d)``, of a float dtype and finite."""
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(
            f"{name} must be a matrix of activations (n, {d}) of a float dtype, got shape {tuple(x.shape)} and "
            f"{x.dtype}; flatten batch and position, and convert integers with .float()."
        )
    x = width(x.detach(), d, name)
    # The sum is not finite if an entry is not (or if it overflows), and many times cheaper than looking at each.
    if not bool(torch.isfinite(x.sum())):
        finite(x, name)
    if x.dtype == torch.float64 and x.numel() and float(x.abs().max()) > _LARGEST_ENTRY:
        raise ValueError(f"{name} holds entries up to {float(x.abs().max()):g}, above {_LARGEST_ENTRY:g}. Rescale it.")
    return x


def directions(
    x: Float[Tensor, "n d"], center: Float[Tensor, " d"]
) -> tuple[Float32[Tensor, "n d"], Float32[Tensor, " n"]]:
    """``unit_directions`` without its checks.

    Each row depends on that row alone, bit for bit: operations of one rounding each, in a fixed order.
    """
    u, norm = x.new_empty(x.shape, dtype=torch.float32), x.new_empty(len(x), dtype=torch.float32)
    step = max(1, (_CPU_ENTRIES if x.device.type == "cpu" else _GPU_ENTRIES) // max(1, x.shape[1]))
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        norm[rows] = _write_directions(x[rows], center, u[rows])
    return u, norm


def _write_directions(x: Tensor, center: Tensor, u: Tensor) -> Tensor:
    """Fill ``u`` and return the norms."""
    # A float32 difference of float32 numbers is as accurate as a float32 direction can be; float64 is for float64 data.
    center = center.to(torch.promote_types(x.dtype, torch.float32))
    offset = torch.sub(x, center, out=u if center.dtype == u.dtype else None)
    inverse = _inverse_norms(offset)
    norm = inverse.reciprocal()
    scale = torch.where(has_direction(norm.float()), GRID * inverse, 0.0)
    torch.mul(offset, scale[:, None], out=u).round_().mul_(1 / GRID)
    extreme = ~((norm > 1e-15) & (norm < 1e15))  # their squares leave the range of float32
    if center.dtype == torch.float32 and bool(extreme.any()):
        again = where_float64_is(u[extreme])
        norm[extreme] = _write_directions(wide(x[extreme]), wide(center), again).float().to(norm.device)
        u[extreme] = again.to(u.device)
    return norm


def has_direction(norm: Float[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """Mask of the rows that differ from the centre, by their distance from it."""
    return norm >= _SMALLEST_NORM


def unit_directions(
    x: Float[Tensor, "n d"], center: Float[Tensor, " d_center"]
) -> tuple[Float32[Tensor, "n d"], Float32[Tensor, " n"]]:
    """Directions of activations, of any float dtype, about a centre.

    Returns:
        ``u`` ``(n, d)`` float32, unit rows with entries on the grid of multiples of 2**-30, zero where ``x`` equals the
        centre (their distance is below the least normal float32); ``norm`` ``(n,)`` float32, |x - c| in the units of
        the activations. A row of either depends on the same row of ``x`` alone, bit for bit.

    Raises:
        ValueError: Widths differ or an entry is not finite.
    """
    center = finite(center.detach(), "center").to(x.device)
    return directions(checked_activations(x, center.shape[0]), center)


def nearest(
    u: Float[Tensor, "n d"], exemplars: Float[Tensor, "k d_exemplars"], *, max_bytes: int = 2**26
) -> tuple[Int64[Tensor, " n"], Float64[Tensor, " n"]]:
    """Nearest exemplar of each direction, by cosine.

    Args:
        u: ``(n, d)`` directions; rows that are not unit are normalised.
        exemplars: ``(k, d)`` directions, k at least 1, none zero.
        max_bytes: Work space, in bytes, at most (roughly; a minimum of a few rows is always used).

    Returns:
        ``index`` ``(n,)`` int64, the lowest of equally near exemplars, and ``cosine_distance`` ``(n,)`` float64 in
        [0, 2]. Both are functions of the row and the exemplars alone, not of ``n`` or ``max_bytes``. A zero row, which
        has no direction, gets index 0 and distance 1. On the device of ``u``, or on the CPU where that has no float64.

    Raises:
        ValueError: Widths differ, an entry is not finite, there is no exemplar or a zero one.
    """
    u = where_float64_is(checked_activations(u, u.shape[-1], "u"))
    return _nearest(u, _unit_rows, exemplars, max_bytes)


def assign_nearest(
    x: Float[Tensor, "n d"],
    center: Float[Tensor, " d_center"],
    exemplars: Float[Tensor, "k d_exemplars"],
    *,
    max_bytes: int = 2**26,
) -> tuple[Int64[Tensor, " n"], Float64[Tensor, " n"]]:
    """:func:`nearest` exemplar of each activation's direction about ``center``; never holds a centred copy of ``x``.

    Returns:
        ``index`` ``(n,)`` int64 and ``cosine_distance`` ``(n,)`` float64, as ``nearest`` gives them. An activation
        equal to the centre has no direction and gets index 0 and distance 1. On the device of ``x``, or on the CPU
        where that has no float64.

    Raises:
        ValueError: Widths differ, an entry is not finite, there is no exemplar or a zero one.
    """
    x = where_float64_is(x)
    center = finite(center.detach(), "center").to(x.device)
    x = checked_activations(x, center.shape[0])
    return _nearest(x, lambda rows: directions(rows, center), exemplars, max_bytes)


@standard_modes(gradients=False)
def _nearest(
    x: Tensor, directions_of: Callable[[Tensor], tuple[Tensor, Tensor]], exemplars: Tensor, max_bytes: int
) -> tuple[Tensor, Tensor]:
    exemplars = _checked_exemplars(exemplars.detach().to(x.device), x.shape[1])
    index = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    distances = torch.ones(len(x), dtype=torch.float64, device=x.device)
    # A quarter of the work space is for products, the rest for directions and what they are made from.
    n_rows = max(1, min(len(x), ROW_LIMIT, positive(max_bytes, "max_bytes") // (16 * x.shape[1])))
    tile = new_tile(x.device, max(max_bytes // 16, 512 * n_rows))
    for start in range(0, len(x), n_rows):
        u, norm = directions_of(x[start : start + n_rows])
        directed = has_direction(norm).nonzero()[:, 0]
        u = u if len(directed) == len(u) else u[directed]
        found = nearest_column(scan(no_candidates(u), u, exemplars, tile), u, exemplars)
        index[start + directed] = found
        distances[start + directed] = distance(exact_cosine(u, torch.arange(len(u), device=x.device), exemplars, found))
    return index, distances


def _unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` as float32 unit rows, with the norms it had; rows that are unit already stay as they are, bit for bit."""
    norm = _inverse_norms(x.float()).reciprocal()
    unit = (norm - 1).abs() <= UNIT_TOLERANCE / 2
    if bool(unit.all()):
        return x.float(), norm
    u, norm = directions(x, x.new_zeros(x.shape[1]))
    return torch.where(unit[:, None], x.float(), u), norm


def _checked_exemplars(exemplars: Tensor, d: int) -> Tensor:
    exemplars = checked_activations(exemplars, d, "exemplars")
    if len(exemplars) == 0:
        raise ValueError("exemplars has no rows; at least one exemplar is needed to be nearest.")
    exemplars, norm = _unit_rows(exemplars)
    if not bool(has_direction(norm).all()):
        raise ValueError(f"exemplars has {int((~has_direction(norm)).sum())} zero rows; each must have a direction.")
    return exemplars
