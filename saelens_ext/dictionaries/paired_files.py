"""A JSON file and a safetensors file that belong together, saved so that either the old pair or the new one is there.

Two files cannot be replaced in one step. Both carry the id of their save, and the JSON file is replaced last: it
decides. Until then the tensors of the previous save stay beside the new ones under a name that holds their id, and
reading finds them there.
"""

import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from saelens_ext import _files

logger = logging.getLogger(__name__)

_ID = "save_id"
_KIND = "kind"


def write_pair(
    directory: Path, stem: str, kind: str, content: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write ``<stem>.json`` and ``<stem>.safetensors`` into a directory.

    Args:
        directory: made if missing.
        stem: of the two names.
        kind: what the pair is, so that another file of the same name is recognised.
        content: JSON-safe, with its ``format_version``.
        tensors: by name.
    """
    save_id = uuid.uuid4().hex
    json_path, tensors_path = _paths(directory, stem)
    staged = _files.write_tensors(_aside(directory, stem, save_id), tensors, {_ID: save_id, _KIND: kind})
    try:
        previous = _aside(directory, stem, _id_in(json_path))
        # An aside file that is there already, from an interrupted save, is the one that the JSON file belongs to.
        if tensors_path.exists() and not previous.exists():
            os.replace(tensors_path, previous)
        os.replace(staged, tensors_path)
        _files.write_json(json_path, {_KIND: kind, _ID: save_id, **content})
    finally:
        staged.unlink(missing_ok=True)
    for leftover in directory.glob(_aside(directory, stem, "*").name):
        leftover.unlink(missing_ok=True)


def read_pair(directory: Path, stem: str, kind: str, format_version: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what :func:`write_pair` wrote.

    Args:
        directory: where it is.
        stem: of the two names.
        kind: as it was written.
        format_version: the newest that can be read.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated, foreign or newer, or the two are of different saves.
    """
    json_path, tensors_path = _paths(directory, stem)
    content = _files.read_json(json_path)
    if content.pop(_KIND, None) != kind:
        raise ValueError(f"{json_path} is not a {kind}: it was not written by saelens-ext, or for something else.")
    _files.check_format_version(content.get("format_version"), format_version, json_path)
    save_id = content.pop(_ID, None)
    if not isinstance(save_id, str):
        raise ValueError(f"{json_path} has no {_ID}; it is not a whole {kind}.")
    aside = _aside(directory, stem, save_id)
    if aside.exists():
        logger.warning("A later save of %s was interrupted; reading the one before it.", tensors_path)
        tensors_path = aside
    tensors = _files.read_tensors(tensors_path)
    found = _header(tensors_path)
    if found.get(_KIND) != kind or found.get(_ID) != save_id:
        raise ValueError(
            f"{tensors_path} and {json_path} are not of the same save: they are of {found.get(_KIND)!r} "
            f"{found.get(_ID)!r} and {kind!r} {save_id!r}. Copy both files of one save, or save again."
        )
    return content, tensors


def _paths(directory: Path, stem: str) -> tuple[Path, Path]:
    return directory / f"{stem}.json", directory / f"{stem}.safetensors"


def _aside(directory: Path, stem: str, save_id: str) -> Path:
    return directory / f".{stem}.{save_id}.safetensors"


def _id_in(json_path: Path) -> str:
    """The save id in a JSON file; a name of its own where there is none, whose tensors nothing will look for."""
    try:
        return Path(str(_files.read_json(json_path)[_ID])).name
    except (FileNotFoundError, ValueError, KeyError):
        return "unknown"


def _header(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}).") from error
