"""A uniform sample of a stream: the rows with the smallest keys, however it is cut and wherever its parts lie."""

import pytest
import torch

from saelens_ext.ops.groups import groups
from saelens_ext.ops.uniform_sample import BATCHES, row_keys, uniform_sample


def drawn(batches, size, seed=0):
    return uniform_sample(batches, size, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cut", [1, 7, 1000])
def test_it_is_the_rows_with_the_smallest_keys_in_order_of_the_stream(cut):
    x = torch.arange(500.0)[:, None] * torch.tensor([1.0, -1.0])
    found = drawn(x.split(cut), 40)
    seed = int(torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(0)))
    keys = row_keys(torch.arange(500), seed)
    expected = sorted(sorted(range(500), key=lambda row: keys[row])[:40])
    assert torch.equal(found.rows, x[expected]) and torch.equal(found.keys, keys[expected])
    assert (found.n, found.n_batches) == (500, len(x.split(cut)))
    assert torch.equal(drawn(x.split(cut), 900).rows, x)
    assert not torch.equal(drawn(x.split(cut), 40, seed=1).rows, found.rows)


def test_every_row_is_as_likely_as_every_other():
    x = torch.arange(30.0)[:, None]
    counts = torch.zeros(30)
    for seed in range(1000):
        counts[drawn(x.split(4), 6, seed).rows[:, 0].long()] += 1
    # Each of Binomial(1000, 0.2): 12.6 is one standard deviation.
    assert counts.sum() == 1000 * 6 and (counts - 200).abs().max() < 4.5 * 12.7


def test_keys_are_uniform_and_say_nothing_of_neighbours():
    keys = row_keys(torch.arange(20_000) * 2**24, 3)
    assert float(keys.min()) >= 0 and float(keys.max()) < 1 and len(keys.unique()) == 20_000
    assert float((torch.histc(keys, 20, 0, 1) - 1000).abs().max()) < 5 * 31
    assert abs(float(torch.corrcoef(torch.stack([keys[1:], keys[:-1]]))[0, 1])) < 0.03


def test_only_rows_that_may_stay_come_back():
    came_back = []

    class There:
        """Blocks of a row each."""

        def mapped_with_numbers(self, work, size=1):
            assert size == BATCHES
            blocks = [(torch.tensor([[float(n)]]), torch.tensor([n])) for n in range(100)]
            for group in groups(blocks, size):
                found = work(group)
                came_back.append(len(found.rows))
                yield found

        def __iter__(self):
            raise AssertionError("nothing is brought here")

    found = drawn(There(), 5)
    assert came_back == [5, 5, 5, 4]
    assert torch.equal(found.rows, drawn(torch.arange(100.0)[:, None].split(9), 5).rows)
