"""A chain of reasoning steps, with the candidates that were sampled for each.

A step is a run of tokens up to and with the one that completes the delimiter. At every step candidates are sampled
behind the steps committed so far, and one of them is committed; tokens are never cut anew.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from saelens_ext import _files
from saelens_ext.continuations.continuation_set import ContinuationSet

JSON_FILENAME, VERSION = "steps.json", 1


@dataclass(frozen=True, kw_only=True, eq=False)
class StepTree:
    """The steps of one problem, from ``sample_steps``.

    Raises:
        ValueError: no step, or candidates that do not go on from the steps committed before them.
    """

    steps: tuple[ContinuationSet, ...]
    """Candidates of each step; the prefix of each holds the prompt and the steps before."""
    committed: tuple[int, ...]
    """Which candidate of each step the next one goes on from."""
    ended_by: str
    """"final" (a final marker), "eos" or "max_steps"."""
    settings: Mapping[str, Any]
    """How it was sampled; JSON-safe."""

    def __post_init__(self) -> None:
        if not self.steps or len(self.steps) != len(self.committed):
            n, m = len(self.steps), len(self.committed)
            raise ValueError(f"A StepTree needs one step or more and as many committed rows, got {n} and {m}.")
        for number, (before, after) in enumerate(pairwise(range(len(self.steps))), start=1):
            expected = (*self.steps[before].prefix_ids, *self.ids_of(before))
            if self.steps[after].prefix_ids != expected:
                raise ValueError(f"The candidates of step {number + 1} do not go on from the committed step {number}.")

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def prompt(self) -> str:
        """The problem as it was given."""
        return self.steps[0].prompt

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Its tokens, with those of a chat template and BOS."""
        return self.steps[0].prefix_ids

    def ids_of(self, step: int) -> list[int]:
        """The tokens of a committed step, counted from 0."""
        return self.steps[step].ids_of(self.committed[step])

    @property
    def token_ids(self) -> list[int]:
        """The tokens of prompt and committed steps."""
        return [*self.prompt_ids, *(token for step in range(len(self)) for token in self.ids_of(step))]

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """First and past-the-last position of the prompt, and of every committed step."""
        lengths = [len(self.prompt_ids), *(len(self.ids_of(step)) for step in range(len(self)))]
        return tuple(pairwise(accumulate(lengths, initial=0)))

    @property
    def texts(self) -> tuple[str, ...]:
        """The committed steps."""
        return tuple(step.texts[row] for step, row in zip(self.steps, self.committed, strict=True))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per candidate: its step (from 1), text and probabilities, and whether it was committed."""
        parts = []
        for number, (step, row) in enumerate(zip(self.steps, self.committed, strict=True)):
            table = step.to_dataframe()
            table.insert(0, "step", number + 1)
            table.insert(1, "committed", [candidate == row for candidate in range(len(step))])
            parts.append(table)
        return pd.concat(parts, ignore_index=True)

    def save(self, folder: str | Path) -> Path:
        """Write the tree into a folder, which it gives back."""
        for number, step in enumerate(self.steps):
            step.save(step_folder(folder, number))
        content = {"committed": list(self.committed), "ended_by": self.ended_by, "settings": dict(self.settings)}
        _files.write_json(Path(folder) / JSON_FILENAME, {"format_version": VERSION, **content})
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> "StepTree":
        """Read what :meth:`save` or a finished ``sample_steps`` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, or sampling did not come to an end.
        """
        keys = ("committed", "ended_by", "settings")
        content = _files.read_json(Path(folder) / JSON_FILENAME, VERSION, keys)
        if not content["ended_by"]:
            raise ValueError(f"The steps in {folder} are not finished; call sample_steps with the same folder.")
        steps = [ContinuationSet.load(step_folder(folder, number)) for number in range(len(content["committed"]))]
        content["committed"] = tuple(content["committed"])
        return cls(steps=tuple(steps), **{name: content[name] for name in keys})


def step_folder(folder: str | Path, number: int) -> Path:
    """Where the candidates of a step lie, counted from 0."""
    return Path(folder) / f"step_{number:03d}"
