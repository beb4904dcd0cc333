"""The largest of some values, where some are tied."""

import torch

from saelens_ext.ops.largest_entries import largest_entries


def test_ties_go_to_the_lowest_index():
    assert sorted(largest_entries(torch.tensor([1.0, -2.0, 2.0, 1.0, -1.0]), 3).tolist()) == [0, 1, 2]
    assert sorted(largest_entries(torch.ones(100), 7).tolist()) == list(range(7))


def test_values_that_may_be_equal_are_tied():
    error = torch.full((5,), 0.01)
    values = torch.tensor([1.005, -2.0, 1.015, -1.0, 1.04])
    # The third largest is 1.015: 1.04 is above it for sure, 1.005 and 1.0 may be equal to it.
    assert sorted(largest_entries(values, 3, error).tolist()) == [0, 1, 4]
    assert sorted(largest_entries(values, 3).tolist()) == [1, 2, 4]
    preferred = torch.tensor([False, False, True, True, False])
    assert sorted(largest_entries(values, 3, error, preferred).tolist()) == [1, 2, 4]
    assert sorted(largest_entries(values, 2, error, preferred).tolist()) == [1, 4]
    # Off by 0.02 in the first alone, it reaches the cut from below.
    assert sorted(largest_entries(values, 3, torch.tensor([0.02, 0, 0, 0, 0])).tolist()) == [0, 1, 4]
