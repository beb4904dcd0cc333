"""A published dictionary in this package's format: the partition and, beside it, all that the pickle said of its
regions.

Symbols
    k  regions
    d  width of the activations
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from saelens_ext import _files
from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from saelens_ext.published.regions import Ragged, RegionStatistics

FORMAT = _files.Format("published", "saelens_ext.PublishedDictionary", version=2, oldest=2, stated=("n_regions",))


@dataclass(kw_only=True, frozen=True, eq=False)
class PublishedDictionary(RegionStatistics):
    """An exemplar partition that its author published, with its statistics; tensors on the CPU."""

    dictionary: ExemplarPartition
    """The dictionary: the same centre, threshold, exemplars and means, bit for bit."""
    source: dict[str, Any]
    """Where it came from: ``file``, ``bytes``, ``sha256``, and ``repo_id`` and ``revision`` if it was downloaded;
    ``disagreements`` between the pickle and its metadata file; ``ignored`` attributes of the pickle."""
    build: dict[str, Any]
    """The author's settings and figures of the build, from the metadata file; empty without one."""
    exemplar_indices: Tensor
    """Stream position of each exemplar, the first member's: int64 ``(k,)``, -1 where the file does not say."""

    @property
    def n_regions(self) -> int:
        """Number of regions."""
        return len(self.counts)

    def summary(self) -> dict[str, Any]:
        """The main figures, JSON-safe."""
        config = self.dictionary.cfg
        return {
            "n_regions": self.n_regions,
            "d_in": config.d_in,
            "threshold": config.threshold,
            "percentile": config.percentile,
            "hook_name": config.metadata.hook_name,
            "model_name": config.metadata.model_name,
            "n_activations": int(self.counts.sum()),
            "n_prompts": len(self.prompts),
            "reservoir": self.reservoir is not None,
            "source": self.source,
        }

    def to_dataframe(self) -> pd.DataFrame:
        """One row per region: count, coherence, mean distance, label, and the prompt nearest to the exemplar."""
        first = self.nearest.prompts[:, 0].tolist() if self.nearest.prompts.shape[1] else [-1] * self.n_regions
        columns = {
            "count": self.counts.numpy(),
            "coherence": self.coherence.numpy(),
            "mean_distance": (self.distance_sums / self.counts).numpy(),
            "exemplar_index": self.exemplar_indices.numpy(),
            "label": list(self.labels),
            "nearest_prompt": [self.prompts[i] if i >= 0 else None for i in first],
        }
        return pd.DataFrame(columns, index=pd.RangeIndex(self.n_regions, name="region"))

    def save(self, path: str | Path) -> Path:
        """Write the dictionary and, beside it, ``published.json`` and ``published.safetensors`` into a directory."""
        return FORMAT.save(self, Path(path), {Path(path): self.dictionary})

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> "PublishedDictionary":
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is truncated, foreign, newer than this package, or of another dictionary.
        """
        dictionary = ExemplarPartition.load_from_disk(path, device=device)
        return FORMAT.load(cls, Path(path), {"dictionary": dictionary})


def first_of_each(members: Ragged) -> Tensor:
    """The first entry of each region, -1 where it has none: int64 ``(k,)``."""
    starts, ends = members.offsets[:-1], members.offsets[1:]
    padded = torch.cat([members.values, torch.tensor([-1])])
    return torch.where(ends > starts, padded[starts], -1)
