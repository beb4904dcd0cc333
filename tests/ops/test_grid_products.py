"""Exact cosines and the search for the nearest, against integers and brute force."""

import numpy as np
import pytest
import torch

from saelens_ext.ops.grid_products import (
    best_cosine,
    distance,
    exact_cosine,
    nearest_column,
    new_tile,
    no_candidates,
    product_error,
    scan,
)
from saelens_ext.ops.spherical import unit_directions
from tests.ops import oracles


def units(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return unit_directions(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), torch.zeros(d))[0]


@pytest.mark.parametrize("d", [1, 2, 7, 576, 5000])
def test_exact_cosine_is_the_integers_quotient(d: int) -> None:
    u = units(12, d)
    i, j = torch.randint(12, (2, 30), generator=torch.Generator().manual_seed(1))
    expected = [oracles.exact_cosine(u[a].numpy(), u[b].numpy()) for a, b in zip(i.tolist(), j.tolist())]
    assert exact_cosine(u, i, u, j).tolist() == expected
    float64 = torch.nn.functional.cosine_similarity(u[i].double(), u[j].double())
    torch.testing.assert_close(exact_cosine(u, i, u, j), float64, atol=1e-9, rtol=0)


def test_exact_cosine_does_not_depend_on_its_company_and_is_one_of_a_row_with_itself() -> None:
    u = units(3000, 300)
    i, j = torch.arange(3000), torch.arange(3000).flip(0)
    together = exact_cosine(u, i, u, j)
    apart = torch.cat([exact_cosine(u, i[part : part + 1], u, j[part : part + 1]) for part in (0, 1, 1747, 2999)])
    assert torch.equal(apart, together[[0, 1, 1747, 2999]])
    assert torch.equal(together, exact_cosine(u, j, u, i))
    assert bool((exact_cosine(u, i, u, i) == 1).all())
    assert distance(exact_cosine(u, i, -u, i)).tolist() == [2.0] * 3000


@pytest.mark.parametrize("d", [3, 64, 2048])
def test_product_error_bounds_what_it_should(d: int) -> None:
    u = units(200, d)
    i, j = (part.reshape(-1) for part in torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij"))
    worst = ((u @ u.T).double().reshape(-1) - exact_cosine(u, i, u, j)).abs().max()
    assert float(worst) < product_error(d) < 1e-3


def test_product_error_allows_for_reduced_precision() -> None:
    before = torch.get_float32_matmul_precision()
    exact = product_error(100)
    try:
        for precision, least in (("high", 2**-10), ("medium", 2**-8)):
            torch.set_float32_matmul_precision(precision)
            assert product_error(100) > exact + least
    finally:
        torch.set_float32_matmul_precision(before)
    assert product_error(100) == exact


@pytest.mark.parametrize("k", [1, 2, 511, 512, 513, 1700])
def test_scan_in_any_pieces_finds_the_nearest(k: int) -> None:
    u, exemplars = units(90, 10), units(k, 10, seed=1)
    exact = [oracles.exact_cosines(row, exemplars.numpy()) for row in u.numpy()]
    for entries, middle in ((90 * 512, k // 2), (2**20, 0), (90 * 1024, k)):
        tile = new_tile(u.device, entries)
        near = scan(no_candidates(u), u, exemplars, tile, last=middle)
        near = scan(near, u, exemplars, tile, first=middle)
        assert nearest_column(near, u, exemplars).tolist() == [int(np.argmax(row)) for row in exact]
        rows = torch.arange(90) % 2 == 0
        best = best_cosine(near, rows, u, exemplars)
        assert best[rows].tolist() == [max(row) for row in exact[::2]]
        assert bool((best[~rows] == -torch.inf).all())


def test_forbidden_pairs_are_left_out() -> None:
    u = units(40, 5)
    later = torch.arange(40) > torch.arange(40)[:, None]
    near = scan(no_candidates(u), u, u, new_tile(u.device), forbidden=later | torch.eye(40, dtype=torch.bool))
    assert not bool((near.rows == 0).any())
    assert float(near.best[0]) == -torch.inf
    expected = [int(np.argmax(oracles.exact_cosines(u[i].numpy(), u[:i].numpy()))) for i in range(1, 40)]
    # Row 0 has no candidate; the search for the others must not mind.
    assert nearest_column(near, u, u)[1:].tolist() == expected


def test_candidates_stay_few_when_everything_ties() -> None:
    u = torch.eye(64)[torch.zeros(50, dtype=torch.long)]
    exemplars = torch.cat((torch.eye(64)[1:].repeat(60, 1), -torch.eye(64)[:1]))
    near = scan(no_candidates(u), u, exemplars, new_tile(u.device, 50 * 512))
    assert len(near.rows) <= 50 * 16
    assert nearest_column(near, u, exemplars).tolist() == [0] * 50


def test_rows_that_products_cannot_tell_apart_are_told_apart() -> None:
    """Exemplars so near to a row that their float32 products are rounding: the exact cosine says which is nearest."""
    u = units(6, 40)
    noise = torch.randn(6, 30, 40, generator=torch.Generator().manual_seed(2))
    exemplars = unit_directions((u[:, None] + 1e-4 * noise).reshape(180, 40), torch.zeros(40))[0]
    exact = [oracles.exact_cosines(row, exemplars.numpy()) for row in u.numpy()]
    expected = [int(np.argmax(row)) for row in exact]
    assert (u @ exemplars.T).argmax(dim=1).tolist() != expected
    near = scan(no_candidates(u), u, exemplars, new_tile(u.device))
    assert nearest_column(near, u, exemplars).tolist() == expected


def test_of_equal_columns_the_lowest_is_taken_in_whichever_piece_it_was_seen() -> None:
    u, exemplars = units(3, 7), units(1500, 7, seed=1)
    exemplars[[700, 5, 1400]] = u[0]
    exemplars[[1300, 600]] = u[1]
    for middle in (0, 3, 650, 1350):
        near = scan(no_candidates(u), u, exemplars, new_tile(u.device, 3 * 512), last=middle)
        near = scan(near, u, exemplars, new_tile(u.device, 3 * 512), first=middle)
        assert nearest_column(near, u, exemplars).tolist()[:2] == [5, 600]


def test_forbidden_pairs_are_those_of_the_new_columns() -> None:
    u, exemplars = units(20, 5), units(1200, 5, seed=1)
    forbidden = torch.rand(20, 1193, generator=torch.Generator().manual_seed(3)) < 0.5
    near = scan(no_candidates(u), u, exemplars, new_tile(u.device, 20 * 512), last=7)
    near = scan(near, u, exemplars, new_tile(u.device, 20 * 512), first=7, forbidden=forbidden)
    exact = np.stack([oracles.exact_cosines(row, exemplars.numpy()) for row in u.numpy()])
    exact[:, 7:][forbidden.numpy()] = -2
    assert nearest_column(near, u, exemplars).tolist() == exact.argmax(axis=1).tolist()
    assert np.abs(near.best.numpy() - exact.max(axis=1)).max() < product_error(5)
