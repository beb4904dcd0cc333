"""One piece of work at a time, in turn, each of which can be stopped."""

import asyncio
from threading import Event, current_thread

import pytest

from saelens_ext.serve.worker import TooManyWaitingError, Worker


async def collect(stream):
    return [item async for item in stream]


def run(scenario):
    async def within():
        worker = Worker(max_waiting=2)
        try:
            return await asyncio.wait_for(scenario(worker), 30)
        finally:
            worker.close()

    return asyncio.run(within())


def test_work_is_done_one_after_the_other_on_one_thread():
    seen = []

    def work(name):
        for step in range(3):
            seen.append((name, current_thread().name))
            yield step

    async def scenario(worker):
        streams = [collect(worker.stream(name, lambda name=name: work(name), "stopped")) for name in "ab"]
        return await asyncio.gather(*streams, worker.run(lambda: seen.append(("c", current_thread().name))))

    assert run(scenario)[:2] == [[0, 1, 2], [0, 1, 2]]
    assert [name for name, _ in seen] == list("aaabbbc") and len({thread for _, thread in seen}) == 1


def test_the_running_one_is_stopped_and_the_next_one_runs():
    def endless():
        while True:
            yield "on"

    async def scenario(worker):
        first, second = worker.stream("a", endless, "stopped"), worker.stream("b", lambda: iter("x"), "stopped")
        assert await anext(first) == "on"
        waiting = asyncio.create_task(collect(second))
        await asyncio.sleep(0)
        assert worker.n_waiting == 1
        assert worker.stop("a") and not worker.stop("a") and not worker.stop("c")
        return (await collect(first))[-1], await waiting, worker

    last, second, worker = run(scenario)
    assert (last, second, worker.n_waiting) == ("stopped", ["x"], 0)


def test_a_waiting_one_is_stopped_without_being_run():
    go, ran = Event(), []

    def held():
        go.wait(30)
        yield 1

    async def scenario(worker):
        first = asyncio.create_task(collect(worker.stream("a", held, "stopped")))
        second = asyncio.create_task(collect(worker.stream("b", lambda: ran.append(1) or iter([2]), "stopped")))
        await asyncio.sleep(0.05)
        worker.stop("b")
        stopped = await second  # while the first still runs
        go.set()
        return await first, stopped

    assert run(scenario) == ([1], ["stopped"]) and ran == []


def test_one_that_nobody_reads_any_more_ends():
    steps = []

    def endless():
        while True:
            steps.append(1)
            yield 1

    async def scenario(worker):
        stream = worker.stream("a", endless, "stopped")
        await anext(stream)
        await stream.aclose()
        return await worker.run(lambda: "next")

    assert run(scenario) == "next"


def test_no_more_than_so_many_wait():
    go = Event()

    async def scenario(worker):
        tasks = [asyncio.create_task(worker.run(lambda: go.wait(30))) for _ in range(3)]
        await asyncio.sleep(0.05)
        with pytest.raises(TooManyWaitingError, match="2 requests are waiting already; try again in a moment"):
            await worker.run(lambda: None)
        with pytest.raises(TooManyWaitingError):
            await anext(worker.stream("a", lambda: iter([1]), "stopped"))
        go.set()
        await asyncio.gather(*tasks)
        return await worker.run(lambda: "free again")

    assert run(scenario) == "free again"


def test_an_exception_is_given_and_the_next_work_is_done():
    def failing():
        yield 1
        raise ValueError("no")

    async def scenario(worker):
        *given, error = await collect(worker.stream("a", failing, "stopped"))
        return given, str(error), await worker.run(lambda: 2)

    assert run(scenario) == ([1], "no", 2)
