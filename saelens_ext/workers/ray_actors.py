"""Ray actors that are started when they are needed and stopped when they are not, and a Ray of one's own if there is
none.
"""

from typing import Any, ClassVar

from saelens_ext import _checks


class RayActors:
    """Actors of one class, and the Ray that they run on.

    Ray is started on this machine unless ``ray.init`` was called before, on a cluster for example; the last of these
    objects that is closed shuts down a Ray that one of them started.
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
            kind, arguments = self._actor()
            actor = self._ray.remote(**self._actor_options)(kind)
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


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError("Spreading work over actors needs Ray: pip install 'saelens-ext[ray]'") from error
    return ray
