"""What a fit returns: the dictionary, where its exemplars came from, and why the fit stopped."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saelens_ext import _files
from saelens_ext.activations.stream import ActivationBatch
from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from saelens_ext.ops.calibration import ThresholdEstimate
from saelens_ext.ops.modes import standard_modes

FORMAT = _files.Format("fit", "saelens_ext.ExemplarFitResult", version=2, oldest=2, stated=("n_regions",))


@dataclass(kw_only=True, frozen=True)
class Provenance:
    """Where each of k exemplars was observed; int64 tensors on the CPU."""

    document_ids: Tensor
    """Row of the dataset, ``(k,)``."""
    sequence_ids: Tensor
    """Window of the stream, ``(k,)``."""
    positions: Tensor
    """Position within that window, BOS included, ``(k,)``."""
    token_ids: Tensor
    """Token at that position, ``(k,)``."""
    windows: Tensor
    """Token ids of the whole window, ``(k, context_size)``, -1 behind its end."""

    @classmethod
    def of(cls, batch: ActivationBatch, rows: Tensor) -> "Provenance":
        """The provenance of some rows of a batch."""
        return cls(
            document_ids=batch.document_ids[rows],
            sequence_ids=batch.sequence_ids[rows],
            positions=batch.positions[rows],
            token_ids=batch.token_ids[rows],
            windows=batch.context(rows),
        )

    def to(self, dtype: torch.dtype) -> "Provenance":
        """The same in another dtype."""
        return Provenance(**{field.name: getattr(self, field.name).to(dtype) for field in fields(self)})

    @classmethod
    def join(cls, parts: "list[Provenance]") -> "Provenance":
        """All parts in order; windows of different lengths are padded with -1."""
        length = max(part.windows.shape[1] for part in parts)
        columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(cls)}
        columns["windows"] = [
            torch.nn.functional.pad(windows, (0, length - windows.shape[1]), value=-1) for windows in columns["windows"]
        ]
        return cls(**{name: torch.cat(column) for name, column in columns.items()})


@dataclass(kw_only=True, frozen=True)
class ExemplarFitResult:
    """A fitted ExemplarPartition and its statistics. Per-region tensors have one entry per row of the dictionary.

    Counts and coherence describe the assignment at arrival: each activation joined the nearest exemplar that came
    before it. :func:`saelens_ext.profile_dictionary` gives those of the final Voronoi cells.
    """

    dictionary: ExemplarPartition
    """The dictionary itself."""
    hook_name: str
    """The hook, as given to the stream."""
    percentile: float | None
    """Percentile of the threshold; None under another rule, or when the threshold was given."""
    threshold: ThresholdEstimate
    """The threshold, a cosine distance, with its interval."""
    stopped_because: str
    """"end_of_stream" (the budget or the data ran out), "unseen_mass" or "paper"."""
    n_seen: int
    """Activations clustered."""
    n_undirected: int
    """Of them, those equal to the centre, which belong to no region."""
    unseen_mass: float
    """Share of further activations that would found a region, in [0, 1]: that of the last half of the stream."""
    unseen_mass_upper: float
    """95% upper limit of it."""
    typical_norm: float
    """Median of |x - centre| over the calibration activations: the unit of steering strength."""
    counts: Tensor
    """Members of each region, int64 ``(k,)``."""
    coherence: Tensor
    """|sum of the members' unit directions| / members, in [0, 1], float32 ``(k,)``."""
    exemplar_indices: Tensor
    """Stream position of each exemplar, int64 ``(k,)``, increasing: the growth curve."""
    provenance: Provenance
    """Document, position, token and context of each exemplar."""

    @property
    def n_regions(self) -> int:
        """Number of regions."""
        return len(self.counts)

    def regions_after(self, seen: Any) -> np.ndarray:
        """How many regions the first activations had started, for each number of them."""
        return np.searchsorted(self.exemplar_indices.cpu().numpy(), seen)

    def save(self, path: str | Path) -> Path:
        """Write the dictionary and, beside it, its statistics (``fit.json``, ``fit.safetensors``) into a directory."""
        # Token ids and stream places fit 32 bits, and windows are the bulk of the file.
        small = replace(self, provenance=self.provenance.to(torch.int32))
        return FORMAT.save(small, Path(path), {Path(path): self.dictionary})

    @classmethod
    @standard_modes()
    def load(cls, path: str | Path, device: str = "cpu") -> "ExemplarFitResult":
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is truncated, foreign, newer than this package, or of another dictionary.
        """
        dictionary = ExemplarPartition.load_from_disk(path, device=device)
        loaded = FORMAT.load(cls, Path(path), {"dictionary": dictionary})
        return replace(loaded, provenance=loaded.provenance.to(torch.int64))
