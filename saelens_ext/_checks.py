"""Argument checks that every public entry shares.

Each names what it received, what it allows and what to do about it.
"""

import difflib
from collections.abc import Collection, Iterable, Sequence

import torch


def finite(x: torch.Tensor, name: str) -> torch.Tensor:
    """Return ``x``; raise ValueError if any entry is NaN or infinite."""
    ok = torch.isfinite(x)
    if not bool(ok.all()):
        rows = (~ok).reshape(x.shape[0], -1).any(dim=1) if x.ndim > 1 else ~ok
        first = int(rows.nonzero()[0]) if rows.ndim and rows.numel() else 0
        raise ValueError(
            f"{name} has {int((~ok).sum())} non-finite entries (NaN or infinity), the first in row {first}; "
            "every activation must be finite. Half-precision overflow is the usual cause: run the model in bfloat16 or "
            "float32."
        )
    return x


def width(x: torch.Tensor, d: int, name: str) -> torch.Tensor:
    """Return ``x``; raise ValueError unless its last dimension is ``d``."""
    if x.ndim == 0 or x.shape[-1] != d:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; its last dimension must be {d}, the width of the activations this was "
            "built from. Is it attached at the hook it was built at?"
        )
    return x


def between(
    value: float | int, low: float | int, high: float | int, name: str, *, closed_high: bool = False
) -> float | int:
    """Return ``value``; raise ValueError unless it lies in ``(low, high)``, or ``(low, high]`` with ``closed_high``."""
    if not (low < value < high or (closed_high and value == high)):
        raise ValueError(f"{name} must lie in ({low:g}, {high:g}{']' if closed_high else ')'}, got {value!r}.")
    return value


def choice(value: str, allowed: Collection[str], name: str) -> str:
    """Return ``value``; raise ValueError unless it is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.{near_matches(value, allowed)}"
        )
    return value


def positive(value: float | int, name: str) -> int:
    """Return ``value`` as an int; raise ValueError unless it is a whole number of at least 1."""
    if value != int(value) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
    return int(value)


def known_keys(given: Iterable[str], allowed: Sequence[str], what: str) -> None:
    """Raise ValueError naming every key of ``given`` that is not in ``allowed``, with its nearest spelling."""
    unknown = [key for key in given if key not in allowed]
    if unknown:
        hints = "; ".join(f"{key!r}{near_matches(key, allowed)}" for key in unknown)
        raise ValueError(f"{what} does not know {hints}. It knows: {', '.join(allowed)}.")


def near_matches(name: str, names: Iterable[str], n: int = 5) -> str:
    """A sentence `` Did you mean …?`` with the nearest of ``names``; empty when nothing is near."""
    matches = difflib.get_close_matches(str(name), list(names), n=n, cutoff=0.5)
    return f" Did you mean {', '.join(map(repr, matches))}?" if matches else ""
