"""Nearest unit rows, exactly, at the speed of a plain matrix product.

The last bits of a matrix product depend on its shape, so on its own it cannot say which of two equally near rows is
nearer, nor on which side of a threshold a close pair lies, without the answer changing with the batch size. Here the
product only *narrows down*: it leaves, for each row, the few columns that may be its nearest. Those are settled by a
cosine that is computed pair by pair in integers, whose sums have no order.

Symbols:
    n, d, k: rows, width, exemplars.
    u, e: unit rows on the grid (see below), ``(n, d)`` and ``(k, d)``, float32.
    grid: multiples of 2**-30. A unit row rounded to it is a row of integers below 2**30, so a dot product of two is an
        integer below 2**61: exact in int64, in any order, on any device. The rounding moves an entry by at most 2**-31,
        less than float32 does for entries above 1/64.
    cosine: <u, e> (<u, u> <e, e>)**-0.5 from the three exact integers, in float64. Of a row and itself it is 1 exactly.
    distance: 1 - cosine, clamped to [0, 2].
    error: bound on |float32 product - cosine| for unit rows.
    slack: 2 * error. A column whose product is more than this below the row's best cannot be its nearest.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

GRID = 2.0**30
"""Reciprocal of the grid's spacing."""

UNIT_TOLERANCE = 2.0**-18
"""Rows whose norm is this close to 1 count as unit rows; ``product_error`` allows for it."""

ROW_LIMIT = 2048
"""Rows to work on at once: enough that threads rarely wait for each other, few enough for the caches."""

_GROUPS = 16  # columns are compared in this many interleaved groups, see _tile_hits
_MULTIPLE = _GROUPS * 32  # columns are padded to a multiple of this, so that groups fill whole vector registers
_MOST_CANDIDATES = 16  # per row on average; more are settled at once, so that ties cannot fill the memory
_PAIR_ENTRIES = {"cpu": 2**16, "cuda": 2**22}  # entries (pairs x width) settled at a time: what the cache holds
_LOW_PRECISION = {"tf32": 2.0**-9, "high": 2.0**-9, "bf16": 2.0**-7, "medium": 2.0**-7}


class Candidates(NamedTuple):
    """For each of n rows, the columns that may be its nearest, as far as float32 products can tell."""

    best: Float[Tensor, " n"]
    """Largest product of each row, minus infinity for a row without columns."""
    rows: Int64[Tensor, " m"]
    columns: Int64[Tensor, " m"]
    products: Float[Tensor, " m"]


def summation_error(terms: int, dtype: torch.dtype = torch.float32) -> float:
    """Bound on the error of a sum of products, as a fraction of the product of the two vectors' norms.

    Any order of summation is covered (one rounding per term), and so are the reduced precisions of float32 that a user
    may have switched on for the whole process (TF32, bfloat16).
    """
    lowered = max(_LOW_PRECISION.get(name, 0.0) for name in _precision_settings()) if dtype == torch.float32 else 0.0
    return 1.01 * terms * torch.finfo(dtype).eps / 2 + lowered


def product_error(d: int) -> float:
    """Bound on the error of a float32 product as the cosine of two unit rows of width ``d``.

    Reduced precisions cost more settling, never a wrong answer.
    """
    return summation_error(d) + 2 * UNIT_TOLERANCE


def _precision_settings() -> list[str]:
    backends = (
        torch.backends,
        torch.backends.cuda.matmul,
        torch.backends.mkldnn,
        getattr(torch.backends.mkldnn, "matmul", None),
    )
    settings = [str(getattr(backend, "fp32_precision", "none")) for backend in backends]
    try:
        settings.append(torch.get_float32_matmul_precision())
    except (
        RuntimeError
    ):  # torch refuses to answer once its old and new switches were mixed; the new ones were read above
        pass
    return settings


def exact_cosine(
    a: Float[Tensor, "p d"], i: Int64[Tensor, " m"], b: Float[Tensor, "q d"], j: Int64[Tensor, " m"]
) -> Float64[Tensor, " m"]:
    """Cosines of pairs of unit rows ``(a[i], b[j])`` on the grid: a function of the two rows alone."""
    cosine = torch.empty(len(i), dtype=torch.float64, device=a.device)
    step = max(1, _PAIR_ENTRIES.get(a.device.type, 2**20) // max(1, a.shape[1]))
    for start in range(0, len(i), step):
        part = slice(start, start + step)
        x, y = _integers(a[i[part]]), _integers(b[j[part]])
        dot, xx, yy = ((p * q).sum(dim=1).double() for p, q in ((x, y), (x, x), (y, y)))
        # rsqrt and not sqrt, which a vector library may round otherwise at the end of a tensor than in its middle.
        # Rows that are equal or opposite get 1 and -1, not nearly so.
        cosine[part] = torch.where(dot * dot == xx * yy, dot.sign(), dot * (xx * yy).rsqrt())
    return cosine


def _integers(u: Tensor) -> Tensor:
    return (u.float() * GRID).round_().long()  # a power of 2: nothing is lost


def distance(cosine: Float64[Tensor, " m"]) -> Float64[Tensor, " m"]:
    """Cosine distance in [0, 2]."""
    return (1.0 - cosine).clamp_(0.0, 2.0)


def no_candidates(u: Float[Tensor, "n d"]) -> Candidates:
    """The start of a ``scan``: no columns seen yet."""
    none = torch.empty(0, dtype=torch.int64, device=u.device)
    return Candidates(u.new_full((len(u),), -torch.inf), none, none, u.new_empty(0))


def new_tile(device: torch.device, entries: int | None = None) -> Float32[Tensor, " size"]:
    """Work space for the products of ``scan``, 8 MiB on a CPU unless ``entries`` says otherwise; at least 512 a row.

    Make it once and use it for all blocks: to touch fresh memory can cost as much as to compute what is written to it.
    """
    if entries is None:
        entries = 2**21 if device.type == "cpu" else 2**24
    return torch.empty(entries, device=device)


def scan(
    known: Candidates,
    u: Float32[Tensor, "n d"],
    exemplars: Float32[Tensor, "k d"],
    tile: Float32[Tensor, " size"],
    *,
    first: int = 0,
    last: int | None = None,
    forbidden: Bool[Tensor, "n k_new"] | None = None,
) -> Candidates:
    """Add the columns ``first`` to ``last - 1``, by default to the end, to those that ``known`` has seen.

    Args:
        tile: From ``new_tile``; overwritten.
        forbidden: Pairs to leave out, new columns only.

    Returns:
        The candidates among all columns seen.
    """
    slack = 2 * product_error(u.shape[1])
    last = len(exemplars) if last is None else last
    step = len(tile) // max(1, len(u)) // _MULTIPLE * _MULTIPLE
    for start in range(first, last if len(u) else first, step):
        block = exemplars[start : min(start + step, last)]
        products = tile[: len(u) * _padded(len(block))].view(len(u), -1)
        torch.mm(u, block.T, out=products[:, : len(block)])
        products[:, len(block) :] = -torch.inf
        if forbidden is not None:
            products[:, : len(block)].masked_fill_(forbidden[:, start - first : start - first + step], -torch.inf)
        known = _merged(known, _tile_hits(products, known.best, slack), start, slack)
        if len(known.rows) > _MOST_CANDIDATES * len(u):
            known = _settled(known, u, exemplars)
    return known


def _padded(columns: int) -> int:
    return max(1, -(-columns // _MULTIPLE)) * _MULTIPLE


def _tile_hits(tile: Tensor, floor: Tensor, slack: float) -> Candidates:
    """Entries of ``tile`` within ``slack`` of the best of their row (of ``floor`` too), in about one pass over it.

    torch's row-wise argmax is not vectorised and costs a seventh of the product itself; the maximum over 16 interleaved
    groups of columns is, and then only the groups that reach the best need a second look.
    """
    groups = tile.view(len(tile), _GROUPS, -1)
    tops = groups.amax(dim=1)
    best = torch.maximum(floor, tops.amax(dim=1))
    cut = (best - slack).clamp_(min=-4.0)  # above the minus infinity of padding and forbidden pairs, below any product
    row, offset = (tops >= cut[:, None]).nonzero(as_tuple=True)
    members = groups[row, :, offset]
    hit, group = (members >= cut[row, None]).nonzero(as_tuple=True)
    return Candidates(best, row[hit], group * tops.shape[1] + offset[hit], members[hit, group])


def _merged(known: Candidates, new: Candidates, first_column: int, slack: float) -> Candidates:
    kept = (known.products >= new.best[known.rows] - slack).nonzero()[:, 0]
    return Candidates(
        new.best,
        torch.cat((known.rows[kept], new.rows)),
        torch.cat((known.columns[kept], new.columns + first_column)),
        torch.cat((known.products[kept], new.products)),
    )


def best_cosine(
    candidates: Candidates, rows: Bool[Tensor, " n"], u: Float[Tensor, "n d"], exemplars: Float[Tensor, "k d"]
) -> Float64[Tensor, " n"]:
    """Exact cosine of each row of the mask ``rows`` with its nearest candidate; minus infinity for the others."""
    chosen = rows[candidates.rows]
    i, j = candidates.rows[chosen], candidates.columns[chosen]
    best = torch.full((len(u),), -torch.inf, dtype=torch.float64, device=u.device)
    return best.scatter_reduce_(0, i, exact_cosine(u, i, exemplars, j), "amax")


def nearest_column(
    candidates: Candidates, u: Float[Tensor, "n d"], exemplars: Float[Tensor, "k d"]
) -> Int64[Tensor, " n"]:
    """The nearest column of each row by exact cosine, the lowest of equals; every row must have a candidate."""
    settled = _settled(candidates, u, exemplars)
    return torch.zeros(len(u), dtype=torch.int64, device=u.device).index_copy_(0, settled.rows, settled.columns)


def _settled(candidates: Candidates, u: Tensor, exemplars: Tensor) -> Candidates:
    """Leave one candidate per row: the nearest by exact cosine, the lowest column of equals."""
    # Places, not masks: where the host must wait for a device to know how many there are, it waits once for each.
    counts = torch.zeros(len(u), dtype=torch.int64, device=u.device)
    contested = counts.index_add_(0, candidates.rows, torch.ones_like(candidates.rows))[candidates.rows] > 1
    disputed = contested.nonzero()[:, 0]
    if not len(disputed):
        return candidates
    rows, columns, products = (part[disputed] for part in candidates[1:])
    cosine = exact_cosine(u, rows, exemplars, columns)
    nearest = torch.full((len(u),), -torch.inf, dtype=torch.float64, device=u.device).scatter_reduce_(
        0, rows, cosine, "amax"
    )
    tied = (cosine == nearest[rows]).nonzero()[:, 0]
    lowest = torch.full((len(u),), len(exemplars), device=u.device).scatter_reduce_(
        0, rows[tied], columns[tied], "amin"
    )
    winner, settled = ((columns == lowest[rows]).nonzero()[:, 0], (~contested).nonzero()[:, 0])
    parts = zip(candidates[1:], (rows, columns, products))
    return Candidates(candidates.best, *(torch.cat((old[settled], new[winner])) for old, new in parts))
