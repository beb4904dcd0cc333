"""Forward passes spread over Ray actors, with the batches coming back in order.

The dataset is tokenised once, where the fit runs; each actor holds a copy of the model and turns windows of tokens into
activations. Batches are cut, numbered and handed on as in a single process, so a fit cannot tell the difference: on the
same kind of device and with the same number of threads, exemplars are the same to the bit.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from typing_extensions import Unpack

from saelens_ext import _checks
from saelens_ext._modes import standard_modes
from saelens_ext.activations.settings import StreamOptions
from saelens_ext.activations.stream import ActivationBatch, ActivationStream
from saelens_ext.activations.windows import Window
from saelens_ext.host.models import HostModel

# Batches per actor that are under way or wait for their turn: enough that none is idle, and bounded memory.
_AHEAD = 2


class RayActivationStream(ActivationStream):
    """An :class:`ActivationStream` whose forward passes run on Ray actors.

    Args:
        load_model: a function without arguments that loads the model, in this process and in every actor; it travels by
            cloudpickle. Hooks and SAEs that are to be in force in the actors must be attached by it.
        dataset: as for :class:`ActivationStream`, as are the options.
        hook_name: the hook to read, or several.
        n_workers: actors, at least 1.
        actor_options: Ray's resources of an actor, such as ``{"num_gpus": 1}``; one CPU by default.
        **options: of :class:`ActivationStream`.

    Ray is started on this machine unless ``ray.init`` was called before, on a cluster for example. Actors are started
    at the first batch and kept until :meth:`close`, or the end of a ``with`` block; the last stream that is closed
    shuts down a Ray that one of them started.

    Raises:
        ImportError: Ray is not installed.
        ValueError: as :class:`ActivationStream`; at the first batch, more actors than Ray has resources for.
        RuntimeError: while reading, an actor died.
    """

    # The node of the Ray that a stream started, and the streams whose actors run on it.
    _own_node: ClassVar[str | None] = None
    _open: ClassVar[set[int]] = set()

    @_checks.names_options(ActivationStream)
    def __init__(
        self,
        load_model: Callable[[], HostModel],
        dataset: Any,
        hook_name: str | list[str],
        *,
        n_workers: int = 2,
        actor_options: dict[str, Any] | None = None,
        **options: Unpack[StreamOptions],
    ):
        self._ray = _ray()
        self.n_workers = _checks.positive(n_workers, "n_workers")
        super().__init__(load_model(), dataset, hook_name, **options)
        self._load_model = load_model
        self._options = options
        self._actor_options: dict[str, Any] = {"num_cpus": 1} if actor_options is None else actor_options
        self._actors: list[Any] = []

    def __enter__(self) -> "RayActivationStream":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the actors, and Ray if no one else needs it; the next pass starts new ones."""
        actors, self._actors = self._actors, []
        RayActivationStream._open.discard(id(self))
        # Asking a Ray that was shut down for anything would start another.
        if not self._ray.is_initialized():
            return
        for actor in actors:
            self._ray.kill(actor)
        if not RayActivationStream._open and RayActivationStream._own_node == self._node():
            RayActivationStream._own_node = None
            self._ray.shutdown()

    def _batches(self, chunks: Iterator[tuple[int, list[Window]]]) -> Iterator[ActivationBatch]:
        actors = self._started()
        waiting: deque[Any] = deque()
        for turn, (first, windows) in enumerate(chunks):
            if len(waiting) == _AHEAD * len(actors):
                yield self._received(waiting.popleft())
            waiting.append(actors[turn % len(actors)].batch.remote(windows, first))
        while waiting:
            yield self._received(waiting.popleft())

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
                f"starts new ones. Ray says: {error}"
            ) from error
        self._d_in.update({name: rows.shape[1] for name, rows in batch.activations.items()})
        return batch

    def _started(self) -> list[Any]:
        if not self._ray.is_initialized():
            self._ray.init(log_to_driver=False, include_dashboard=False)
            RayActivationStream._own_node, self._actors = self._node(), []
        if not self._actors:
            RayActivationStream._open.add(id(self))
            self._check_resources()
            actor = self._ray.remote(**self._actor_options)(_Worker)
            arguments = (self._load_model, self.requested_hook_names, self._options, torch.get_num_threads())
            self._actors = [actor.remote(*arguments) for _ in range(self.n_workers)]
        return self._actors

    def _check_resources(self) -> None:
        """Raise where Ray would wait for ever for resources that it has not."""
        options = self._actor_options
        asked_for = {"CPU": options.get("num_cpus"), "GPU": options.get("num_gpus"), **(options.get("resources") or {})}
        available = self._ray.cluster_resources()
        for name, each in asked_for.items():
            needed, found = (each or 0) * self.n_workers, available.get(name, 0)
            if needed > found:
                self.close()
                raise ValueError(
                    f"n_workers={self.n_workers} actors need {needed:g} {name} ({each:g} each, by actor_options), and "
                    f"Ray has {found:g}: lower n_workers or what actor_options ask for, or call ray.init(...) with "
                    "more before."
                )

    def _node(self) -> str:
        return self._ray.get_runtime_context().get_node_id()


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


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError("Spreading forward passes needs Ray: pip install 'saelens-ext[ray]'") from error
    return ray
