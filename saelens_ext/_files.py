"""Files that are whole or absent: safetensors + JSON, written to a temporary name and renamed."""

import json
import os
import re
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

Writer = Callable[[Path], Any]


def write_together(files: Mapping[Path, Writer]) -> None:
    """Write several files that belong together.

    Every file is written under a temporary name beside its place first; only when all are whole are they put in the
    place of the old ones, one right after the other. Whatever interrupts the writing leaves the old files as they were.

    Args:
        files: for each path, a function that writes its content to the path it is given.
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
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
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


def write_json(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Write ``content`` as JSON; non-finite numbers are refused, since no other reader takes them."""
    write_together({Path(path): json_writer(content)})
    return Path(path)


def write_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write ``tensors`` as safetensors."""
    write_together({Path(path): tensors_writer(tensors, metadata)})
    return Path(path)


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object; ValueError names the file when it is not one."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable as JSON ({error}); it is truncated or not ours.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} where a JSON object is expected; it is not ours.")
    return content


def read_tensors(path: str | Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Read a safetensors file; ValueError names the file when it is truncated or of another kind."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        with safe_open(path, framework="pt", device=device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); it is truncated or not ours.") from error


def check_format_version(found: Any, known: int, what: str | Path) -> None:
    """Raise ValueError unless ``found`` is a format version from 1 to ``known``."""
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ValueError(f"{what} has format_version {found!r}; expected a whole number from 1 to {known}.")
    if found > known:
        raise ValueError(
            f"{what} was written in format_version {found}, this saelens-ext reads up to {known}: "
            "upgrade with `pip install -U saelens-ext`."
        )
