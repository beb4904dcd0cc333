"""Forward passes spread over Ray actors, with the batches coming back in order.

The dataset is tokenised once, where the fit runs; each actor holds a copy of the model and turns windows of tokens into
activations. Batches are cut, numbered and handed on as in a single process, so a fit cannot tell the difference: on the
same kind of device and with the same number of threads, exemplars are the same to the bit.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from typing_extensions import Unpack

from saelens_ext import _checks
from saelens_ext._modes import standard_modes
from saelens_ext.activations.ray_actors import RayActors
from saelens_ext.activations.settings import StreamOptions
from saelens_ext.activations.stream import ActivationBatch, ActivationStream
from saelens_ext.activations.windows import Window
from saelens_ext.host.models import HostModel

logger = logging.getLogger(__name__)

# Batches per actor that are under way or wait for their turn: enough that none is idle, and bounded memory.
_AHEAD = 2


class RayActivationStream(RayActors, ActivationStream):
    """An :class:`ActivationStream` whose forward passes run on Ray actors.

    Args:
        load_model: a function without arguments that loads the model, in this process and in every actor; it travels by
            cloudpickle. Hooks and SAEs that are to be in force in the actors must be attached by it.
        dataset: as for :class:`ActivationStream`, as are the options.
        hook_name: the hook to read, or several.
        n_workers: actors, at least 1.
        actor_options: Ray's resources of an actor, such as ``{"num_gpus": 1}``; one CPU by default.
        restarts: how often in a pass actors that died are replaced, and the batches that they owe computed again. The
            pass then goes on where it was, with the same batches.
        **options: of :class:`ActivationStream`.

    Ray is started on this machine unless ``ray.init`` was called before, on a cluster for example. Actors are started
    at the first batch and kept until :meth:`close`, or the end of a ``with`` block; the last stream that is closed
    shuts down a Ray that one of them started.

    Raises:
        ImportError: Ray is not installed.
        ValueError: as :class:`ActivationStream`; at the first batch, more actors than Ray has resources for.
        RuntimeError: while reading, an actor died, and ``restarts`` had been used up.
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
        ActivationStream.__init__(self, load_model(), dataset, hook_name, **options)
        if restarts < 0:
            raise ValueError(f"restarts must be at least 0, got {restarts!r}.")
        self._load_model, self._options, self._restarts = load_model, options, restarts

    def __enter__(self) -> "RayActivationStream":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _batches(self, chunks: Iterator[tuple[int, list[Window]]]) -> Iterator[ActivationBatch]:
        self._started()
        # What each batch is computed from is kept until it is here.
        waiting: deque[tuple[Any, int, list[Window]]] = deque()
        left = self._restarts
        for turn, (first, windows) in enumerate(chunks):
            if len(waiting) == _AHEAD * self.n_workers:
                left -= self._revived(waiting, left)
                yield self._received(waiting.popleft()[0])
            waiting.append(self._asked(turn, first, windows))
        while waiting:
            left -= self._revived(waiting, left)
            yield self._received(waiting.popleft()[0])

    def _asked(self, turn: int, first: int, windows: list[Window]) -> tuple[Any, int, list[Window]]:
        actors = self._started()
        return actors[turn % len(actors)].batch.remote(windows, first), first, windows

    def _revived(self, waiting: deque[tuple[Any, int, list[Window]]], left: int) -> int:
        """Wait for the first batch; where its actor died, start new ones and ask for all again. How often that was."""
        for used in range(left):
            try:
                self._ray.get(waiting[0][0])
            except self._ray.exceptions.RayActorError as error:
                logger.warning("A Ray actor died, and new ones go on where it was. Ray says: %s", error)
                self.close()
                owed = [self._asked(turn, first, windows) for turn, (_, first, windows) in enumerate(waiting)]
                waiting.clear()
                waiting.extend(owed)
            except self._ray.exceptions.RayTaskError:
                return used  # which `_received` raises
            else:
                return used
        return left

    @standard_modes()
    def _received(self, reference: Any) -> ActivationBatch:
        try:
            batch = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            # What the stream itself would have raised, rather than Ray's account of it.
            raise error.cause from error
        except self._ray.exceptions.RayActorError as error:
            self.close()
            raise RuntimeError(
                "A Ray actor died (out of memory, or load_model failed there), and the pass with it. The next pass "
                f"starts new ones; with restarts=… a pass goes on with new ones. Ray says: {error}"
            ) from error
        self._d_in.update({name: rows.shape[1] for name, rows in batch.activations.items()})
        return batch

    def _actor(self) -> tuple[type, tuple[Any, ...]]:
        return _Worker, (self._load_model, self.requested_hook_names, self._options, torch.get_num_threads())


class _Worker:
    """An actor: a model, and a stream that is asked for single batches."""

    def __init__(
        self, load_model: Callable[[], HostModel], hook_names: tuple[str, ...], options: StreamOptions, n_threads: int
    ):
        # Sums are cut by thread, and would differ in their last bits.
        torch.set_num_threads(n_threads)
        # The windows come with each batch; a stream wants a dataset all the same.
        options["progress"] = False
        self._stream = ActivationStream(load_model(), [{"input_ids": [0]}], list(hook_names), **options)

    def batch(self, windows: list[Window], first: int) -> ActivationBatch:
        """Activations of some windows."""
        return self._stream._batch(windows, first)
