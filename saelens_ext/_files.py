"""Files that are whole or absent: safetensors + JSON, written to a temporary name and renamed."""

import json
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a temporary file beside ``path``, then put it in the place of ``path`` in one step.

    Whatever interrupts the writing, ``path`` holds its old content or the whole new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        write(temporary)
        # Without the flush a power cut after the rename can leave an empty file under the final name.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(path: str | Path, content: Mapping[str, Any]) -> Path:
    """Write ``content`` as JSON; non-finite numbers are refused, since no other reader takes them."""
    text = json.dumps(content, indent=2, allow_nan=False)
    return write_atomically(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8") and None)


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write ``tensors`` as safetensors."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    return write_atomically(path, lambda temporary: save_file(contiguous, temporary, metadata=dict(metadata or {})))


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
