"""The spherical centre, directions and nearest exemplars, against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelens_ext.ops.grid_products import GRID
from saelens_ext.ops.leader_clustering import LeaderClustering
from saelens_ext.ops.spherical import SphericalCenter, assign_nearest, nearest, spherical_center, unit_directions
from tests.ops import oracles


def activations(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """Off the origin, with norms over two orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator) + 2 * torch.randn(d, generator=generator)
    return x * torch.exp(torch.randn(n, 1, generator=generator))


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 700])
def test_centre_equals_numpy_and_any_batching_of_itself(n: int) -> None:
    x = activations(n, 24)
    center = spherical_center(x)
    np.testing.assert_allclose(center.numpy(), oracles.spherical_center(x.numpy()), rtol=0, atol=1e-6)
    for batch in (1, 7, 256, 512):
        accumulator = SphericalCenter(24)
        for rows in x.split(batch):
            assert accumulator.update(rows) is accumulator
        assert torch.equal(accumulator.center, center)
        assert accumulator.n_seen == n


def test_centre_can_be_read_along_the_way_and_takes_empty_batches() -> None:
    x = activations(400, 8)
    accumulator = SphericalCenter(8).update(x[:100]).update(x[:0])
    assert torch.equal(accumulator.center, spherical_center(x[:100]))
    assert torch.equal(accumulator.update(x[100:]).center, spherical_center(x))


def test_centre_is_the_mean_when_norms_are_equal_and_not_moved_by_a_giant() -> None:
    x = activations(500, 16)
    x = x / x.norm(dim=1, keepdim=True)
    torch.testing.assert_close(spherical_center(x), x.mean(dim=0), atol=1e-6, rtol=0)
    before = spherical_center(x)
    giant = torch.cat((x, 1e4 * torch.eye(16)[before.argmax()][None]))
    after = spherical_center(giant)
    turned = torch.nn.functional.cosine_similarity
    assert float(turned(before, after, dim=0)) > 0.999
    assert float(turned(before, giant.mean(dim=0), dim=0)) < 0.9


def test_centre_of_cancelling_and_of_zero_activations() -> None:
    x = activations(100, 5)
    assert spherical_center(torch.cat((x, -x))).abs().max() < 1e-5
    assert spherical_center(torch.zeros(10, 5)).tolist() == [0.0] * 5
    # A zero has no direction but counts in the mean.
    torch.testing.assert_close(spherical_center(torch.tensor([[2.0, 0.0], [0.0, 0.0]])), torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_centre_of_other_dtypes_is_float32(dtype: torch.dtype) -> None:
    x = activations(300, 6).to(dtype)
    center = spherical_center(x)
    assert center.dtype == torch.float32
    np.testing.assert_allclose(center.numpy(), oracles.spherical_center(x.double().numpy()), rtol=0, atol=1e-6)


def test_centre_errors() -> None:
    with pytest.raises(ValueError, match="no activations"):
        spherical_center(torch.empty(0, 4))
    with pytest.raises(ValueError, match="last dimension must be 4"):
        SphericalCenter(4).update(torch.zeros(1, 5))
    with pytest.raises(ValueError, match="row 2"):
        spherical_center(torch.tensor([[0.0], [1.0], [float("nan")]]))
    with pytest.raises(ValueError, match="at least 1"):
        SphericalCenter(0)


def test_directions_are_unit_rows_on_the_grid() -> None:
    x = activations(900, 48)
    center = spherical_center(x)
    u, norm = unit_directions(x, center)
    offset = x.double() - center.double()
    torch.testing.assert_close(norm.double(), offset.norm(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(u.double(), offset / offset.norm(dim=1, keepdim=True), atol=1.5e-7, rtol=0)
    torch.testing.assert_close(u.double().norm(dim=1), torch.ones(900, dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.equal((u.double() * GRID).round() / GRID, u.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("d", [1, 3, 577])
def test_a_direction_depends_on_its_row_alone(dtype: torch.dtype, d: int) -> None:
    x = activations(1500, d).to(dtype)
    center = spherical_center(x)
    u, norm = unit_directions(x, center)
    for batch in (1, 7, 512):
        parts = [unit_directions(rows, center) for rows in x[:513].split(batch)]
        assert torch.equal(torch.cat([part[0] for part in parts]), u[:513])
        assert torch.equal(torch.cat([part[1] for part in parts]), norm[:513])
    assert torch.equal(unit_directions(x.T.contiguous().T, center)[0], u)


def test_directions_at_the_ends_of_the_range() -> None:
    direction = torch.tensor([3.0, -4.0, 0.0])
    for scale in (1e-37, 1e-30, 1e-12, 1e12, 1e30, 5e37):
        u, norm = unit_directions(direction[None] * scale, torch.zeros(3))
        torch.testing.assert_close(u, torch.tensor([[0.6, -0.8, 0.0]]))
        torch.testing.assert_close(norm, torch.tensor([5 * scale]))
    for scale in (1e-35, 1e100):
        u, _ = unit_directions(direction[None].double() * scale, torch.zeros(3))
        torch.testing.assert_close(u, torch.tensor([[0.6, -0.8, 0.0]]))


def test_an_activation_equal_to_the_centre_has_a_zero_direction() -> None:
    center = torch.tensor([1.1, 2.2, -3.3])
    u, norm = unit_directions(torch.stack((center, center + 1)), center)
    assert u[0].tolist() == [0.0, 0.0, 0.0]
    assert float(norm[0]) == 0
    assert bool(u[1].any())
    assert unit_directions(center[None].double(), center)[0].tolist() == [[0.0, 0.0, 0.0]]
    assert unit_directions(torch.empty(0, 3), center)[0].shape == (0, 3)


def test_direction_errors() -> None:
    with pytest.raises(ValueError, match="last dimension must be 3"):
        unit_directions(torch.zeros(2, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="x has 1 non-finite"):
        unit_directions(torch.tensor([[float("inf")]]), torch.zeros(1))
    with pytest.raises(ValueError, match="center has 1 non-finite"):
        unit_directions(torch.zeros(1, 1), torch.tensor([float("nan")]))


@pytest.mark.slow
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (300, 40, 12), (700, 1300, 5)])
def test_nearest_equals_brute_force(n: int, k: int, d: int) -> None:
    zero = torch.zeros(d)
    u, exemplars = unit_directions(activations(n, d), zero)[0], unit_directions(activations(k, d, seed=1), zero)[0]
    index, distances = nearest(u, exemplars)
    exact = [oracles.exact_cosines(row, exemplars.numpy()) for row in u.numpy()]
    assert index.tolist() == [int(np.argmax(row)) for row in exact]
    assert distances.tolist() == [min(2.0, max(0.0, 1 - max(row))) for row in exact]


@pytest.mark.slow
def test_nearest_does_not_depend_on_the_batch_or_the_work_space() -> None:
    x = activations(800, 32)
    center = spherical_center(x)
    exemplars = unit_directions(x[::7], center)[0]
    index, distances = assign_nearest(x, center, exemplars)
    for batch in (1, 7, 512):
        parts = [assign_nearest(rows, center, exemplars) for rows in x[:300].split(batch)]
        assert torch.equal(torch.cat([part[0] for part in parts]), index[:300])
        assert torch.equal(torch.cat([part[1] for part in parts]), distances[:300])
    for max_bytes in (1, 10_000, 10**9):
        again = assign_nearest(x, center, exemplars, max_bytes=max_bytes)
        assert torch.equal(again[0], index)
        assert torch.equal(again[1], distances)
    through_units = nearest(unit_directions(x, center)[0], exemplars)
    assert torch.equal(through_units[0], index)
    assert torch.equal(through_units[1], distances)
    assert index[::7].tolist() == list(range(len(exemplars)))
    assert distances[::7].tolist() == [0.0] * len(exemplars)


def test_the_lowest_of_equally_near_exemplars_wins() -> None:
    exemplars = torch.eye(4)[[2, 1, 2, 1, 0]]
    index, distances = nearest(
        torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, -1.0]]), exemplars
    )
    assert index.tolist() == [0, 1, 0]
    np.testing.assert_allclose(distances.numpy(), [1 - 2**-0.5, 0, 1], atol=1e-9)


def test_rows_without_a_direction_go_to_the_first_at_distance_one() -> None:
    center = torch.ones(3)
    index, distances = assign_nearest(torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 5.0]]), center, -torch.eye(3))
    assert index.tolist() == [0, 0]
    assert distances.tolist() == [1.0, 1.0]
    index, distances = nearest(torch.zeros(2, 3), torch.eye(3))
    assert (index.tolist(), distances.tolist()) == ([0, 0], [1.0, 1.0])
    assert nearest(torch.empty(0, 3), torch.eye(3))[0].shape == (0,)


def test_rows_that_are_not_unit_are_normalised() -> None:
    u, exemplars = activations(200, 16), activations(30, 16, seed=1)
    index, distances = nearest(u, exemplars)
    cosine = torch.nn.functional.cosine_similarity(u[:, None].double(), exemplars[None].double(), dim=2)
    assert index.tolist() == cosine.argmax(dim=1).tolist()
    torch.testing.assert_close(distances, 1 - cosine.max(dim=1).values, atol=1e-6, rtol=0)
    # bfloat16 moves norms by up to 0.4%: products alone would prefer the longer rows.
    rough = unit_directions(exemplars, torch.zeros(16))[0].bfloat16()
    cosine = torch.nn.functional.cosine_similarity(u[:, None].double(), rough[None].double(), dim=2)
    assert nearest(u, rough)[0].tolist() == cosine.argmax(dim=1).tolist()


def test_members_stay_within_the_threshold_of_their_nearest_exemplar() -> None:
    x = activations(600, 12)
    center = spherical_center(x)
    for threshold in (0.1, 0.45, 0.8):
        clustering = LeaderClustering(center, threshold)
        clustering.partial_fit(x)
        index, distances = assign_nearest(x, center, clustering.exemplars)
        assert bool((distances <= threshold).all())
        assert index[clustering.exemplar_indices].tolist() == list(range(clustering.n_regions))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20), st.integers(1, 30), st.integers(1, 9), st.integers(0, 2**31), st.integers(2**8, 2**12))
def test_nearest_law(n: int, k: int, d: int, seed: int, max_bytes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    u = torch.randint(-1, 2, (n, d), generator=generator).float()
    exemplars = torch.randint(-1, 2, (k, d), generator=generator).float()
    exemplars[~exemplars.any(dim=1), 0] = 1
    rows, units = (unit_directions(part, torch.zeros(d))[0].numpy() for part in (u, exemplars))
    index, distances = nearest(u, exemplars, max_bytes=max_bytes)
    exact = [oracles.exact_cosines(row, units) if row.any() else [0.0] for row in rows]
    assert index.tolist() == [int(np.argmax(row)) for row in exact]
    assert distances.tolist() == [min(2.0, max(0.0, 1 - max(row))) for row in exact]


def test_nearest_errors() -> None:
    u = torch.eye(3)
    with pytest.raises(ValueError, match="no rows"):
        nearest(u, torch.empty(0, 3))
    with pytest.raises(ValueError, match="1 zero rows"):
        nearest(u, torch.tensor([[1.0, 0, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match="exemplars has shape .* must be 3"):
        nearest(u, torch.eye(4))
    with pytest.raises(ValueError, match="exemplars has 1 non-finite"):
        nearest(u, torch.tensor([[float("nan"), 0, 0]]))
    with pytest.raises(ValueError, match="u has 1 non-finite"):
        nearest(torch.tensor([[float("inf"), 0, 0]]), u)
    with pytest.raises(ValueError, match="max_bytes"):
        nearest(u, u, max_bytes=0)
