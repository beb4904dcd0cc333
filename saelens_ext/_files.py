"""Files that are whole or absent: safetensors + JSON, written to a temporary name and renamed."""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

logger = logging.getLogger(__name__)

Writer = Callable[[Path], Any]
T = TypeVar("T")

_ID, _KIND, _VERSION, _DICTIONARIES = "save_id", "kind", "format_version", "dictionaries"
# Classes of fields, and what JSON makes of them.
_JSON_TYPES: dict[Any, Any] = {kind: kind for kind in (bool, int, str, list, dict)}
_JSON_TYPES |= {float: (int, float), tuple: list, Mapping: dict, pd.DataFrame: dict}


def write_together(files: Mapping[Path, Writer]) -> None:
    """Write several files that belong together, each by a function that writes to the path it is given.

    Every file is written under a temporary name beside its place first; only when all are whole are they put in the
    place of the old ones, one right after the other. Whatever interrupts the writing leaves the old files as they were.
    """
    temporaries = {path: path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp") for path in files}
    try:
        for path, write in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporaries[path])
            # Without the flush a power cut after the rename can leave an empty file under the final name.
            with open(temporaries[path], "rb+") as file:
                os.fsync(file.fileno())
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def json_writer(content: Mapping[str, Any]) -> Writer:
    """A writer of ``content`` as JSON; what JSON cannot hold is refused here, before anything is written."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")


def tensors_writer(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Writer:
    """A writer of ``tensors`` as safetensors."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return lambda path: _save_tensors(contiguous, path, dict(metadata or {}))


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """``save_file``, with the error of the operating system as the OSError that it is."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        # safetensors reports a full disk as an error of its own, with the system's number only in the text.
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def short_name(value: Any) -> str:
    """16 characters that tell a JSON-safe value from others, to name its files by."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def write_json(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Write ``content`` as JSON; non-finite numbers are refused, since no other reader takes them."""
    write_together({Path(path): json_writer(content)})
    return Path(path)


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write ``tensors`` as safetensors."""
    write_together({Path(path): tensors_writer(tensors)})
    return Path(path)


def json_safe(value: Any, digits: int | None = None) -> Any:
    """A value as JSON has it: numbers that are not finite become null, paths text, tensors and arrays lists.

    Fractions are rounded to ``digits`` significant digits, if given.
    """
    if isinstance(value, Mapping):
        return {str(key): json_safe(entry, digits) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(entry, digits) for entry in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return json_safe(value.tolist(), digits)
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    return value if digits is None else float(f"{value:.{digits}g}")


def read_json(path: str | Path, format_version: int | None = None, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Read a JSON object of at most this format version, with these keys; ValueError names the file otherwise."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not readable as JSON ({error}); it is truncated or not ours.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} where a JSON object is expected; it is not ours.")
    if format_version is not None:
        check_format_version(content.pop(_VERSION, None), format_version, path)
    return having(content, keys, path)


def read_json_lines(path: str | Path, parse: Callable[[Any], T]) -> list[T]:
    """What ``parse`` makes of the JSON in each line of a file that is not empty; Unicode's other separators part none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no UTF-8, no JSON or that ``parse`` refuses, naming it.
    """
    found: list[T] = []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")  # some editors write a mark in front
                if text.strip():
                    found.append(parse(json.loads(text)))
            except ValueError as error:
                raise ValueError(f"Line {number} of {path}: {error}") from error
    return found


def having(content: dict[str, Any], keys: Sequence[str], path: Path) -> dict[str, Any]:
    """Return what a file holds; ValueError unless all of these keys are in it."""
    missing = [key for key in keys if key not in content]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it is not ours, or not whole.")
    return content


def read_tensors(path: str | Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Read a safetensors file; ValueError names the file when it is truncated or of another kind."""
    return read_with_metadata(Path(path), device)[0]


def read_with_metadata(path: Path, device: str = "cpu") -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What :func:`tensors_writer` wrote, and its metadata; errors as of :func:`read_tensors`."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); it is truncated or not ours.") from error


def check_format_version(version: Any, newest: int, what: str | Path, oldest: int = 1) -> None:
    """Raise ValueError unless ``version`` is a format version that can be read."""
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"{what} has format_version {version!r}; expected a whole number from {oldest} to {newest}.")
    if version > newest:
        raise ValueError(
            f"{what} was written in format_version {version}, this saelens-ext reads up to {newest}: "
            "upgrade with `pip install -U saelens-ext`."
        )
    if version < oldest:
        raise ValueError(
            f"{what} was written in format_version {version}, this saelens-ext reads from {oldest} on: build it again."
        )


@dataclass(frozen=True)
class Format:
    """How results of one class are saved: ``<stem>.json`` and ``<stem>.safetensors`` in a directory.

    Both hold the same save id, a digest of the tensors, and the JSON file the digests of the dictionaries that belong
    to the result. Files cannot be replaced in one step: the JSON file comes last and decides. Until then the previous
    tensors are kept under a name with their id, where reading finds them.
    """

    stem: str
    kind: str
    """What the files hold, so that others of the same name are recognised."""
    version: int
    oldest: int = 1
    """The first version that can still be read."""
    stated: tuple[str, ...] = ()
    """Properties of the result that the JSON file states, and that a loaded result must have."""
    nullable: bool = False
    """Whether numbers that are not finite become null in the JSON file; otherwise they are refused."""

    @property
    def names(self) -> tuple[str, str]:
        """The names of the JSON and the safetensors file."""
        return f"{self.stem}.json", f"{self.stem}.safetensors"

    def save(self, result: Any, directory: Path, dictionaries: Mapping[Path, Any] | None = None) -> Path:
        """Write a dataclass by its fields, and its dictionaries each into a folder; gives the directory."""
        content: dict[str, Any] = {name: json_safe(getattr(result, name)) for name in self.stated}
        tensors: dict[str, torch.Tensor] = {}
        for name in _field_types(type(result)):
            if name not in ("dictionary", "dictionaries"):
                _take_apart(name, getattr(result, name), content, tensors)
        return self.write(directory, json_safe(content) if self.nullable else content, tensors, dictionaries)

    def write(
        self,
        directory: Path,
        content: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        dictionaries: Mapping[Path, Any] | None = None,
    ) -> Path:
        """Write the two files and those of the dictionaries, all or nothing; gives the directory."""
        json_path, tensors_path = (directory / name for name in self.names)
        save_id, files = digest(tensors), dict[Path, Writer]()
        try:
            previous = self._aside(directory, Path(str(read_json(json_path)[_ID])).name)
        except (FileNotFoundError, ValueError, KeyError):
            previous = None
        # One that is there already, from an interrupted save, is the one that the JSON file belongs to.
        if previous is not None and tensors_path.exists() and not previous.exists():
            files[previous] = lambda path: _link(tensors_path, path)
        for folder, dictionary in (dictionaries or {}).items():
            files |= dictionary.files_to_save(folder)
        head: dict[str, Any] = {_VERSION: self.version, _KIND: self.kind, _ID: save_id}
        if dictionaries is not None:
            head[_DICTIONARIES] = [digest(dictionary.state_dict()) for dictionary in dictionaries.values()]
        files[tensors_path] = tensors_writer(tensors, {_ID: save_id, _KIND: self.kind})
        files[json_path] = json_writer(head | dict(content))
        write_together(files)
        for leftover in directory.glob(self._aside(directory, "*").name):
            leftover.unlink(missing_ok=True)
        return directory

    def load(
        self, result: type[T], directory: Path, dictionaries: Mapping[str, Any] | None = None, device: str = "cpu"
    ) -> T:
        """Read what :meth:`save` wrote; ``dictionaries`` are those that belong to it, by their field.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is truncated, foreign or newer, or they do not belong together.
        """
        content, tensors = self.read(directory, device)
        path = directory / self.names[0]
        missing = [name for name in self.stated if content.get(name) is None]
        values = {
            name: _put_together(hint, name, content.get(name), tensors, missing)
            for name, hint in _field_types(result).items()
            if name not in (dictionaries or {})
        }
        if missing:
            raise ValueError(
                f"The {self.kind} of {path} and {self.names[1]} lacks {', '.join(missing)}, or holds something else "
                "there; it is not whole."
            )
        for dictionary in (dictionaries or {}).values():
            members = dictionary if isinstance(dictionary, list) else [dictionary]
            if content.get(_DICTIONARIES) != [digest(member.state_dict()) for member in members]:
                raise ValueError(f"{path} and the dictionary in {directory} are of different fits: {_APART}")
        loaded = result(**values, **(dictionaries or {}))
        for name in self.stated:
            if content[name] != (size := json_safe(getattr(loaded, name))):
                raise ValueError(f"{path} is damaged: it states {name} {content[name]}, its tensors {size}: {_APART}")
        return loaded

    def read(self, directory: Path, device: str = "cpu") -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What the JSON file holds, and the tensors by name."""
        json_path, tensors_path = (directory / name for name in self.names)
        content = read_json(json_path)
        check_format_version(content.pop(_VERSION, None), self.version, json_path, self.oldest)
        if content.pop(_KIND, None) != self.kind:
            raise ValueError(f"{json_path} is not a {self.kind}: it is of another kind, or not ours.")
        save_id = content.pop(_ID, None)
        if not isinstance(save_id, str):
            raise ValueError(f"{json_path} has no {_ID}; it is not a whole {self.kind}.")
        if (aside := self._aside(directory, save_id)).exists():
            logger.warning("A later save of %s was interrupted; reading the one before it.", tensors_path)
            tensors_path = aside
        tensors, header = read_with_metadata(tensors_path, device)
        if header.get(_KIND) != self.kind or header.get(_ID) != save_id:
            raise ValueError(
                f"{tensors_path} and {json_path} are not of the same save ({header.get(_KIND)!r} {header.get(_ID)!r} "
                f"and {self.kind!r} {save_id!r}): {_APART}"
            )
        return content, tensors

    def _aside(self, directory: Path, save_id: str) -> Path:
        return directory / f".{self.stem}.{save_id}.safetensors"


_APART = "they do not belong together. Copy all files of one save, or save again."


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """A SHA-256 that tells these tensors from all others."""
    checksum = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        checksum.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if len(numbers := tensor.reshape(-1)):  # of none torch gives no bytes, where they came from an empty array
            checksum.update(numbers.view(torch.uint8).numpy().data)
    return checksum.hexdigest()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _field_types(kind: Any) -> dict[str, Any]:
    """The types of the fields of a dataclass or a named tuple by name; empty for other types."""
    names = [field.name for field in fields(kind)] if is_dataclass(kind) else getattr(kind, "_fields", ())
    hints = get_type_hints(kind) if names else {}
    return {name: hints[name] for name in names}


def _take_apart(name: str, value: Any, content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Put a field's tensors under dotted names, and what JSON can hold beside them."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return
    if isinstance(value, pd.DataFrame):
        content[name], columns = _columns(value)
        tensors |= {f"{name}.{column}": entries for column, entries in columns.items()}
        return
    parts: Mapping[str, Any] = {part: getattr(value, part) for part in _field_types(type(value))}
    if not parts and isinstance(value, Mapping):
        parts = value
    if not parts and isinstance(value, list) and any(isinstance(entry, torch.Tensor) for entry in value):
        parts = {str(number): entry for number, entry in enumerate(value)}
    if not any(isinstance(part, torch.Tensor) for part in parts.values()):
        content[name] = dict(parts) if parts or isinstance(value, Mapping) else value
        return
    if isinstance(value, Mapping):  # safetensors keeps no order
        content[name] = list(parts)
    tensors |= {f"{name}.{part}": entry for part, entry in parts.items() if entry is not None}


def _columns(table: pd.DataFrame) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """By column, what JSON holds (the different texts, null for numbers), and the numbers or those of the texts."""
    different: dict[str, Any] = {}
    columns: dict[str, torch.Tensor] = {}
    for column in map(str, table.columns):
        entries, different[column] = table[column].to_numpy(), None
        if entries.dtype.kind not in "biuf":
            codes, texts = pd.factorize(table[column])
            entries, different[column] = codes.astype(np.int32), [str(text) for text in texts]
        columns[column] = torch.from_numpy(np.array(entries))
    return different, columns


def _put_together(hint: Any, name: str, saved: Any, tensors: Mapping[str, torch.Tensor], missing: list[str]) -> Any:
    """A field from what :func:`_take_apart` made of it; names of what is not there are added to ``missing``."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    inside = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    if name in tensors or (saved is None and not inside and NoneType in kinds):
        return tensors.get(name)
    kind = next(kind for kind in kinds if kind is not NoneType)
    if parts := _field_types(kind):
        saved = saved if isinstance(saved, dict) else {}
        values = {p: _put_together(h, f"{name}.{p}", saved.get(p), tensors, missing) for p, h in parts.items()}
        return None if missing else kind(**values)
    if torch.Tensor in get_args(kind):  # a list or a mapping of tensors
        if get_origin(kind) is list:
            return [inside[str(number)] for number in range(len(inside))]
        return {part: inside[part] for part in saved if part in inside} if isinstance(saved, list) else inside
    expected = () if kind is torch.Tensor else _JSON_TYPES.get(get_origin(kind) or kind, object)
    if not isinstance(saved, expected) or (isinstance(saved, bool) and kind in (int, float)):
        missing.append(name)
    elif kind is pd.DataFrame and isinstance(saved, dict):
        table: dict[str, Any] = {column: inside[column].numpy() for column in saved}
        table |= {c: np.array([*t, None], dtype=object)[table[c]].tolist() for c, t in saved.items() if t is not None}
        return pd.DataFrame(table)
    elif get_origin(kind) is tuple and isinstance(saved, list):
        entry = get_args(kind)[0]  # itself a tuple, with names or without, or something plain
        make = getattr(entry, "_make", tuple if get_origin(entry) is tuple else None)
        return tuple(saved if make is None else map(make, saved))
    return saved
