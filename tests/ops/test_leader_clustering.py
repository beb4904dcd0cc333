"""LeaderClustering against a double loop, and its laws."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from saelens_ext.ops.grid_products import ROW_LIMIT, distance, exact_cosine
from saelens_ext.ops.leader_clustering import LeaderClustering
from saelens_ext.ops.spherical import assign_nearest, spherical_center, unit_directions
from saelens_ext.ops.statistics import unseen_mass
from tests.ops import oracles

BATCHES = (1, 7, 512, None)
STATISTICS = ("exemplars", "exemplar_indices", "counts", "member_means", "coherence")


def clustered(n: int, d: int, seed: int = 0, n_clusters: int = 20) -> torch.Tensor:
    """Activations in clusters of unequal sizes, off the origin."""
    generator = torch.Generator().manual_seed(seed)
    means = 2 * torch.randn(n_clusters, d, generator=generator)
    cluster = (n_clusters * torch.rand(n, generator=generator) ** 2).long()
    return means[cluster] + torch.randn(n, d, generator=generator) + 3.0


def fitted(
    x: torch.Tensor, center: torch.Tensor, threshold: float, batch: int | None
) -> tuple[LeaderClustering, torch.Tensor]:
    clustering = LeaderClustering(center, threshold)
    labels = [clustering.partial_fit(rows) for rows in x.split(batch or max(1, len(x)))]
    return clustering, torch.cat(labels)


def check_against_oracle(x: torch.Tensor, center: torch.Tensor, threshold: float, batches=BATCHES) -> LeaderClustering:
    """Every batching gives the oracle's labels and founders, and bit for bit the same statistics."""
    units = unit_directions(x, center)[0]
    labels, founders = oracles.leader_clustering(units.numpy(), threshold)
    first = None
    for batch in batches:
        clustering, found = fitted(x, center, threshold, batch)
        assert found.tolist() == labels, f"labels with batches of {batch}"
        assert clustering.exemplar_indices.tolist() == founders
        assert torch.equal(clustering.exemplars, units[founders])
        assert (
            clustering.counts.tolist()
            == np.bincount([label for label in labels if label >= 0], minlength=len(founders)).tolist()
        )
        first = first or clustering
        for name in STATISTICS:
            assert torch.equal(getattr(clustering, name), getattr(first, name)), f"{name} with batches of {batch}"
    return first


@pytest.mark.parametrize(
    "threshold", [0.5, 1.1, *(pytest.param(value, marks=pytest.mark.slow) for value in (0.15, 0.8))]
)
def test_equals_the_double_loop_whatever_the_batches(threshold: float) -> None:
    x = clustered(700, 24)
    center = spherical_center(x)
    clustering = check_against_oracle(x, center, threshold)
    raw = x.double().numpy() - center.double().numpy()
    labels, founders = oracles.leader_clustering(raw, threshold, oracles.float64_cosines)
    assert clustering.exemplar_indices.tolist() == founders
    assert fitted(x, center, threshold, None)[1].tolist() == labels


def test_statistics_are_those_of_the_members() -> None:
    x = clustered(900, 16)
    clustering, labels = fitted(x, spherical_center(x), 0.4, 100)
    units = unit_directions(x, spherical_center(x))[0].double()
    for region in range(clustering.n_regions):
        total = units[labels == region].sum(dim=0)
        torch.testing.assert_close(clustering.member_means[region].double(), total / total.norm(), atol=1e-6, rtol=0)
        assert float(clustering.coherence[region]) == pytest.approx(
            float(total.norm()) / int((labels == region).sum()), abs=1e-6
        )
    assert clustering.unseen_mass == int((clustering.exemplar_indices >= 450).sum()) / 450
    assert 0 < clustering.unseen_mass < 1


def test_unseen_mass_is_not_below_the_founding_rate_of_fresh_activations() -> None:
    x = clustered(9000, 16)
    center = spherical_center(x)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(3))]
    for n in (1000, 3000):
        clustering, _ = fitted(x[:n], center, 0.3, 500)
        limit = unseen_mass(clustering.n_founders_since(n // 2), n - n // 2).upper
        nearest_distance = assign_nearest(x[n:], center, clustering.exemplars)[1]
        fresh = float((nearest_distance > 0.3).float().mean())
        assert 0 < fresh <= limit, n
        # The share of regions with one member, which Good and Turing would take, is too low: regions overlap.
        assert int((clustering.counts == 1).sum()) / n < fresh, n


def test_rows_join_founders_of_their_own_batch_that_precede_them_only() -> None:
    def at(angle: float) -> list[float]:
        return [float(np.cos(np.radians(angle))), float(np.sin(np.radians(angle)))]

    # 40 degrees is within 60 of 0, and nearer to 75; the first such row comes before 75 and the second after it.
    x = torch.tensor([at(0), at(40), at(75), at(40)])
    clustering, labels = fitted(x, torch.zeros(2), 0.5, None)
    assert labels.tolist() == [0, 0, 1, 1]
    assert clustering.exemplar_indices.tolist() == [0, 2]


def integer_rows(n: int, d: int, seed: int) -> torch.Tensor:
    """Rows of -1, 0, 1: many duplicates, many distances that are equal though computed from different entries."""
    return torch.randint(-1, 2, (n, d), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("threshold", [0.5, 1.0, 1 - 3**-0.5, 1e-6])
@pytest.mark.parametrize("d", [4, pytest.param(9, marks=pytest.mark.slow)])
def test_exact_ties_are_settled_as_the_double_loop_settles_them(threshold: float, d: int) -> None:
    check_against_oracle(integer_rows(400, d, seed=d), torch.zeros(d), threshold, batches=(1, 3, 50, None))


@pytest.mark.slow
def test_a_row_midway_between_two_exemplars_joins_the_nearer_by_a_hair() -> None:
    d = 512
    generator = torch.Generator().manual_seed(0)
    exemplars = unit_directions(torch.randn(20, d, generator=generator), torch.zeros(d))[0]
    pairs = torch.randint(20, (600, 2), generator=generator)
    # Differences of about 1e-8 between the two cosines: within the rounding of a float32 product.
    middle = exemplars[pairs[:, 0]] + exemplars[pairs[:, 1]] + 2e-7 * torch.randn(600, d, generator=generator)
    x = torch.cat((exemplars, middle.float()))
    check_against_oracle(x, torch.zeros(d), 0.7, batches=(1, 64, None))


def test_thresholds_equal_to_a_distance_and_just_below() -> None:
    d = 256
    x = torch.randn(60, d, generator=torch.Generator().manual_seed(1)) + 0.5
    units = unit_directions(x, torch.zeros(d))[0]
    for i in range(1, 40):
        theta = float(distance(exact_cosine(units, torch.tensor([0]), units, torch.tensor([i])))[0])
        pair = x[[0, i]]
        assert fitted(pair, torch.zeros(d), theta, None)[1].tolist() == [0, 0]
        assert fitted(pair, torch.zeros(d), theta, 1)[1].tolist() == [0, 0]
        below = float(np.nextafter(theta, 0))
        assert fitted(pair, torch.zeros(d), below, None)[1].tolist() == [0, 1]
        assert fitted(pair, torch.zeros(d), below, 1)[1].tolist() == [0, 1]
    theta = float(distance(exact_cosine(units, torch.tensor([3]), units, torch.tensor([17])))[0])
    for threshold in (theta, float(np.nextafter(theta, 0))):
        check_against_oracle(x, torch.zeros(d), threshold, batches=(1, 7, None))


def test_blocks_longer_than_the_row_limit() -> None:
    x = clustered(ROW_LIMIT + 900, 6, n_clusters=300)
    center = spherical_center(x)
    whole, labels = fitted(x, center, 0.002, None)
    assert whole.n_regions > 1000
    for batch in (97, ROW_LIMIT - 1):
        other, found = fitted(x, center, 0.002, batch)
        assert torch.equal(found, labels)
        for name in STATISTICS:
            assert torch.equal(getattr(other, name), getattr(whole, name))


def test_every_activation_founds_below_the_smallest_distance() -> None:
    x = torch.randn(700, 12, generator=torch.Generator().manual_seed(2))
    clustering, labels = fitted(x, torch.zeros(12), 1e-9, 90)
    assert labels.tolist() == list(range(700))
    assert clustering.unseen_mass == 1.0
    torch.testing.assert_close(clustering.coherence, torch.ones(700))
    # Seen again, each joins itself: its distance is 0, not the 1e-8 that float32 rows leave.
    assert clustering.partial_fit(x).tolist() == list(range(700))
    assert clustering.counts.tolist() == [2] * 700


def test_everything_joins_the_first_at_the_largest_threshold() -> None:
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(3))
    x[7] = -x[0]
    assert fitted(x, torch.zeros(3), 2.0, 50)[1].tolist() == [0] * 300
    assert fitted(torch.stack((x[0], -x[0])), torch.zeros(3), float(np.nextafter(2.0, 0)), None)[1].tolist() == [0, 1]


def test_members_that_cancel_have_coherence_zero_and_no_mean() -> None:
    x = torch.eye(3)[[0, 0, 1]] * torch.tensor([[1.0], [-1.0], [1.0]])
    clustering, _ = fitted(x[:2], torch.zeros(3), 2.0, None)
    assert clustering.coherence.tolist() == [0.0]
    assert clustering.member_means.tolist() == [[0.0, 0.0, 0.0]]


def test_duplicates_join_the_region_of_the_first() -> None:
    x = clustered(100, 8).repeat(3, 1)
    clustering = check_against_oracle(x, spherical_center(x), 1e-3, batches=(1, 64, None))
    assert int(clustering.exemplar_indices.max()) < 100
    assert int(clustering.counts.min()) >= 3


def test_an_activation_equal_to_the_centre_belongs_nowhere() -> None:
    x = clustered(300, 8)
    center = spherical_center(x)
    x[[0, 5, 299]] = center
    clustering = check_against_oracle(x, center, 0.5)
    assert clustering.n_undirected == 3
    assert clustering.n_seen == 300
    assert int(clustering.counts.sum()) == 297
    assert int(clustering.exemplar_indices[0]) == 1
    lonely = LeaderClustering(center, 0.5)
    assert lonely.partial_fit(center[None].repeat(4, 1)).tolist() == [-1] * 4
    assert (lonely.n_regions, lonely.n_seen, lonely.unseen_mass) == (0, 4, 0.0)
    assert lonely.exemplars.shape == (0, 8)
    assert lonely.member_means.shape == (0, 8)


def test_one_activation_and_an_empty_batch() -> None:
    clustering = LeaderClustering(torch.zeros(4), 0.5)
    assert clustering.unseen_mass == 1.0
    assert clustering.partial_fit(torch.empty(0, 4)).shape == (0,)
    assert clustering.n_seen == 0
    assert clustering.partial_fit(torch.tensor([[0.0, 3.0, 0.0, 0.0]])).tolist() == [0]
    assert clustering.exemplars.tolist() == [[0.0, 1.0, 0.0, 0.0]]
    assert clustering.unseen_mass == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_clustered_as_their_upcast(dtype: torch.dtype) -> None:
    x = clustered(500, 12).to(dtype)
    center = spherical_center(x)
    found, labels = fitted(x, center, 0.5, 128)
    upcast, expected = fitted(x.double(), center.double(), 0.5, None)
    assert torch.equal(labels, expected)
    assert found.exemplars.dtype == found.member_means.dtype == torch.float32
    assert torch.equal(found.exemplar_indices, upcast.exemplar_indices)
    torch.testing.assert_close(found.exemplars, upcast.exemplars, atol=2e-7, rtol=0)


@pytest.mark.parametrize("scale", [1e-30, 2.0**-60, 2.0**60, 1e30])
def test_scale_about_the_centre_does_not_matter(scale: float) -> None:
    x = clustered(300, 8)
    center = spherical_center(x)
    _, labels = fitted(x, center, 0.4, None)
    _, scaled = fitted(x * scale, center * scale, 0.4, 64)
    assert torch.equal(labels, scaled)


def test_directions_alone_count() -> None:
    x = clustered(300, 8).double()
    center = spherical_center(x).double()
    stretched = center + (x - center) * torch.rand(300, 1, generator=torch.Generator().manual_seed(0)).add(0.1)
    assert torch.equal(fitted(x, center, 0.4, None)[1], fitted(stretched, center, 0.4, None)[1])


def test_labels_survive_the_surroundings_of_the_call() -> None:
    """Inference mode, autograd, autocast and the process's matmul precision change nothing."""
    x = clustered(600, 64)
    center = spherical_center(x)
    expected, labels = fitted(x, center, 0.5, None)
    with torch.inference_mode():
        clustering = LeaderClustering(center * 1, 0.5)
        first = clustering.partial_fit(x[:300] * 1)
    second = clustering.partial_fit(x[300:].requires_grad_())
    assert torch.equal(torch.cat((first, second)), labels)
    assert not clustering.exemplars.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fitted(x.detach(), center, 0.5, 200)[1], labels)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        rough, found = fitted(x.detach(), center, 0.5, 200)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found, labels)
    assert torch.equal(rough.exemplars, expected.exemplars)


def test_neither_the_input_nor_a_result_is_tied_to_the_state() -> None:
    x = clustered(200, 8)
    kept, center = x.clone(), spherical_center(x)
    clustering = LeaderClustering(center, 0.5)
    clustering.partial_fit(x[:100])
    counts, exemplars = clustering.counts, clustering.exemplars
    before = counts.clone()
    exemplars.zero_()
    center.zero_()
    clustering.partial_fit(x[100:])
    assert torch.equal(x, kept)
    assert torch.equal(counts, before)
    assert torch.equal(clustering.exemplars, fitted(kept, spherical_center(kept), 0.5, None)[0].exemplars)


def test_a_copy_goes_its_own_way() -> None:
    x = clustered(200, 8)
    clustering, _ = fitted(x[:100], spherical_center(x), 0.3, None)
    twin = copy.deepcopy(clustering)
    assert torch.equal(twin.partial_fit(x[100:]), clustering.partial_fit(x[100:]))
    assert torch.equal(twin.counts, clustering.counts)


@pytest.mark.parametrize("cut", [0, 1, 350, 800])
def test_state_continues_the_stream_identically(cut: int) -> None:
    x = clustered(800, 12)
    x[100] = center = spherical_center(x)
    whole, labels = fitted(x, center, 0.3, None)
    first = LeaderClustering(center, 0.3)
    first.partial_fit(x[:cut])
    state = load(save(first.state_dict()))
    first.partial_fit(x[cut:])  # the state is a snapshot
    second = LeaderClustering(center, 0.3)
    second.partial_fit(x[:5])  # what it held is replaced
    second.load_state_dict(state)
    assert torch.equal(second.partial_fit(x[cut:]), labels[cut:])
    for name in STATISTICS:
        assert torch.equal(getattr(second, name), getattr(whole, name))
    assert (second.n_seen, second.n_undirected) == (whole.n_seen, whole.n_undirected)


def test_a_state_of_another_clustering_is_refused() -> None:
    x = clustered(50, 6)
    clustering, _ = fitted(x, torch.zeros(6), 0.5, None)
    state = clustering.state_dict()
    for other in (LeaderClustering(torch.zeros(6), 0.4), LeaderClustering(torch.ones(6), 0.5)):
        with pytest.raises(ValueError, match="float\\(state\\['threshold'\\]\\)"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="center has shape"):
        LeaderClustering(torch.zeros(7), 0.5).load_state_dict(state)
    with pytest.raises(ValueError, match="lacks sums"):
        clustering.load_state_dict({name: value for name, value in state.items() if name != "sums"})
    with pytest.raises(ValueError, match="'count'.*'counts'"):
        clustering.load_state_dict(state | {"count": state["counts"]})
    with pytest.raises(ValueError, match="counts has shape .* torch.float32"):
        clustering.load_state_dict(state | {"counts": state["counts"].float()})


@pytest.mark.parametrize("threshold", [0.0, -0.1, 2.0001, float("nan"), float("inf")])
def test_thresholds_out_of_range_are_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"\(0, 2\]"):
        LeaderClustering(torch.zeros(3), threshold)


def test_bad_centres_and_activations_are_refused_and_leave_no_trace() -> None:
    with pytest.raises(ValueError, match="center has 1 non-finite"):
        LeaderClustering(torch.tensor([0.0, float("nan")]), 0.5)
    with pytest.raises(ValueError, match="float vector"):
        LeaderClustering(torch.empty(0), 0.5)
    clustering = LeaderClustering(torch.zeros(4), 0.5)
    x = torch.randn(3000, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="last dimension must be 4"):
        clustering.partial_fit(torch.zeros(2, 5))
    for bad in (float("nan"), float("inf"), -float("inf")):
        y = x.clone()
        y[2999, 1] = bad
        with pytest.raises(ValueError, match="row 2999"):
            clustering.partial_fit(y)
    with pytest.raises(ValueError, match="1e\\+200.*Rescale"):
        clustering.partial_fit(torch.full((1, 4), 1e200, dtype=torch.float64))
    assert (clustering.n_seen, clustering.n_regions) == (0, 0)
    # Infinities of opposite sign, and finite entries whose sum overflows.
    with pytest.raises(ValueError, match="2 non-finite"):
        clustering.partial_fit(torch.tensor([[float("inf"), -float("inf"), 0, 0]]))
    assert clustering.partial_fit(torch.full((4, 4), 3e38)).tolist() == [0] * 4
    assert clustering.partial_fit(torch.full((4, 4), 6e4, dtype=torch.float16)).tolist() == [0] * 4


@st.composite
def streams(draw) -> tuple[torch.Tensor, torch.Tensor, float, list[int]]:
    """A stream with few distinct values (ties, duplicates, the centre itself), a threshold and a way to cut it."""
    n, d = draw(st.integers(1, 60)), draw(st.integers(1, 6))
    values = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0])
    x = torch.tensor(draw(st.lists(st.lists(values, min_size=d, max_size=d), min_size=n, max_size=n)))
    center = torch.tensor(draw(st.lists(values, min_size=d, max_size=d)))
    threshold = draw(st.one_of(st.floats(1e-6, 2.0), st.sampled_from([0.5, 1.0, 1.5, 2.0])))
    cuts = draw(st.lists(st.integers(1, n), max_size=5))
    ends = sorted({*cuts, n})
    return x, center, threshold, [b - a for a, b in zip([0, *ends], ends)]


@settings(deadline=None, max_examples=100)
@given(streams())
@pytest.mark.slow
def test_laws(stream) -> None:
    x, center, threshold, sizes = stream
    clustering = LeaderClustering(center, threshold)
    labels = torch.cat([clustering.partial_fit(rows) for rows in x.split(sizes)])
    units = unit_directions(x, center)[0]
    assert (labels.tolist(), clustering.exemplar_indices.tolist()) == oracles.leader_clustering(
        units.numpy(), threshold
    )

    directed = labels >= 0
    assert clustering.n_seen == len(x)
    assert clustering.n_undirected == int((~directed).sum()) == int((x == center).all(dim=1).sum())
    assert int(clustering.counts.sum()) == clustering.n_seen - clustering.n_undirected
    assert torch.equal(clustering.counts, torch.bincount(labels[directed], minlength=clustering.n_regions))
    assert labels[clustering.exemplar_indices].tolist() == list(range(clustering.n_regions))
    assert bool((clustering.exemplar_indices.diff() > 0).all())
    assert bool(((clustering.coherence >= 0) & (clustering.coherence <= 1)).all())

    exemplars = clustering.exemplars
    i, j = torch.triu_indices(len(exemplars), len(exemplars), 1)
    assert bool((distance(exact_cosine(exemplars, i, exemplars, j)) > threshold).all())
    rows = directed.nonzero()[:, 0]
    members = distance(exact_cosine(units, rows, exemplars, labels[rows]))
    assert bool((members <= threshold).all())
    if len(rows):
        regions, distances = assign_nearest(x[rows], center, exemplars)
        assert bool((distances <= members).all())
        assert torch.equal(regions[torch.searchsorted(rows, clustering.exemplar_indices)], torch.arange(len(exemplars)))
