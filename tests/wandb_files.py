"""What wandb wrote in its offline mode, read back from its run files.

A ``.wandb`` file is a log in the format of LevelDB: a header of 7 bytes, then blocks of 32 KiB with records in pieces,
each behind a checksum (4 bytes), its length (2) and its kind (1: whole, 2: first, 3: middle, 4: last piece).
wandb's own process writes it, a buffer at a time: while it runs, the file may end within a record.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK = 32 * 1024


@dataclass
class WandbRun:
    """One run, as it was logged."""

    run_id: str = ""
    name: str = ""
    project: str = ""
    group: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[Any] = field(default_factory=list)
    exit_code: int | None = None

    def logged(self, key: str) -> list[Any]:
        """All values of a key, in order."""
        return [row[key] for row in self.history if key in row]

    @property
    def keys(self) -> set[str]:
        """Everything that was logged."""
        return {key for row in self.history for key in row}


def read_run(path: Path) -> WandbRun:
    """The run in a file, or as much of it as is written so far."""
    run = WandbRun()
    for raw in _records(path.read_bytes()):
        record = Record()
        record.ParseFromString(raw)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.run_id, run.name, run.project = record.run.run_id, record.run.display_name, record.run.project
            run.group = record.run.run_group
            run.config |= {
                item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.run.config.update
            }
        elif kind == "history":
            run.history.append(
                {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            )
        elif kind == "artifact":
            run.artifacts.append(record.artifact)
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            run.artifacts.append(record.request.log_artifact.artifact)
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _records(data: bytes) -> Iterator[bytes]:
    """The records that are there in full."""
    position, parts = 7, b""
    while position + 7 <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        if kind == 0:
            position += left
            continue
        start, position = position + 7, position + 7 + length
        if position > len(data):
            return
        parts += data[start:position]
        if kind in (1, 4):
            yield parts
            parts = b""
