"""Every public entry gives on an accelerator what it gives on the CPU, and the same each time.

The accelerator is the fake one, whose numbers are the CPU's; and, for tests marked ``gpu``, the one that is
there, whose products are rounded otherwise. Torch knows the fake one for as long as the process lives, so that tests of
other things do not share one with these: ``pytest`` finds this folder only where it is named.
"""

import pytest
import torch

import saelens_ext as ext
from saelens_ext.host.devices import chosen_device
from saelens_ext.ops.semi_nmf.coordinate import CoordinateFit
from tests.continuations._dictionaries import own
from tests.devices.fake_accelerator import FakeTensor, counted_waits, fake_accelerator
from tests.hub.conftest import hub, running_hub  # noqa: F401
from tests.test_modes import CASES, leaves, make_all, shared

# The client's own upload of large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")

TOLERANCE = {"fake": 1e-5, "real": 1e-3}
"""Of numbers, as a fraction of the largest entry of a tensor: gradients are added up in another order on a device."""
SAME_TO_THE_BIT = {
    "ActivationStream", "Assignment", "ExemplarPartition", "LeaderClustering", "fit_exemplar_partition",
    "fit_exemplar_partitions", "fit_hierarchical_snmf", "fit_snmf", "profile_dictionaries", "profile_dictionary",
}  # fmt: skip
"""On the fake accelerator; what is compared through the model on a real one is within its tolerance."""
TRIED_ELSEWHERE = {"Audit", "Evidence", "write_evidence_report"}
"""They are made of the same parts as other entries, which are quicker."""


@pytest.fixture(scope="module", params=["fake", pytest.param("real", marks=pytest.mark.gpu)])
def device(request):
    """A kind of accelerator, and its name."""
    if request.param == "fake":
        with fake_accelerator() as name:
            yield request.param, name
        return
    name = chosen_device("auto")
    if name == "cpu":
        pytest.skip("there is neither CUDA nor MPS here")
    yield request.param, name


@pytest.fixture(scope="module")
def made_here(tiny_texts):
    return make_all(tiny_texts)


@pytest.fixture(scope="module")
def made_there(tiny_texts, device):
    return make_all(tiny_texts, device[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in TRIED_ELSEWHERE])
def test_an_accelerator_gives_what_the_cpu_gives(name, made_here, made_there, device, tmp_path, request):
    if CASES[name] is shared:
        request.getfixturevalue("hub")
    if (name, device[0]) == ("fit_sae", "fake"):
        pytest.skip("SAELens writes weights from where they are, and the fake accelerator has no memory of its own")
    folders = [tmp_path / place for place in ("here", "there")]
    for folder in folders:
        folder.mkdir()
    expected, found = (dict(leaves(CASES[name](*each))) for each in zip((made_here, made_there), folders))
    assert found.keys() == expected.keys()
    tolerance = 0 if device[0] == "fake" and name in SAME_TO_THE_BIT else TOLERANCE[device[0]]
    for path, value in found.items():
        assert _same(value, expected[path], tolerance, device[0]), f"{path}: {value} is not {expected[path]}"


def _same(value, expected, tolerance, kind):
    if isinstance(value, str):
        return value == expected or kind == "real" or value.startswith("fake")  # texts hold rounded numbers
    if value is None or expected is None:
        return value is expected
    value, expected = (torch.as_tensor(part).cpu() for part in (value, expected))
    if value.dtype != expected.dtype or value.shape != expected.shape:
        return False
    if not value.is_floating_point() or tolerance == 0:
        return torch.equal(value.nan_to_num(7), expected.nan_to_num(7))
    largest = float(expected.nan_to_num(0, 0, 0).abs().max()) if expected.numel() else 0.0
    return torch.allclose(value, expected, rtol=tolerance, atol=tolerance * max(1e-3, largest), equal_nan=True)


@pytest.mark.slow
def test_builds_are_repeated_to_the_bit(made_there):
    m = made_there

    def build():
        fit, snmf = ext.fit_exemplar_partition(m.residual, percentile=20), ext.fit_snmf(m.neurons, 5, max_iter=5)
        return fit, snmf, ext.profile_dictionary(fit.dictionary, m.residual, n_examples=2)

    first, second = (dict(leaves(build())) for _ in range(2))
    for path, value in first.items():
        assert _same(value, second[path], 0, "fake"), path


def test_clustering_and_codes_do_without_float64_of_the_device():
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    x[:2] *= 1e20  # whose squares float32 does not hold
    expected = _clustered(x)
    with fake_accelerator() as name:
        found = _clustered(x.to(name))
    for one, other in zip(leaves(expected), leaves(found)):
        assert torch.equal(one[1], other[1].cpu()), one[0]


def _clustered(x):
    clustering = ext.LeaderClustering(x[2:].mean(0), 0.8)
    labels = clustering.partial_fit(x)
    regions = ext.ExemplarPartition.from_regions(clustering.exemplars, clustering.member_means, x[2:].mean(0), 0.8)
    features = ext.SNMFDictionary.from_features(x[2:7], l1=0.1)
    given = x[10:].clone().requires_grad_()
    codes = features.encode(given)
    (gradient,) = torch.autograd.grad(codes.sum(), given)
    return labels, regions.to(x.device).assign(x.detach()), codes.detach(), gradient


@pytest.mark.parametrize("number", [0, 1], ids=["regions", "features"])
def test_a_dictionary_elsewhere_gives_its_results_where_the_activations_are_and_says_so_once(number):
    dictionary = own(32)[number]
    x = torch.randn(5, dictionary.cfg.d_in, generator=torch.Generator().manual_seed(0))
    expected = dictionary.encode(x), dictionary(x)
    with fake_accelerator() as name:
        there = x.to(name)
        with pytest.warns(UserWarning, match=f"on cpu and is given tensors on {name}:0") as said:
            codes, out = dictionary.encode(there), dictionary(there)
            decoded = dictionary.decode(codes)
            found = [codes, out, decoded, *(dictionary.assign(there) if number == 0 else ())]
        assert len(said) == 1
        assert all(isinstance(part, FakeTensor) for part in found)
        assert torch.equal(codes.cpu(), expected[0]) and torch.equal(out.cpu(), expected[1])


def test_the_fake_accelerator_is_strict():
    with fake_accelerator() as name:
        x = torch.ones(2, device=name)
        with pytest.raises(TypeError, match="no torch.float64"):
            x.double()
        with pytest.raises(RuntimeError, match="tensors of the CPU"):
            x + torch.ones(2)
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()


def test_the_host_waits_for_the_device_a_few_times_a_block_and_not_for_each_of_its_rows():
    x = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0))
    waits = {}
    with fake_accelerator(float64=True) as name, torch.no_grad():
        x = x.to(name)
        clustering = ext.LeaderClustering(x[:512].mean(0), 0.6)
        clustering.partial_fit(x[:2048])
        with counted_waits() as waited:
            clustering.partial_fit(x[2048:2560])
        waits["build"] = waited.total()
        regions = ext.ExemplarPartition.from_regions(
            clustering.exemplars, clustering.member_means, clustering.center, 0.6
        )
        features = ext.SNMFDictionary.from_features(x[:16].clone(), l1=0.1)
        features.encode(x[:4])  # which prepares the features
        for what in (regions.assign, regions.encode, features.encode):
            with counted_waits() as waited:
                what(x[:2048])
            waits[what.__qualname__] = waited.total()
    assert waits["ExemplarPartition.encode"] == 0
    assert waits["build"] <= 20 and waits["ExemplarPartition.assign"] <= 15 and waits["SNMFDictionary.encode"] <= 15


def test_an_iteration_of_a_factorisation_waits_three_times():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 128, generator=generator) * (torch.rand(12, 128, generator=generator) < 0.03)
    codes = torch.rand(3000, 12, generator=generator) * (torch.rand(3000, 12, generator=generator) < 0.1)
    x = codes @ features + 0.1 * torch.randn(3000, 128, generator=generator)
    with fake_accelerator(float64=True) as name, torch.no_grad():
        fit = CoordinateFit(*(part.to(name) for part in (x, codes, features)), 4, 0.1)
        before = fit.error
        fit.step()  # with which the kind of sweep is chosen, for the next eight
        with counted_waits() as waited:
            for _ in range(5):
                fit.step()
    assert fit.error < before and fit.n_dead == 0
    assert waited.total() <= 5 * 3
