"""What a profile counts of each latent, block by block of a stream.

Symbols
    k     latents (``d_sae``)
    z_ij  code of activation i at latent j, as ``encode`` gives it
    c     the centre of a dictionary with regions
    u_i   (x_i - c) / |x_i - c|, the direction of activation i
    S_j   the activations whose nearest exemplar is that of region j: its Voronoi cell
    coherence_j = |sum of u_i over S_j| / |S_j|, in [0, 1]
"""

from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.analysis.examples import Examples, ExampleTable, RowBlock
from saelens_ext.ops.spherical import unit_directions


class RandomExamples:
    """Examples drawn at random from those offered, without replacement, the same for the same blocks.

    Each gets a random number, and the largest are kept.
    """

    def __init__(self, k: int, n: int, context: int, seed: int):
        self._table = ExampleTable(k, n, context, torch.device("cpu"))
        self._generator = torch.Generator().manual_seed(seed)

    def offer(self, latents: Tensor, rows: Tensor, block: RowBlock, values: Tensor) -> None:
        """Offer row ``rows[i]`` of the block, whose value for latent ``latents[i]`` is ``values[i]``."""
        scores = torch.rand(len(latents), generator=self._generator)
        self._table.offer(latents.cpu(), scores, rows.cpu(), block, values.cpu())

    def examples(self) -> Examples:
        """What was drawn, in random order. Ends the gathering."""
        return self._table.examples()


class CodeTally:
    """Counts, strengths and, where a block is given with the activations, the largest codes of each latent."""

    def __init__(self, sae: SAE[Any], n_examples: int, context: int, random: RandomExamples | None):
        k = sae.cfg.d_sae
        self._counts = torch.zeros(k, dtype=torch.int64)
        self._sums = torch.zeros(k, dtype=torch.float64)
        self._largest = torch.full((k,), -torch.inf)
        self._table = ExampleTable(k, n_examples, context, sae.W_dec.device)
        self._random = random

    def take(self, codes: Tensor, block: RowBlock | None) -> None:
        """Add the codes of a block, ``(r, k)`` on the dictionary's device."""
        sums = codes.float().sum(dim=0)
        if not bool(torch.isfinite(sums).all()):
            _checks.finite(codes, "The code that the dictionary gives")
        active = codes != 0
        self._counts += active.sum(dim=0).cpu()
        self._sums += sums.cpu()
        self._largest = self._largest.maximum(codes.masked_fill(~active, -torch.inf).amax(dim=0).float().cpu())
        if block is not None:
            rows, latents = (active & (codes > self._table.worst)).nonzero(as_tuple=True)
            largest = codes[rows, latents]
            self._table.offer(latents, largest, rows, block, largest)
            if self._random is not None:
                rows, latents = active.nonzero(as_tuple=True)
                self._random.offer(latents, rows, block, codes[rows, latents])

    def results(self) -> dict[str, Any]:
        """The fields of the profile that this fills."""
        active = self._counts > 0
        return {
            "n_unassigned": 0,
            "latent_names": tuple(f"latent {j}" for j in range(len(self._counts))),
            "counts": self._counts,
            "mean_activation": (self._sums / self._counts.clamp_min(1)).float(),
            "max_activation": torch.where(active, self._largest, 0.0),
            "top": self._table.examples(),
            "random": None if self._random is None else self._random.examples(),
        }


class RegionTally:
    """Members, distances and directions of each Voronoi cell, with its nearest and farthest members."""

    def __init__(self, sae: SAE[Any], n_examples: int, n_boundary: int, context: int, random: RandomExamples | None):
        self._sae: Any = sae  # of a class that has regions, and so `assign`
        self._center = getattr(sae, "center", None)
        k = sae.cfg.d_sae
        self._n = 0
        self._counts = torch.zeros(k, dtype=torch.int64)
        self._distances = torch.zeros(k, dtype=torch.float64)
        self._farthest = torch.full((k,), -torch.inf)
        self._directions = None if self._center is None else torch.zeros(k, sae.cfg.d_in, dtype=torch.float64)
        cpu = torch.device("cpu")
        self._nearest = ExampleTable(k, n_examples, context, cpu)
        self._boundary = ExampleTable(k, n_boundary, context, cpu) if n_boundary else None
        self._random = random

    def take(self, x: Tensor, block: RowBlock) -> Tensor:
        """Add a block ``x`` ``(r, d)`` on the dictionary's device; gives the region of each row, -1 for none."""
        self._n += len(x)
        regions, distances = (part.cpu() for part in self._sae.assign(x))
        members = regions >= 0
        if self._center is not None:
            units = unit_directions(x, self._center)[0].cpu()
            # An activation equal to the centre has no direction, so it is nearest to no exemplar.
            members &= units.any(dim=1)
        of_rows = torch.where(members, regions, -1)
        rows = members.nonzero().squeeze(1)
        regions, distances = regions[rows], distances[rows].float()
        self._counts += regions.bincount(minlength=len(self._counts))
        # On the CPU: sums by index are of random order, hence of random rounding, on accelerators.
        self._distances.index_add_(0, regions, distances.double())
        self._farthest.scatter_reduce_(0, regions, distances, "amax")
        if self._directions is not None:
            self._directions.index_add_(0, regions, units[rows].double())
        self._nearest.offer(regions, -distances, rows, block, distances)
        if self._boundary is not None:
            self._boundary.offer(regions, distances, rows, block, distances)
        if self._random is not None:
            self._random.offer(regions, rows, block, distances)
        return of_rows

    def results(self) -> dict[str, Any]:
        """The fields of the profile that this fills; with regions they go before those of the codes."""
        empty = self._counts == 0
        n = self._counts.clamp_min(1)
        coherence = None
        if self._directions is not None:
            # Rounding can lift a sum of equal directions just above their number.
            coherence = (self._directions.norm(dim=1) / n).clamp_max(1).float().masked_fill(empty, torch.nan)
        return {
            "n_unassigned": self._n - int(self._counts.sum()),
            "latent_names": tuple(f"region {j}" for j in range(len(self._counts))),
            "counts": self._counts,
            "top": self._nearest.examples(),
            "random": None if self._random is None else self._random.examples(),
            "boundary": None if self._boundary is None else self._boundary.examples(),
            "coherence": coherence,
            "mean_distance": (self._distances / n).float().masked_fill(empty, torch.nan),
            "max_distance": self._farthest.masked_fill(empty, torch.nan),
        }
