"""Work handed to several processes: done once for each number, with what it needs sent once."""

import os

import joblib
import pytest
import torch

from saelens_ext.workers.spread import spread


class Heavy:
    """What is needed, which counts how often it is packed; it is larger than what joblib sends with a task."""

    def __init__(self):
        self.packed, self.weights = 0, torch.arange(500_000.0)

    def __reduce__(self):
        self.packed += 1
        return _unpacked, (self.weights,)


def _unpacked(weights):
    made = Heavy()
    made.weights = weights
    return made


def job(heavy):
    return lambda number: (number, float(heavy.weights[number]), os.getpid())


@pytest.mark.slow
def test_what_workers_need_is_packed_once():
    heavy = Heavy()
    found = spread(lambda: job(heavy), range(5), "joblib", 2, None, False)
    assert heavy.packed == 1
    assert {number: one[:2] for number, one in found.items()} == {n: (n, float(n)) for n in range(5)}
    assert os.getpid() not in {one[2] for one in found.values()}


def test_in_one_process_nothing_is_packed():
    heavy = Heavy()
    with joblib.parallel_config(backend="sequential"):
        found = spread(lambda: job(heavy), range(3), "joblib", 2, None, False)
    assert heavy.packed == 0
    assert [one[2] for one in found.values()] == [os.getpid()] * 3
