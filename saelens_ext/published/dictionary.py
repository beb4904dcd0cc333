"""A published dictionary in this package's format: the partition and, beside it, all that the pickle said of its
regions.

Symbols
    k  regions
    d  width of the activations
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saelens_ext import _files
from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from saelens_ext.published.regions import PublishedExamples, Ragged, RegionStatistics

if TYPE_CHECKING:
    import pandas

FORMAT_VERSION = 1
STEM = "published"


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

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per region: count, coherence, mean distance, label, and the prompt nearest to the exemplar."""
        import pandas

        first = self.nearest.prompts[:, 0].tolist() if self.nearest.prompts.shape[1] else [-1] * self.n_regions
        columns = {
            "count": self.counts.numpy(),
            "coherence": self.coherence.numpy(),
            "mean_distance": (self.distance_sums / self.counts).numpy(),
            "exemplar_index": self.exemplar_indices.numpy(),
            "label": list(self.labels),
            "nearest_prompt": [self.prompts[i] if i >= 0 else None for i in first],
        }
        return pandas.DataFrame(columns, index=pandas.RangeIndex(self.n_regions, name="region"))

    def save(self, path: str | Path) -> Path:
        """Write the dictionary and, beside it, ``published.json`` and ``published.safetensors`` into a directory."""
        path = Path(path)
        tensors = {name: getattr(self, name) for name in _TENSORS}
        for name, kind in _GROUPS.items():
            if getattr(self, name) is not None:
                tensors |= {f"{name}.{field}": getattr(getattr(self, name), field) for field in kind._fields}
        content = {"format_version": FORMAT_VERSION, "n_regions": self.n_regions} | {
            name: getattr(self, name) for name in _SCALARS
        }
        _files.write_together(
            self.dictionary.files_to_save(path)
            | {
                path / f"{STEM}.safetensors": _files.tensors_writer(tensors),
                path / f"{STEM}.json": _files.json_writer(content),
            }
        )
        return path

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> "PublishedDictionary":
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is truncated, foreign, newer than this package, or of another dictionary.
        """
        path = Path(path)
        dictionary = ExemplarPartition.load_from_disk(path, device=device)
        content = _files.read_json(path / f"{STEM}.json")
        _files.check_format_version(content.get("format_version"), FORMAT_VERSION, path / f"{STEM}.json")
        tensors = _files.read_tensors(path / f"{STEM}.safetensors")
        groups = {name: kind for name, kind in _GROUPS.items() if name != "reservoir" or "reservoir.values" in tensors}
        wanted = [*_TENSORS, *(f"{name}.{field}" for name, kind in groups.items() for field in kind._fields)]
        missing = [name for name in _SCALARS if name not in content] + [name for name in wanted if name not in tensors]
        if missing:
            raise ValueError(f"The published dictionary in {path} lacks {', '.join(missing)}; it is not whole.")
        found = {content.get("n_regions"), len(content["labels"]), *(len(tensors[name]) for name in _TENSORS)}
        if found != {dictionary.cfg.d_sae}:
            raise ValueError(
                f"The files in {path} do not belong together: {STEM}.json is of {content.get('n_regions')} regions, "
                f"the dictionary of {dictionary.cfg.d_sae}."
            )
        parts = {name: kind(*(tensors[f"{name}.{field}"] for field in kind._fields)) for name, kind in groups.items()}
        scalars = {name: tuple(content[name]) if name in ("prompts", "labels") else content[name] for name in _SCALARS}
        return cls(
            dictionary=dictionary,
            **{name: tensors[name] for name in _TENSORS},
            **scalars,
            **({"reservoir": None} | parts),
        )


_TENSORS = ("counts", "coherence", "distance_sums", "squared_distance_sums", "exemplar_indices")
_GROUPS: dict[str, Any] = {
    "nearest": PublishedExamples,
    "boundary": PublishedExamples,
    "members": Ragged,
    "iterations": Ragged,
    "reservoir": Ragged,
}
_SCALARS = ("source", "build", "prompts", "labels", "merge_close", "last_founding_rate")


def first_of_each(members: Ragged) -> Tensor:
    """The first entry of each region, -1 where it has none: int64 ``(k,)``."""
    starts, ends = members.offsets[:-1], members.offsets[1:]
    padded = torch.cat([members.values, torch.tensor([-1])])
    return torch.where(ends > starts, padded[starts], -1)
