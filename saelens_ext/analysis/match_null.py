"""Nearest directions of one dictionary in another, and in dictionaries made up by chance, which give the cutoff."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.ops.precision import wide
from saelens_ext.ops.spherical import nearest, unit_directions

Null = Literal["directions", "rotation"]
_NULL_ROWS = 1000  # directions of a dictionary that are compared with a made-up one, at most
_NULL_DRAWS = 1000  # best cosines under the null, at least, unless the caller asks otherwise
_BLOCK = 4096


@dataclass
class Searcher:
    """Searches one dictionary for the directions of another, and made-up ones in its place."""

    null: Null | Tensor
    level: float
    n_wanted: int | None
    seed: int
    max_bytes: int

    def __post_init__(self) -> None:
        self.cutoffs: list[float] = []
        self.n_null: list[int] = []

    def find(self, queries: Tensor, target: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest row of ``target`` and its cosine for each query, -1 and NaN for a zero one; notes the cutoff."""
        rows, columns = (part.any(dim=1).nonzero().squeeze(1) for part in (queries, target))
        index = torch.full((len(queries),), -1)
        cosine = torch.full((len(queries),), torch.nan, dtype=torch.float64)
        neighbour, distance = nearest(queries[rows], target[columns], max_bytes=self.max_bytes)
        index[rows.cpu()], cosine[rows.cpu()] = columns.cpu()[neighbour.cpu()], 1 - distance.cpu()
        self.cutoffs.append(self._cutoff(queries[rows], target[columns], origin))
        return index, cosine

    def _cutoff(self, queries: Tensor, target: Tensor, origin: Tensor) -> float:
        generator = torch.Generator().manual_seed(self.seed)
        if len(queries) > _NULL_ROWS:
            queries = queries[torch.randperm(len(queries), generator=generator)[:_NULL_ROWS].to(queries.device)]
        n_null = self.n_wanted
        if n_null is None:
            n_null = max(5, math.ceil(max(_NULL_DRAWS, 10 / (1 - self.level)) / len(queries)))
        made_up = _MadeUp(self.null, target, origin, generator)
        rounds = range(_checks.positive(n_null, "n_null"))
        draws = torch.cat([made_up.best_cosines(queries) for _ in rounds]).sort().values
        self.n_null.append(n_null)
        rank = math.ceil((len(draws) + 1) * self.level)
        if rank > len(draws):
            raise ValueError(
                f"n_null={n_null} gives {len(draws)} best cosines, too few for level={self.level:g}: take an n_null of "
                f"at least {math.ceil(1 / (1 - self.level) / len(queries)) + 1}, or a lower level."
            )
        return float(draws[rank - 1])


class _MadeUp:
    """Dictionaries by chance, in the place of one of ``k`` directions."""

    def __init__(self, null: Null | Tensor, target: Tensor, origin: Tensor, generator: torch.Generator):
        self._null, self._target, self._generator = null, target, generator
        if isinstance(null, Tensor):
            if null.ndim != 2 or null.shape[1] != target.shape[1] or len(null) < len(target):
                raise ValueError(
                    f"null holds activations of shape {tuple(null.shape)}; at least ({len(target)}, {target.shape[1]}) "
                    "is needed, one for every latent."
                )
            self._units = unit_directions(_checks.finite(null.detach(), "null").float().to(target.device), origin)[0]
        elif null == "directions":
            self._mean = target.mean(dim=0)
            self._factor = _covariance_factor(target - self._mean)

    def best_cosines(self, queries: Tensor) -> Tensor:
        """The best cosine of each query with a fresh made-up dictionary: float32, on the CPU."""
        best = queries.new_full((len(queries),), -1.0)
        for block in self._blocks():
            best = torch.maximum(best, (queries @ block.T).amax(dim=1))
        return best.cpu()

    def _blocks(self) -> Any:
        k, d = self._target.shape
        if isinstance(self._null, Tensor):
            for rows in torch.randperm(len(self._units), generator=self._generator)[:k].split(_BLOCK):
                yield self._units[rows.to(self._units.device)]
        elif self._null == "rotation":
            turn = _rotation(d, self._generator).to(self._target)
            for rows in self._target.split(_BLOCK):
                yield rows @ turn
        else:
            for start in range(0, k, _BLOCK):
                noise = torch.randn(min(_BLOCK, k - start), len(self._factor), generator=self._generator)
                yield torch.nn.functional.normalize(self._mean + noise.to(self._factor) @ self._factor, dim=1)


def _covariance_factor(centred: Tensor) -> Tensor:
    """F with F'F the covariance of the rows: standard normal rows times F have that covariance."""
    k, d = centred.shape
    if k <= d:
        return centred / math.sqrt(k)
    values, vectors = torch.linalg.eigh(wide(centred).T @ wide(centred) / k)
    return (values.clamp_min(0).sqrt()[:, None] * vectors.T).float().to(centred.device)


def _rotation(d: int, generator: torch.Generator) -> Tensor:
    """A rotation or reflection, all alike (Haar)."""
    q, r = torch.linalg.qr(torch.randn(d, d, generator=generator))
    return q * r.diagonal().sign()
