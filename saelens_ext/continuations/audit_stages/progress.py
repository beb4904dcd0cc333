"""One bar for a whole audit, which knows how long each of its stages takes."""

import time
from collections.abc import Callable
from types import TracebackType

from tqdm.auto import tqdm

STAGES = {"sampling": 0.2, "embedding": 0.05, "attributing": 0.2, "clustering": 0.1, "testing by steering": 0.45}
"""The stages of a prompt, with the fraction of its time that each takes, as guessed before one prompt is done."""

_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} so far, about {remaining} left"


class AuditBar:
    """Progress over prompts and their stages: a prompt counts 1, and a stage the fraction of time it was seen to take.

    Stages that are found in the folder take no time and count as done.
    """

    def __init__(self, n_prompts: int, show: bool, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._times: dict[str, list[float]] = {stage: [] for stage in STAGES}
        self._running: tuple[str, float] | None = None
        self._done = 0
        self._n_prompts = n_prompts
        # Not smoothed: the rate of the last stage says nothing about that of the next.
        self._bar = tqdm(total=float(n_prompts), desc="audit", disable=not show, bar_format=_FORMAT, smoothing=0)

    @property
    def n(self) -> float:
        """Prompts done, and the part of the present one."""
        stages, weights = list(STAGES), self.weights
        before = [] if self._running is None else stages[: stages.index(self._running[0])]
        return float(self._done + sum(weights[stage] for stage in before))

    @property
    def weights(self) -> dict[str, float]:
        """The fraction of a prompt's time that each stage takes: as measured, once all were, else as guessed."""
        if not all(self._times.values()):
            return STAGES
        means = {stage: sum(times) / len(times) for stage, times in self._times.items()}
        total = sum(means.values())
        return {stage: mean / total for stage, mean in means.items()} if total else STAGES

    def begin(self, stage: str) -> None:
        """A stage begins, and the one before has ended."""
        self._end_stage()
        self._running = stage, self._clock()
        place = f"prompt {self._done + 1} of {self._n_prompts}, " if self._n_prompts > 1 else ""
        self._show(f"audit, {place}{stage}")

    def end_prompt(self) -> None:
        """All of a prompt is done, or has failed."""
        self._end_stage()
        self._running = None
        self._done += 1
        self._show("audit")

    def _end_stage(self) -> None:
        if self._running is not None:
            stage, since = self._running
            self._times[stage].append(self._clock() - since)

    def _show(self, words: str) -> None:
        self._bar.set_description_str(words, refresh=False)
        self._bar.update(self.n - self._bar.n)
        self._bar.refresh()

    def __enter__(self) -> "AuditBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
