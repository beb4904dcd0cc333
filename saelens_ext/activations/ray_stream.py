"""Forward passes spread over Ray actors, with the batches coming back in order.

The dataset is tokenised once, where the fit runs; each actor holds a copy of the model and turns windows of tokens into
activations, or into what is made of them (:meth:`RayActivationStream.mapped`). Batches are cut, numbered and handed on
as in a single process, so a fit cannot tell the difference: on the same kind of device and with the same number of
threads, exemplars are the same to the bit.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from typing_extensions import Unpack

from saelens_ext import _checks
from saelens_ext.activations.settings import StreamOptions
from saelens_ext.activations.stream import (
    ActivationBatch,
    ActivationStream,
    numbered_chunks,
    up_to,
    warn_of_dropout,
)
from saelens_ext.activations.windows import Window
from saelens_ext.host.models import HostModel
from saelens_ext.host.weights_fingerprint import identify_model
from saelens_ext.ops.groups import groups
from saelens_ext.ops.modes import standard_modes
from saelens_ext.workers.ray_actors import RayActors
from saelens_ext.workers.threads import limited, threads_here

logger = logging.getLogger(__name__)

T = TypeVar("T")
Chunk = tuple[int, list[Window]]
"""The windows of a batch, after the number of the first."""


class _Task(NamedTuple):
    """What an actor is asked for."""

    chunks: list[Chunk]
    """Batches."""
    limit: float | int
    """How many of their activations, at most."""
    n: int = 0
    """How many activations of the pass it adds to those of earlier tasks."""
    where: tuple[int, ...] = ()
    """What the work is told beside the batches."""


# Tasks per actor that are under way or wait for their turn: enough that none is idle, and bounded memory.
_AHEAD = 2


class RayActivationStream(RayActors, ActivationStream):
    """An :class:`ActivationStream` whose forward passes run on Ray actors.

    Args:
        load_model: a function without arguments that loads the model, in every actor and in this process, where it
            runs in no pass: it has the tokenizer, the names of hooks, and what :meth:`describe` says. The function
            travels by cloudpickle. Hooks and SAEs that are to be in force in the actors must be attached by it.
        dataset: as for :class:`ActivationStream`, as are the options.
        hook_name: the hook to read, or several.
        n_workers: actors, at least 1.
        actor_options: Ray's resources of an actor, such as ``{"num_gpus": 1}``; one CPU by default.
        restarts: how often in a pass actors that died are replaced, and the batches that they owe computed again. The
            pass then goes on where it was, with the same batches.
        **options: of :class:`ActivationStream`.

    Unless ``ray.init`` was called before, the cluster is joined that Ray finds by itself (``RAY_ADDRESS``, or the last
    that was started on this machine), or a Ray is started on this machine. Actors are started at the first batch and
    kept until :meth:`close`, or the end of a ``with`` block; the last stream that is closed leaves it or shuts it down.

    Raises:
        ImportError: Ray is not installed.
        ValueError: as :class:`ActivationStream`; a model in place of a function that loads it; at the first batch, more
            actors than Ray has resources for, or another model in an actor than here.
        RuntimeError: while reading, an actor died, and ``restarts`` had been used up.

    Warns:
        UserWarning: actors wait for what others of the cluster hold, such as another stream that is not closed.
    """

    @_checks.names_options(ActivationStream)
    def __init__(
        self,
        load_model: Callable[[], HostModel],
        dataset: Any,
        hook_name: str | list[str],
        *,
        n_workers: int = 2,
        actor_options: dict[str, Any] | None = None,
        restarts: int = 0,
        **options: Unpack[StreamOptions],
    ):
        RayActors.__init__(self, n_workers, actor_options)
        if not callable(load_model) or isinstance(load_model, torch.nn.Module):
            raise ValueError(
                "load_model must be a function without arguments that loads the model in every actor, such as lambda: "
                f"saelens_ext.load_model(name), got a {type(load_model).__name__}."
            )
        ActivationStream.__init__(self, load_model(), dataset, hook_name, **options)
        if restarts < 0:
            raise ValueError(f"restarts must be at least 0, got {restarts!r}.")
        self._load_model, self._options, self._restarts = load_model, options, restarts

    def __enter__(self) -> "RayActivationStream":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def mapped(self, work: Callable[[Iterator[ActivationBatch]], T], n_batches: int = 1) -> Iterator[T]:
        """As :meth:`ActivationStream.mapped`, the work being done in the actors.

        Args:
            work: likewise; it travels once a pass, and an actor holds the last one.
            n_batches: likewise; an actor holds one batch at a time.

        Raises:
            ValueError, RuntimeError: as reading batches does, and what the work raises.
        """
        return self._mapped(self._groups(n_batches), work)

    def mapped_stretches(self, work: Callable[..., T], rows: int, margin: int) -> Iterator[T]:
        """What some work gives for so many consecutive activations of a pass at a time, in order, done in the actors.

        Unlike those of :meth:`mapped`, the stretches are the same whatever the batches, and the work also sees what is
        around them, for which batches at their ends are computed twice.

        Args:
            work: a function of an iterator of batches, all of which it must read, and three numbers: of the first
                activation of these batches, of the first of the stretch, and of the first behind it. They count the
                activations of the whole pass from 0. It travels once a pass, and an actor holds the last one.
            rows: activations in a stretch, at least 1; fewer in the last.
            margin: how many activations on either side the batches hold as well, as far as there are so many.

        Raises:
            ValueError, RuntimeError: no activation in a stretch; as reading batches does, and what the work raises.
        """
        return self._mapped(self._stretches(_checks.positive(rows, "rows"), margin), work)

    def _mapped(self, tasks: Iterable[_Task], work: Callable[..., T]) -> Iterator[T]:
        warn_of_dropout(self.model)
        with self._bar() as bar:
            for found, n in self._in_turn(tasks, work):
                bar.update(n)
                yield found
        self._check_read()

    def _batches(self, chunks: Iterator[Chunk]) -> Iterator[ActivationBatch]:
        for found, _ in self._in_turn((_Task([chunk], math.inf) for chunk in chunks), list):
            yield from found

    def _groups(self, n_batches: int) -> Iterator[_Task]:
        """So many batches at a time."""
        for group in groups(self._sized(), n_batches):
            chunks, sizes = zip(*group, strict=True)
            yield _Task(list(chunks), sum(sizes), sum(sizes))

    def _stretches(self, rows: int, margin: int) -> Iterator[_Task]:
        """The batches that hold so many activations at a time, and what is around them."""
        held: deque[tuple[int, Chunk, int]] = deque()  # the number of the first activation, the windows, and how many
        start = n_seen = 0

        def stretch() -> _Task:
            while held[0][0] + held[0][2] <= start - margin:
                held.popleft()
            chunks, where = [chunk for _, chunk, _ in held], (held[0][0], start, start + rows)
            return _Task(chunks, sum(n for _, _, n in held), min(rows, n_seen - start), where)

        for chunk, n in self._sized():
            held.append((n_seen, chunk, n))
            n_seen += n
            while n_seen >= start + rows + margin:
                yield stretch()
                start += rows
        while start < n_seen:
            yield stretch()
            start += rows

    def _sized(self) -> Iterator[tuple[Chunk, int]]:
        """The windows of every batch that is not empty, and how many activations of it to read."""
        left = math.inf if self.max_tokens is None else self.max_tokens
        for chunk in numbered_chunks(self._windows, self.batch_size, 0):
            n = int(min(left, int(self._to_read(chunk[1])[2].sum())))
            if n:
                yield chunk, n
            left -= n
            if left == 0:
                return

    def _in_turn(self, tasks: Iterable[_Task], work: Callable[..., T]) -> Iterator[tuple[T, int]]:
        """What the work gives for each task, and how many activations of the pass it adds."""
        owed = _Owed(self, work)
        for task in tasks:
            if len(owed) == _AHEAD * self.n_workers:
                yield owed.first()
            owed.ask(task)
        while len(owed):
            yield owed.first()

    def _actor(self) -> tuple[type, tuple[Any, ...]]:
        about = identify_model(self.model)
        return _Worker, (self._load_model, self.requested_hook_names, self._options, threads_here(), about)


class _Owed:
    """What the actors of a stream owe in a pass, with what each answer is computed from, kept until it is here."""

    def __init__(self, stream: RayActivationStream, work: Callable[..., Any]):
        self._stream, self._work, self._restarts_left = stream, work, stream._restarts
        self._waiting: deque[tuple[Any, _Task]] = deque()
        self._turn, self._shipped = 0, self._shipped_anew()

    def __len__(self) -> int:
        return len(self._waiting)

    def _shipped_anew(self) -> list[Any]:
        """Where the work lies, to be fetched once by each actor: in a list, or Ray would fetch it for every task."""
        self._stream._started()
        return [self._stream._ray.put(self._work)]

    def ask(self, task: _Task) -> None:
        """Ask the next actor."""
        actors = self._stream._started()
        self._waiting.append((actors[self._turn % len(actors)].do.remote(task, self._shipped), task))
        self._turn += 1

    def first(self) -> tuple[Any, int]:
        """The answer that is waited for longest, and how many activations of the pass it adds."""
        stream = self._stream
        while True:
            reference, task = self._waiting[0]
            try:
                with standard_modes():
                    found, widths = stream._ray.get(reference)
            except stream._ray.exceptions.RayTaskError as error:
                # What the stream itself would have raised, rather than Ray's account of it.
                raise error.cause from error
            except stream._ray.exceptions.RayActorError as error:
                stream.close()
                if not self._restarts_left:
                    raise RuntimeError(
                        "A Ray actor died (out of memory, or stopped from outside), and the pass with it. The next "
                        f"pass starts new ones; with restarts=… a pass goes on with new ones. Ray says: {error}"
                    ) from error
                logger.warning("A Ray actor died, and new ones go on where it was. Ray says: %s", error)
                self._restarts_left -= 1
                # A Ray of one's own was shut down, with what it held.
                self._shipped, owed = self._shipped_anew(), list(self._waiting)
                self._waiting.clear()
                for _, again in owed:
                    self.ask(again)
            else:
                self._waiting.popleft()
                stream._d_in.update(widths)
                return found, task.n


class _Worker:
    """An actor: a model, and a stream that is asked for some batches at a time."""

    def __init__(
        self,
        load_model: Callable[[], HostModel],
        hook_names: tuple[str, ...],
        options: StreamOptions,
        threads: dict[str, int],
        about: dict[str, Any],
    ):
        self._load_model, self._hook_names, self._options = load_model, hook_names, options
        self._threads, self._about = threads, about
        self._shipped: Any = None
        self._work: Callable[..., Any] = list

    def do(self, task: _Task, shipped: list[Any]) -> tuple[Any, dict[str, int]]:
        """What the work that lies at ``shipped`` gives for a task, and the widths of the activations."""
        import ray

        if self._shipped != shipped[0]:
            self._shipped, self._work = shipped[0], ray.get(shipped[0])
        stream = self._stream  # what fails here is raised as it is, not as the actor's death
        with limited(self._threads):
            batches = up_to(task.limit, stream._batches(iter(task.chunks)))
            return self._work(batches, *task.where), stream._d_in

    @cached_property
    def _stream(self) -> ActivationStream:
        """The stream; ValueError where its model is not that of the caller."""
        # The windows come with each task; a stream wants a dataset all the same.
        options: StreamOptions = {**self._options, "progress": False}
        stream = ActivationStream(self._load_model(), [{"input_ids": [0]}], list(self._hook_names), **options)
        own = identify_model(stream.model)
        other = [f"{name} {own[name]!r} for {one!r}" for name, one in self._about.items() if own[name] != one]
        if other:
            raise ValueError(
                f"load_model gives another model in a Ray actor ({', '.join(other)}); it must give the same one "
                "wherever it is called."
            )
        return stream
