"""Where a benchmark computes, and how long that takes there."""

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from saelens_ext.host.devices import chosen_device

T = TypeVar("T")


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option ``--device``."""
    parser.add_argument("--device", type=chosen_device, default="cpu", help='"auto" or a device of torch')


def timed(function: Callable[[], T], device: str) -> tuple[float, T]:
    """Seconds that a call takes until the device has finished, and what it returns."""
    synchronise(device)
    start = time.perf_counter()
    result = function()
    synchronise(device)
    return time.perf_counter() - start, result


def synchronise(device: str) -> None:
    """Wait for what the device still has to do."""
    kind = torch.device(device).type
    if kind != "cpu":
        getattr(torch, kind).synchronize()


def place(device: str) -> dict[str, object]:
    """Where figures come from, as columns of a result: the card by its name, or the threads of the CPU."""
    if device.startswith("cuda"):
        return {"device": torch.cuda.get_device_name(device)}
    return {"device": device, "threads": torch.get_num_threads()}
