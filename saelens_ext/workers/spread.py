"""Work spread over worker processes: prompts of an audit, concepts of an evaluation, each worker with a model of its
own; cells of a sweep.

What is done comes as a function without arguments that loads what is needed, such as the model, and gives back a
function of a number, of the prompt, concept or cell. It travels by cloudpickle, and a worker calls it once. Numbers are
handed out one by one, so that a slow one holds up no other. An audit leaves results in files, so that only errors come
back.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any
from uuid import uuid4

import cloudpickle
import joblib
import numpy as np
from joblib.parallel import get_active_backend
from tqdm.auto import tqdm

from saelens_ext.workers.ray_actors import RayActors
from saelens_ext.workers.threads import limited, threads_here

WORKERS = ("joblib", "ray")

Job = Callable[[int], Any]
"""Does the work for a number; gives what is to come back, if anything."""
IN_FOLDER = "What was finished is in the folder; the same call goes on from there."

# One entry: the run that this thread works for, and its job. joblib's workers are kept for the next run.
_LOADED = threading.local()


def spread(
    load: Callable[[], Job],
    numbers: Sequence[int],
    workers: str,
    n_workers: int,
    actor_options: dict[str, Any] | None,
    progress: bool,
    after_a_death: str = IN_FOLDER,
    unit: str = "prompt",
) -> dict[int, Any]:
    """Do the work for all numbers, and give what it gave by number, where that is not None.

    ``after_a_death``: what to do when a worker died, as a sentence; ``unit``: what a number stands for, for the bar.

    Raises:
        ValueError: more actors than Ray has resources for.
        RuntimeError: a worker died.
    """
    n_workers = min(n_workers, len(numbers))
    try:
        if workers == "ray":
            return _RaySpread(load, n_workers, actor_options).found(numbers, progress, unit)
        return _over_joblib(load, numbers, n_workers)
    except _Died as death:
        raise RuntimeError(
            "A worker died (out of memory, stopped from outside, or what it needs could not be loaded there). "
            f"{after_a_death} Its end was reported as: {death}"
        ) from death.__cause__


class _Died(Exception):
    """The end of a worker, in the words of what ran it."""


def _over_joblib(load: Callable[[], Job], numbers: Sequence[int], n_workers: int) -> dict[int, Any]:
    """The same by joblib's workers: processes here, or those of a cluster that a backend names."""
    run, threads = uuid4().hex, threads_here()
    options: dict[str, Any] = {"batch_size": 1, "pre_dispatch": "n_jobs"}  # one by one
    parallel = joblib.Parallel(n_jobs=n_workers, **options)
    packed: Any = load
    backend: Any = get_active_backend()[0]
    if not getattr(backend, "supports_sharedmem", False):
        # joblib puts a large array where all workers read it, and would pickle a function again with every number.
        packed = np.frombuffer(cloudpickle.dumps(load), dtype=np.uint8)
    try:
        found: Any = parallel(joblib.delayed(_in_worker)(run, packed, threads, number) for number in numbers)
    except BrokenProcessPool as error:
        raise _Died(error) from error
    return {number: one for number, one in zip(numbers, found, strict=True) if one is not None}


def _in_worker(run: str, packed: Any, threads: dict[str, int], number: int) -> Any:
    if getattr(_LOADED, "run", None) != run:
        _LOADED.job = None  # before another model is loaded
        load = cloudpickle.loads(packed.data) if isinstance(packed, np.ndarray) else packed
        _LOADED.job, _LOADED.run = load(), run
    with limited(threads):
        return _LOADED.job(number)


class _RaySpread(RayActors):
    """The same over Ray actors."""

    def __init__(self, load: Callable[[], Job], n_workers: int, actor_options: dict[str, Any] | None) -> None:
        super().__init__(n_workers, actor_options)
        self._load = load

    def _actor(self) -> tuple[type, tuple[Any, ...]]:
        return _Actor, (self._load, threads_here())

    def found(self, numbers: Sequence[int], progress: bool, unit: str) -> dict[int, Any]:
        """What came back by number; the actors are stopped afterwards."""
        waiting, running, found = list(reversed(numbers)), {}, {}
        try:
            free = list(self._started())
            with tqdm(total=len(numbers), disable=not progress, desc=unit, unit=unit) as bar:
                while waiting or running:
                    while free and waiting:
                        actor, number = free.pop(), waiting.pop()
                        running[actor.work.remote(number)] = actor, number
                    done, _ = self._ray.wait(list(running))
                    for reference in done:
                        actor, number = running.pop(reference)
                        result = self._ray.get(reference)
                        found |= {number: result} if result is not None else {}
                        free.append(actor)
                        bar.update()
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self._ray.exceptions.RayActorError as error:
            raise _Died(error) from error
        finally:
            self.close()
        return found


class _Actor:
    def __init__(self, load: Callable[[], Job], threads: dict[str, int]) -> None:
        self._load, self._threads, self._job = load, threads, None

    def work(self, number: int) -> Any:
        """Do the work for a number."""
        if self._job is None:  # what fails here is raised as it is, not as the actor's death
            self._job = self._load()
        with limited(self._threads):
            return self._job(number)
