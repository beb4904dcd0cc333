"""As many threads elsewhere as here: sums are cut by thread, and would differ in their last bits."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_info, threadpool_limits


def threads_here() -> dict[str, int]:
    """Threads of torch and of the numeric libraries in this process."""
    return {"torch": torch.get_num_threads()} | {one["user_api"]: one["num_threads"] for one in threadpool_info()}


@contextmanager
def limited(threads: dict[str, int]) -> Iterator[None]:
    """As many threads as where :func:`threads_here` was asked."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads["torch"])
    try:
        with threadpool_limits({api: n for api, n in threads.items() if api != "torch"}):
            yield
    finally:
        torch.set_num_threads(before)
