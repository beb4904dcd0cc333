"""The cells of a sweep and other parts of an evaluation that are done, in a folder or in memory."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saelens_ext import _files

_SETTINGS = "sweep.json"


@dataclass
class SweepStore:
    """Cells by percentile and seed, each in a file of its own that is whole or absent."""

    folder: Path | None = None
    known: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def at(cls, folder: str | Path | None, settings: dict[str, Any]) -> "SweepStore":
        """The cells of a folder, which is made where there is none; without one they are kept in memory.

        Raises:
            ValueError: the folder holds a sweep of other settings.
        """
        if folder is None:
            return cls()
        path, own = Path(folder), _files.json_safe(settings)
        if (path / _SETTINGS).exists():
            there = _files.read_json(path / _SETTINGS)
            apart = [name for name in own if there.get(name) != own[name]]
            if apart:
                raise ValueError(
                    f"{path} holds a sweep that differs in {apart[0]} ({str(there.get(apart[0]))[:80]}, now "
                    f"{str(own[apart[0]])[:80]}); give the same, or another folder."
                )
        else:
            _files.write_json(path / _SETTINGS, own)
        return cls(path)

    def kept(self, kind: str, key: Any) -> dict[str, Any] | None:
        """The result of a JSON-safe key if it is there, whatever other keys there are."""
        return self._get(f"{kind} {_files.short_name(key)}")

    def keep(self, kind: str, key: Any, content: dict[str, Any]) -> None:
        """Keep the result of a key, JSON-safe."""
        self._put(f"{kind} {_files.short_name(key)}", content)

    def named(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A result that is there, or made and kept now, as JSON holds it."""
        found = self._get(name)
        if found is None:
            found = _files.json_safe(make())
            self._put(name, found)
        return found

    def cell(self, percentile: float, seed: int) -> dict[str, Any] | None:
        """A cell that is done."""
        return self._get(_file(percentile, seed))

    def put(self, percentile: float, seed: int, cell: dict[str, Any]) -> None:
        """Keep a cell."""
        self._put(_file(percentile, seed), _files.json_safe(cell))

    def _get(self, name: str) -> dict[str, Any] | None:
        if self.folder is not None and name not in self.known and (self.folder / f"{name}.json").exists():
            self.known[name] = _files.read_json(self.folder / f"{name}.json")
        return self.known.get(name)

    def _put(self, name: str, content: dict[str, Any]) -> None:
        if self.folder is not None:
            _files.write_json(self.folder / f"{name}.json", content)
        self.known[name] = content


def _file(percentile: float, seed: int) -> str:
    return f"cell p{percentile:g} seed {seed}"
