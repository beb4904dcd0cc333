"""Ray actors that are started when they are needed and stopped when they are not, and a Ray of one's own if there is
none.
"""

import time
import warnings
from typing import Any, ClassVar

from saelens_ext import _checks

_PATIENCE = 5.0
"""Seconds until it is said that actors wait; Ray takes a moment to count as free what was let go of."""


class RayActors:
    """Actors of one class, and the Ray that they run on.

    Unless ``ray.init`` was called before, the cluster is joined that Ray finds by itself (``RAY_ADDRESS``, or the last
    that was started on this machine), or a Ray is started on this machine; the last of these objects that is closed
    leaves it or shuts it down.
    """

    # The node of the Ray that one of them started, and those whose actors run on it.
    _own_node: ClassVar[str | None] = None
    _open: ClassVar[set[int]] = set()

    def __init__(self, n_workers: int, actor_options: dict[str, Any] | None) -> None:
        self._ray = _ray()
        self.n_workers = _checks.positive(n_workers, "n_workers")
        self._actor_options: dict[str, Any] = {"num_cpus": 1} if actor_options is None else actor_options
        self._actors: list[Any] = []

    def close(self) -> None:
        """Stop the actors, and Ray if no one else needs it; the next use starts new ones."""
        actors, self._actors = self._actors, []
        RayActors._open.discard(id(self))
        # Asking a Ray that was shut down for anything would start another.
        if not self._ray.is_initialized():
            return
        for actor in actors:
            self._ray.kill(actor)
        if not RayActors._open and RayActors._own_node == self._node():
            RayActors._own_node = None
            self._ray.shutdown()

    def _actor(self) -> tuple[type, tuple[Any, ...]]:
        """The class of the actors, and what it is made with."""
        raise NotImplementedError

    def _started(self) -> list[Any]:
        if not self._ray.is_initialized():
            self._ray.init(log_to_driver=False, include_dashboard=False)
            RayActors._own_node, self._actors = self._node(), []
        if not self._actors:
            RayActors._open.add(id(self))
            self._check_resources()
            self._warn_of_waiting()
            kind, arguments = self._actor()
            actor = self._ray.remote(**self._actor_options)(kind)
            self._actors = [actor.remote(*arguments) for _ in range(self.n_workers)]
        return self._actors

    def _check_resources(self) -> None:
        """Raise where Ray would wait for ever for resources that it has not."""
        found = self._ray.cluster_resources()
        if lacking := self._lacking(found):
            self.close()
            raise ValueError(
                f"{self._needs(lacking)}, and Ray has {found.get(lacking, 0):g}: lower n_workers or what actor_options "
                "ask for, or call ray.init(...) with more before."
            )

    def _warn_of_waiting(self) -> None:
        """Warn where others have what these actors need, which Ray would wait for without a word."""
        until = time.monotonic() + _PATIENCE
        while lacking := self._lacking(free := self._ray.available_resources()):
            if time.monotonic() > until:
                warnings.warn(
                    f"{self._needs(lacking)}, and Ray has {free.get(lacking, 0):g} free. They wait until others are "
                    "done: close() other streams that are spread over Ray, or use them in a with statement.",
                    UserWarning,
                    stacklevel=3,
                )
                return
            time.sleep(0.1)

    def _lacking(self, there: dict[str, Any]) -> str | None:
        """A resource of which there is less than all actors need."""
        return next((name for name, each in self._each().items() if each * self.n_workers > there.get(name, 0)), None)

    def _each(self) -> dict[str, int | float]:
        """What an actor needs of each resource."""
        options = self._actor_options
        asked_for = {"CPU": options.get("num_cpus"), "GPU": options.get("num_gpus"), **(options.get("resources") or {})}
        return {name: each for name, each in asked_for.items() if each}

    def _needs(self, name: str) -> str:
        each = self._each()[name]
        needed = each * self.n_workers
        return f"n_workers={self.n_workers} actors need {needed:g} {name} ({each:g} each, by actor_options)"

    def _node(self) -> str:
        return self._ray.get_runtime_context().get_node_id()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError("Spreading work over actors needs Ray: pip install 'saelens-ext[ray]'") from error
    return ray
