"""What a fit of an SNMFDictionary returns: the dictionary, how well it reconstructs, and why the fit ended."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from saelens_ext import _files
from saelens_ext.dictionaries.snmf import SNMFDictionary
from saelens_ext.ops.modes import standard_modes

FORMAT = _files.Format("fit", "saelens_ext.SNMFFitResult", version=2, oldest=2, stated=("n_components",))


@dataclass(kw_only=True, frozen=True)
class SNMFFitResult:
    """A fitted SNMFDictionary and its statistics. Its features are unit rows, the one with the largest share first."""

    dictionary: SNMFDictionary
    """The dictionary itself."""
    hook_name: str
    """The hook, as given to the stream."""
    stopped_because: str
    """"converged" (the objective fell no further), "max_iter" or, for a fit in several passes, "max_passes"."""
    n_seen: int
    """Activations that the features were fitted to."""
    n_held_out: int
    """Activations of the documents that were kept out of the fit."""
    loss: float
    """Squared error over the sum of squares of the activations, with the codes of ``encode``; 0 is perfect."""
    held_out_loss: float | None
    """The same on the documents kept out; None if there were none."""
    history: list[float]
    """The objective after each iteration (or pass); never rises. With an L1 penalty it is above the loss."""
    n_dead: int
    """Features that are zero or whose codes all are."""
    n_duplicate: int
    """Features whose cosine with another exceeds 0.99, counted once."""
    n_revived: int
    """Dead or duplicate features that the fit replaced."""
    typical_norm: float
    """Median norm of the activations: the unit of steering strength."""
    shares: Tensor
    """Sum of squares of each feature's own contribution over that of the activations, float32 ``(k,)``."""

    @property
    def n_components(self) -> int:
        """Number of features."""
        return len(self.shares)

    def save(self, path: str | Path) -> Path:
        """Write the dictionary and, beside it, its statistics (``fit.json``, ``fit.safetensors``) into a directory."""
        return FORMAT.save(self, Path(path), {Path(path): self.dictionary})

    @classmethod
    @standard_modes()
    def load(cls, path: str | Path, device: str = "cpu") -> "SNMFFitResult":
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is truncated, foreign, newer than this package, or of another dictionary.
        """
        return FORMAT.load(cls, Path(path), {"dictionary": SNMFDictionary.load_from_disk(path, device=device)})
