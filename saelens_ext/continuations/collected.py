"""The rows that draws of one prefix make: distinct ones, in the order drawn, each with how often it was."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from saelens_ext.host.continued_text import text_after
from saelens_ext.host.models import HostModel
from saelens_ext.ops.memory import memory_for
from saelens_ext.ops.modes import evaluating
from saelens_ext.steering.sampling import Drawn, SamplingOptions, draw_continuations

logger = logging.getLogger(__name__)


class Collected:
    """The rows that draws behind the tokens of a prefix have made so far."""

    def __init__(self, model: HostModel, ids: Tensor, n: int, deduplicate: bool):
        self._model, self._ids, self._prefix = model, ids, ids.tolist()
        self._n, self._deduplicate = n, deduplicate
        self._row_of: dict[tuple[int, ...], int] = {}
        self.rows: list[Drawn] = []
        self.texts: list[str] = []
        self.counts: list[int] = []
        self.n_draws = self.n_empty = 0

    @property
    def n_missing(self) -> int:
        return self._n - len(self.rows)

    @property
    def full(self) -> bool:
        return self.n_missing <= 0

    def draw(self, options: SamplingOptions, stops: Sequence[str], limit: int, batch_size: int, progress: bool) -> None:
        """Draw from the model until there are enough rows, or ``limit`` draws were made."""
        what = f"Passes that sample {batch_size} continuations behind {len(self._prefix)} tokens of prefix"
        remedy = f"Lower batch_size (now {batch_size}) or max_new_tokens."
        with evaluating(self._model), memory_for(what, None, remedy):
            self.fill(
                lambda numbers: draw_continuations(self._model, self._ids, numbers, options, stop=stops),
                limit,
                batch_size,
                progress,
            )

    def fill(self, draw: Callable[[range], Sequence[Drawn]], limit: int, batch_size: int, progress: bool) -> None:
        """The same with draws, by their numbers, from anywhere."""
        with tqdm(total=self._n, desc="sampling", unit="continuation", disable=not progress) as bar:
            while not self.full and self.n_draws < limit:
                self.take(draw(range(self.n_draws, min(self.n_draws + batch_size, limit))))
                bar.update(len(self.rows) - bar.n)

    def take(self, drawn: Sequence[Drawn]) -> None:
        """Take draws in order; what comes after the last row wanted is left, so that batches do not show."""
        for one in drawn:
            if self.full:
                return
            self.n_draws += 1
            key = tuple(one.token_ids)
            if self._deduplicate and key in self._row_of:
                self.counts[self._row_of[key]] += 1
                continue
            text = text_after(self._model, self._prefix, key) if one.text is None else one.text
            if not text.strip():
                self.n_empty += 1
            else:
                self._row_of[key] = len(self.rows)
                self.rows.append(one)
                self.texts.append(text)
                self.counts.append(1)

    def describe(self) -> dict[str, Any]:
        """How the draws went, said aloud when rows are missing; ValueError where there is none."""
        if not self.rows:
            raise ValueError(
                f"None of {self.n_draws} draws has visible text: the model ends at once after this prefix. "
                "Give it the beginning of a text, or set chat_template=True for a question to a chat model."
            )
        if not self.full:
            said = (
                "%d draws gave %d different continuations of the %d wanted (%d draws were empty). A higher "
                "temperature, top_p or max_new_tokens gives more of them, as do more draws (max_draws)."
            )
            logger.warning(said, self.n_draws, len(self.rows), self._n, self.n_empty)
        ends = [row.ended_by for row in self.rows]
        ended_by = {reason: ends.count(reason) for reason in sorted(set(ends))}
        return {"n_draws": self.n_draws, "n_empty": self.n_empty, "ended_by": ended_by}
