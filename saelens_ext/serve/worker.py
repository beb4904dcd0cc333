"""One piece of work with the model at a time, the others waiting in turn, each of which can be stopped."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any, TypeVar

T = TypeVar("T")
MAX_WAITING = 8


class TooManyWaitingError(RuntimeError):
    """So much work waits that no more is taken."""


class Worker:
    """A thread of its own for the model; hooks and modes of torch belong to a model and a thread."""

    def __init__(self, max_waiting: int = MAX_WAITING):
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="live")
        self._max_waiting = max_waiting
        self._n = 0
        self._stops: dict[str, Callable[[], None]] = {}

    async def run(self, work: Callable[[], T]) -> T:
        """The result of some work, when its turn has come."""
        self._take()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        finally:
            self._n -= 1

    async def stream(self, job: str, work: Callable[[], Iterator[Any]], stopped: Any) -> AsyncIterator[Any]:
        """What an iterator yields, or the exception that it ends with; ``stopped`` last if it was stopped by its name.

        An iterator that nobody reads any more is stopped as well.
        """
        self._take()
        loop, queue, stop, end = asyncio.get_running_loop(), asyncio.Queue[Any](), Event(), object()

        def put(item: Any) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, item)

        def produce() -> None:
            try:
                if not stop.is_set():
                    for item in work():
                        if stop.is_set():
                            break
                        put(item)
            except Exception as error:
                put(error)
            finally:
                put(end)

        def stop_now() -> None:
            stop.set()
            queue.put_nowait(stopped)
            queue.put_nowait(end)

        self._stops[job] = stop_now
        future = loop.run_in_executor(self._executor, produce)
        future.add_done_callback(lambda _: self._gone())
        try:
            while (item := await queue.get()) is not end:
                yield item
        finally:
            stop.set()
            self._stops.pop(job, None)

    def stop(self, job: str) -> bool:
        """Stop what goes by a name, whether it runs or waits; whether there was any."""
        stop = self._stops.pop(job, None)
        if stop is not None:
            stop()
        return stop is not None

    @property
    def n_waiting(self) -> int:
        """How many wait besides the one that runs."""
        return max(0, self._n - 1)

    def close(self) -> None:
        """Stop everything."""
        for job in list(self._stops):
            self.stop(job)
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _take(self) -> None:
        if self.n_waiting >= self._max_waiting:
            raise TooManyWaitingError(f"{self._max_waiting} requests are waiting already; try again in a moment.")
        self._n += 1

    def _gone(self) -> None:
        self._n -= 1
