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
from saelens_ext.analysis.background import BackgroundTally
from saelens_ext.analysis.examples import Examples, ExampleTable, RowBlock
from saelens_ext.ops.spherical import unit_directions
from saelens_ext.ops.uniform_sample import row_keys


class RandomExamples:
    """Examples drawn at random from those offered, without replacement: those with the smallest keys, which a seed, the
    numbers of the activations in the stream and the latents decide.
    """

    def __init__(self, k: int, n: int, context: int, seed: int):
        self._k, self._seed = k, seed
        self._table = ExampleTable(k, n, context, torch.device("cpu"))

    def offer(self, latents: Tensor, rows: Tensor, block: RowBlock, values: Tensor) -> None:
        """Offer row ``rows[i]`` of the block, whose value for latent ``latents[i]`` is ``values[i]``."""
        latents, rows = latents.cpu(), rows.cpu()
        keys = row_keys(block.numbers[rows] * self._k + latents, self._seed)
        self._table.offer(latents, -keys.float(), rows, block, values.cpu())

    def merge(self, later: "RandomExamples") -> None:
        """Take in what was drawn from a later part of the stream."""
        self._table.merge(later._table)

    def examples(self) -> Examples:
        """What was drawn, in random order. Ends the gathering."""
        return self._table.examples()


class CodeTally:
    """Counts, strengths and, with ``n_examples`` above 0, the largest codes of each of k latents."""

    def __init__(self, k: int, n_examples: int, context: int, device: torch.device):
        self._counts = torch.zeros(k, dtype=torch.int64)
        self._sums = torch.zeros(k, dtype=torch.float64)
        self._largest = torch.full((k,), -torch.inf)
        self._table = ExampleTable(k, n_examples, context, device) if n_examples else None

    def take(self, codes: Tensor, block: RowBlock, random: RandomExamples | None) -> None:
        """Add the codes of a block, ``(r, k)`` on the dictionary's device."""
        sums = codes.float().sum(dim=0)
        if not bool(torch.isfinite(sums).all()):
            _checks.finite(codes, "The code that the dictionary gives")
        active = codes != 0
        self._counts += active.sum(dim=0).cpu()
        self._sums += sums.cpu()
        self._largest = self._largest.maximum(codes.masked_fill(~active, -torch.inf).amax(dim=0).float().cpu())
        if self._table is not None:
            rows, latents = (active & (codes > self._table.worst)).nonzero(as_tuple=True)
            largest = codes[rows, latents]
            self._table.offer(latents, largest, rows, block, largest)
        if random is not None:
            rows, latents = active.nonzero(as_tuple=True)
            random.offer(latents, rows, block, codes[rows, latents])

    def merge(self, later: "CodeTally") -> None:
        """Take in what was counted of a later part of the stream."""
        self._counts += later._counts
        self._sums += later._sums
        self._largest = self._largest.maximum(later._largest)
        if self._table is not None and later._table is not None:
            self._table.merge(later._table)

    def results(self) -> dict[str, Any]:
        """The fields of the profile that this fills."""
        active = self._counts > 0
        return {
            "n_unassigned": 0,
            "latent_names": tuple(f"latent {j}" for j in range(len(self._counts))),
            "counts": self._counts,
            "mean_activation": (self._sums / self._counts.clamp_min(1)).float(),
            "max_activation": torch.where(active, self._largest, 0.0),
            "top": None if self._table is None else self._table.examples(),
        }


class RegionTally:
    """Members, distances and directions of each Voronoi cell, with its nearest and farthest members.

    It travels without the directions of regions that have no member, and can then only be merged into another.
    """

    def __init__(self, sae: SAE[Any], n_examples: int, n_boundary: int, context: int):
        k, cpu = sae.cfg.d_sae, torch.device("cpu")
        self._n = 0
        self._counts = torch.zeros(k, dtype=torch.int64)
        self._distances = torch.zeros(k, dtype=torch.float64)
        self._farthest = torch.full((k,), -torch.inf)
        self._regions = torch.arange(k)
        has_center = getattr(sae, "center", None) is not None
        self._directions = torch.zeros(k, sae.cfg.d_in, dtype=torch.float64) if has_center else None
        self._nearest = ExampleTable(k, n_examples, context, cpu)
        self._boundary = ExampleTable(k, n_boundary, context, cpu) if n_boundary else None

    def __getstate__(self) -> dict[str, Any]:
        some = self._counts > 0
        directions = None if self._directions is None else self._directions[some]
        return vars(self) | {"_regions": self._regions[some], "_directions": directions}

    def take(self, sae: Any, block: RowBlock, random: RandomExamples | None) -> Tensor:
        """Add a block on the device of the dictionary, of a class that has regions, and so ``assign``; gives the region
        of each row, -1 for none."""
        self._n += len(block)
        regions, distances = (part.cpu() for part in sae.assign(block.x))
        members, units = regions >= 0, None
        if self._directions is not None:
            units = unit_directions(block.x, sae.center)[0].cpu()
            # An activation equal to the centre has no direction, so it is nearest to no exemplar.
            members &= units.any(dim=1)
        of_rows = torch.where(members, regions, -1)
        rows = members.nonzero().squeeze(1)
        regions, distances = regions[rows], distances[rows].float()
        self._counts += regions.bincount(minlength=len(self._counts))
        # On the CPU: sums by index are of random order, hence of random rounding, on accelerators.
        self._distances.index_add_(0, regions, distances.double())
        self._farthest.scatter_reduce_(0, regions, distances, "amax")
        if self._directions is not None and units is not None:
            self._directions.index_add_(0, regions, units[rows].double())
        self._nearest.offer(regions, -distances, rows, block, distances)
        if self._boundary is not None:
            self._boundary.offer(regions, distances, rows, block, distances)
        if random is not None:
            random.offer(regions, rows, block, distances)
        return of_rows

    def merge(self, later: "RegionTally") -> None:
        """Take in what was gathered of a later part of the stream."""
        self._n += later._n
        self._counts += later._counts
        self._distances += later._distances
        self._farthest = self._farthest.maximum(later._farthest)
        if self._directions is not None and later._directions is not None:
            self._directions.index_add_(0, later._regions, later._directions)
        self._nearest.merge(later._nearest)
        if self._boundary is not None and later._boundary is not None:
            self._boundary.merge(later._boundary)

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
            "boundary": None if self._boundary is None else self._boundary.examples(),
            "coherence": coherence,
            "mean_distance": (self._distances / n).float().masked_fill(empty, torch.nan),
            "max_distance": self._farthest.masked_fill(empty, torch.nan),
        }


class Tallies:
    """All that is gathered of one dictionary, on the way through a stream or a part of it."""

    def __init__(
        self,
        sae: SAE[Any],
        *,
        n_examples: int,
        n_boundary: int,
        n_random: int,
        n_background: int,
        context: int,
        seed: int,
    ):
        k, has_regions = sae.cfg.d_sae, hasattr(sae, "assign")
        self.n = 0
        """Activations that were taken."""
        # The examples of a dictionary with regions are members of the regions.
        self._codes = CodeTally(k, 0 if has_regions else n_examples, context, sae.W_dec.device)
        self._regions = RegionTally(sae, n_examples, n_boundary, context) if has_regions else None
        self._random = RandomExamples(k, n_random, context, seed) if n_random else None
        self._background = BackgroundTally(n_background, seed) if n_background else None

    def take(self, sae: SAE[Any], codes: Tensor, block: RowBlock) -> None:
        """Add a block and its codes, on the dictionary's device, with what is around its rows."""
        self.n += len(block)
        if self._regions is None:
            self._codes.take(codes, block, self._random)
            active = codes != 0
        else:
            self._codes.take(codes, block, None)
            active = self._regions.take(sae, block, self._random)
        if self._background is not None:
            self._background.take(block, active)

    def merge(self, later: "Tallies") -> None:
        """Take in what was gathered, with the same options, of a later part of the stream."""
        self.n += later.n
        for name in ("_codes", "_regions", "_random", "_background"):
            if getattr(self, name) is not None:
                getattr(self, name).merge(getattr(later, name))

    def results(self) -> dict[str, Any]:
        """The fields of the profile that this fills."""
        return {
            "n_activations": self.n,
            **self._codes.results(),
            **({} if self._regions is None else self._regions.results()),
            "random": None if self._random is None else self._random.examples(),
            "background": None if self._background is None else self._background.background(),
        }
