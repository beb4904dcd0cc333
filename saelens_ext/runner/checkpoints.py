"""Checkpoints of a run: what its dictionaries have become after so many windows, and which run it is.

A run's folder ``<checkpoint_path>/<run id>`` holds ``run.json`` (the config, and what is read), a folder per checkpoint
named by the activations read by then, and finished factorisations in ``snmf``.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from saelens_ext import _files

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
FORMAT = _files.Format("checkpoint", "saelens_ext.RunCheckpoint", version=1)
RUN_FILENAME = "run.json"
SNMF_FOLDER = "snmf"
# What may differ between a run and its continuation: where things go, and what is done with finished dictionaries.
_FREE = {"output_path", "checkpoint_path", "resume_from_checkpoint", "n_checkpoints", "logger", "progress", "profile"}
_FREE |= {"n_eval_batches", "eval_batch_size_prompts", "streaming"}
_FINGERPRINT = "source.dataset_fingerprint"


@dataclass(kw_only=True, frozen=True)
class RunIdentity:
    """Which run it is."""

    run_id: str
    """Name of its folder, and the start of the ids of its wandb runs."""
    config: dict[str, Any]
    """The resolved config, as ``to_dict`` gives it."""
    source: dict[str, Any]
    """What is read, as the stream describes it."""

    def save(self, folder: Path) -> None:
        """Write ``run.json`` into the run's folder."""
        _files.write_json(folder / RUN_FILENAME, {"format_version": FORMAT_VERSION} | asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "RunIdentity":
        """Read what :meth:`save` wrote."""
        keys = ("run_id", "config", "source")
        content = _files.read_json(folder / RUN_FILENAME, FORMAT_VERSION, keys)
        return cls(**{key: content[key] for key in keys})

    def check_same(self, config: Mapping[str, Any], source: Mapping[str, Any], where: Path) -> None:
        """Raise ValueError, naming each field that differs, unless a run of this config and source continues it."""
        then, now = _flat(self.config) | _flat({"source": self.source}), _flat(config) | _flat({"source": source})
        names = [name for name in dict.fromkeys([*then, *now]) if name.split(".")[0] not in _FREE]
        differing = [name for name in names if then.get(name) != now.get(name)]
        # A stream that arrives from elsewhere has no fingerprint, and the same data downloaded has.
        if then.get(_FINGERPRINT) is None or now.get(_FINGERPRINT) is None:
            differing = [name for name in differing if name != _FINGERPRINT]
        # The source repeats fields of the config, in the form that they took.
        fields = {name.removeprefix("source."): name for name in reversed(differing)}
        if fields:
            pairs = {field: (then.get(name), now.get(name)) for field, name in reversed(fields.items())}
            changes = "; ".join(f"{field} was {old!r} and is {new!r}" for field, (old, new) in pairs.items())
            raise ValueError(
                f"The checkpoint {where} is of another run: {changes}. Resume with the config it was made with "
                f"({where / RUN_FILENAME}), or start a new run without resume_from_checkpoint."
            )


@dataclass(kw_only=True, frozen=True)
class Checkpoint:
    """The state of a pass after a whole number of batches."""

    n_windows: int
    """Windows read."""
    n_activations: int
    """Activations read."""
    last_document: int
    """The last document read from, -1 before the first."""
    complete: bool
    """Whether the pass had ended."""
    builds: list[list[dict[str, Any]]]
    """What every build of ExemplarPartitions said of its growths."""
    gathered: list[dict[str, Any]]
    """What is known of the activations gathered for factorisations; empty where they are not held."""
    tensors: dict[str, Tensor] = field(repr=False)
    """Tensors of both, the number of the build, or gathered/ and its number, in front of each name."""

    def save(self, folder: Path) -> Path:
        """Write the checkpoint into a folder of its own within the run's."""
        content = {name: getattr(self, name) for name in _CONTENT}
        return FORMAT.write(folder / str(self.n_activations), content, self.tensors)

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is truncated, foreign, or newer than this package.
        """
        content, tensors = FORMAT.read(path)
        _files.having(content, _CONTENT, path / FORMAT.names[0])
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        return cls(tensors=tensors, **{name: content[name] for name in _CONTENT})

    def tensors_of(self, number: int, kind: str = "") -> dict[str, Tensor]:
        """The tensors of one build, or of what is "gathered/"."""
        prefix = f"{kind}{number}/"
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}


def find_run(path: str | Path) -> tuple[Path, Path | None]:
    """The folder of a run, given itself or a checkpoint in it, and its last checkpoint, None if it has made none yet.

    Raises:
        FileNotFoundError: there is neither; if there are folders of runs, they are named.
        NotADirectoryError: it is a file.
    """
    path = Path(path)
    if path.is_file():
        raise NotADirectoryError(f"resume_from_checkpoint={str(path)!r} is a file; give its folder, {path.parent}.")
    if (path / FORMAT.names[0]).exists() and (path.parent / RUN_FILENAME).exists():
        return path.parent, path
    if (path / RUN_FILENAME).exists():
        made = list_checkpoints(path)
        return path, made[-1] if made else None
    runs = sorted(str(folder.parent) for folder in path.glob(f"*/{RUN_FILENAME}"))
    several = f" It holds several runs; name one: {', '.join(runs)}."
    hint = several if runs else " Give the folder of a run, or of one of its checkpoints."
    raise FileNotFoundError(f"resume_from_checkpoint={str(path)!r} is not the folder of a run's checkpoints.{hint}")


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a run's folder, the earliest first."""
    found = [path.parent for path in folder.glob(f"*/{FORMAT.names[0]}") if path.parent.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name))


def numbered(states: Sequence[Mapping[str, Tensor]], kind: str = "") -> dict[str, Tensor]:
    """The tensors of several states under the names by which :meth:`Checkpoint.tensors_of` finds them."""
    return {f"{kind}{number}/{name}": tensor for number, own in enumerate(states) for name, tensor in own.items()}


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries and lists of them with dotted names; lists of values stay whole."""
    if isinstance(content, Mapping):
        pairs = content.items()
    elif isinstance(content, list) and any(isinstance(item, Mapping) for item in content):
        pairs = ((str(number), item) for number, item in enumerate(content))
    else:
        return {prefix: content}
    flat: dict[str, Any] = {}
    for name, value in pairs:
        flat |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


_CONTENT = ("n_windows", "n_activations", "last_document", "complete", "builds", "gathered")
