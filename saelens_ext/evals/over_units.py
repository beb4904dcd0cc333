"""Measurements of single units, such as prompts: kept one by one in a folder, made here or by workers that load what
they need.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm

from saelens_ext import _checks, _files
from saelens_ext.continuations.subject import Inputs, Subject, let_go
from saelens_ext.evals.sweep_store import SweepStore
from saelens_ext.workers.spread import IN_FOLDER, WORKERS, Job, spread

T = TypeVar("T")
Measured = dict[str, Any]
Measure = Callable[[Subject], Callable[[int], Measured]]
"""Makes of what was loaded, once, what measures the unit of a number; what that gives is JSON-safe. It travels to
workers by cloudpickle."""


@dataclass(kw_only=True)
class OverUnits:
    """What is measured of each of several units, and by whom."""

    inputs: Inputs
    keys: Sequence[Any]
    """What tells each unit from others, JSON-safe."""
    kind: str
    """What a unit is called in the folder."""
    n_workers: int = 1
    workers: str = "joblib"
    actor_options: dict[str, Any] | None = None
    lasting: Callable[[Measured], bool] = lambda found: True
    """Whether a result is kept, or measured again by the next call."""
    about: Mapping[str, Any] = field(init=False, default_factory=dict)
    """What is measured, in words, once it was opened."""
    _subject: Subject | None = field(init=False, default=None)

    def opened(self, look: Callable[[Subject], T]) -> T:
        """Load what is measured, and give what ``look`` makes of it; with several workers it is let go after that.

        Raises:
            ValueError: options that are none, or a model that workers cannot load.
        """
        _checks.choice(self.workers, WORKERS, "workers")
        self.inputs.check_workers(_checks.positive(self.n_workers, "n_workers"))
        subject = self.inputs.load()
        self.about = subject.about
        found = look(subject)
        self._subject = subject if self.n_workers == 1 else None
        del subject
        let_go()
        return found

    def measured(self, measure: Measure, store: SweepStore, progress: bool) -> list[Measured]:
        """For each unit what is kept already, or what is found and kept now; call :meth:`opened` before.

        Args:
            measure: what makes the measure of a unit.
            store: where results are kept.
            progress: show a progress bar.

        Raises:
            RuntimeError: a worker died.
        """
        kept = {number: store.kept(self.kind, key) for number, key in enumerate(self.keys)}
        found: dict[int, Any] = {number: one for number, one in kept.items() if one is not None}
        missing = [number for number in kept if number not in found]
        if missing and self._subject is not None:
            do = self._job(measure, self._subject, store)
            bar = tqdm(missing, disable=not progress, desc=self.kind, unit=self.kind)
            found |= {number: do(number) for number in bar}
        elif missing:
            load = partial(self._in_worker, measure, store.folder)
            again = "Call it again." if store.folder is None else IN_FOLDER
            how = self.workers, self.n_workers, self.actor_options
            found |= spread(load, missing, *how, progress, again, unit=self.kind)
        return [found[number] for number in range(len(self.keys))]

    def _in_worker(self, measure: Measure, folder: Path | None) -> Job:
        """What a worker does; it loads what is measured."""
        return self._job(measure, self.inputs.load_as(self.about), SweepStore(folder))

    def _job(self, measure: Measure, subject: Subject, store: SweepStore) -> Callable[[int], Measured]:
        own = measure(subject)

        def do(number: int) -> Measured:
            found = _files.json_safe(own(number))
            if self.lasting(found):
                store.keep(self.kind, self.keys[number], found)
            return found

        return do


def whole(found: Measured) -> bool:
    """Whether a result has no ``failures``: errors of this time, after which the next call tries again."""
    return not found["failures"]
