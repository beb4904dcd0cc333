"""Fingerprints of data, which tell whether two runs read the same documents."""

import hashlib
from pathlib import Path
from typing import Any

_MIB = 2**20


def fingerprint_files(path: str | Path) -> str:
    """A fingerprint of a file, or of all files in a folder but hidden ones: of their names, sizes, first and last MiB.

    It tells the same data however it is read, streamed or not; a change in the middle of a large file that keeps its
    size goes unnoticed.
    """
    path = Path(path)
    root, files = (path, path.rglob("*")) if path.is_dir() else (path.parent, [path])
    inside = [(file.relative_to(root), file) for file in files]
    digest = hashlib.sha256()
    for name, file in sorted(inside):
        if not file.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        size = file.stat().st_size
        digest.update(f"{name.as_posix()}\0{size}\0".encode())
        with open(file, "rb") as content:
            digest.update(content.read(_MIB))
            if size > _MIB:
                content.seek(max(_MIB, size - _MIB))
                digest.update(content.read(_MIB))
    return digest.hexdigest()[:16]


def hash_texts(rows: Any) -> str | None:
    """A fingerprint of a plain list; None for what would have to be downloaded to know."""
    if not isinstance(rows, (list, tuple)):
        return None
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode() + b"\0")
    return digest.hexdigest()[:16]
