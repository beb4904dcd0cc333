"""Measurements of single prompts: kept one by one in a folder, made here or by workers that load what they need."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from saelens_ext import _checks
from saelens_ext.audit.subject import Inputs, Subject, let_go
from saelens_ext.evals.sweep_store import SweepStore
from saelens_ext.workers.spread import IN_FOLDER, WORKERS, Job, spread

Measured = dict[str, Any]
Measure = Callable[[Subject, int], Measured]
"""What is measured for the number of a prompt, JSON-safe; it travels to workers by cloudpickle."""


class Unmeasured(NamedTuple):
    """In the place of what could not be measured."""

    error: str


@dataclass(frozen=True, kw_only=True)
class OverPrompts:
    """What is measured of each of several prompts, and by whom."""

    inputs: Inputs
    keys: Sequence[Any]
    """What tells each prompt from others, JSON-safe."""
    kind: str
    """What a prompt is called in the folder."""
    n_workers: int = 1
    workers: str = "joblib"
    actor_options: dict[str, Any] | None = None
    catch: type[Exception] | tuple[()] = ()
    """Errors that leave the other prompts to be measured."""

    def check(self) -> None:
        """ValueError for options that are none, or a model that workers cannot load."""
        _checks.choice(self.workers, WORKERS, "workers")
        self.inputs.check_workers(_checks.positive(self.n_workers, "n_workers"))

    def load(self) -> tuple[Mapping[str, Any], Subject | None]:
        """What is measured, in words, and itself; with several workers it is not kept."""
        subject = self.inputs.load()
        about = subject.about
        if self.n_workers == 1:
            return about, subject
        del subject
        let_go()
        return about, None

    def measured(
        self, measure: Measure, subject: Subject | None, about: Mapping[str, Any], store: SweepStore, progress: bool
    ) -> list[Measured | Unmeasured]:
        """For each prompt what is kept already, or what is found and kept now.

        Args:
            measure: what is found for a number.
            subject: what :meth:`load` gave, and likewise ``about``.
            store: where results are kept.
            progress: show a progress bar.

        Raises:
            RuntimeError: a worker died.
        """
        if subject is not None:
            do = self._do(measure, subject, store)
            numbers = tqdm(range(len(self.keys)), disable=not progress, desc=self.kind, unit=self.kind)
            return [do(number) for number in numbers]
        kept = {number: store.kept(self.kind, key) for number, key in enumerate(self.keys)}
        found = {number: one for number, one in kept.items() if one is not None}
        missing = [number for number in kept if number not in found]
        if missing:
            load = partial(self._job, measure, about, store.folder)
            again = "Call it again." if store.folder is None else IN_FOLDER
            how = self.workers, self.n_workers, self.actor_options
            found |= spread(load, missing, *how, progress, again)
        return [found[number] for number in range(len(self.keys))]

    def _job(self, measure: Measure, about: Mapping[str, Any], folder: Path | None) -> Job:
        """What a worker does; it loads what is measured."""
        return self._do(measure, self.inputs.load_as(about), SweepStore(folder))

    def _do(self, measure: Measure, subject: Subject, store: SweepStore) -> Callable[[int], Measured | Unmeasured]:
        def do(number: int) -> Measured | Unmeasured:
            try:
                return store.of(self.kind, self.keys[number], partial(measure, subject, number))
            except self.catch as error:
                return Unmeasured(f"{type(error).__name__}: {error}")

        return do
