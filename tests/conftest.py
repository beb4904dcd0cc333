"""Fixtures that the whole suite shares. Models are made once; a test that changes one makes its own."""

import os
import signal
from pydoc_data.topics import topics

# Servers of the tests are on this machine, whatever a shell says of the network beyond it.
os.environ.update({"NO_PROXY": "*", "no_proxy": "*", "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"})

import pytest
import torch

from tests import models_zoo
from tests.stand_ins import CheckedMonkeyPatch

# Side by side, workers share the cores.
ALL_THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else torch.get_num_threads()
THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))


# Fixtures that take seconds, by the files of the tests that share them.
LONG = {
    "test_clusterings.py": "two_views",
    "test_many_prompts.py": "alone",
    "test_model_comparison.py": "found",
    "test_novelty.py": "found",
    "test_steering.py": "found",
    "test_steps.py": "found",
}


def pytest_collection_modifyitems(items):
    for item in items:
        in_browser = "browser" in item.fixturenames and not item.get_closest_marker("quick")
        takes_long = "smol" in item.fixturenames or LONG.get(item.path.name) in item.fixturenames
        if takes_long or in_browser or _is_of_a_variation(item):
            item.add_marker("slow")


def _is_of_a_variation(item) -> bool:
    """Whether a test is of an architecture that is put together like another of the zoo."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    parts = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
    return any(isinstance(part, str) and part in models_zoo.VARIATIONS for part in parts)


@pytest.fixture(scope="session", autouse=True)
def _interruptible():
    """A script's background job starts with SIGINT ignored, and some tests interrupt themselves."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    """One thread for tiny models, which are slower with more (several times so where cores are shared)."""
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _threads(request):
    """All threads for the real model."""
    torch.set_num_threads(ALL_THREADS if "smol" in request.fixturenames else THREADS)


@pytest.fixture
def monkeypatch():
    """pytest's, which lets no stub have another shape than the function that it replaces."""
    patch = CheckedMonkeyPatch()
    yield patch
    patch.undo()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return models_zoo.make_tokenizer()


@pytest.fixture(scope="session")
def tiny_texts() -> list[str]:
    """Twelve English documents of different lengths, most of them longer than a tiny model's context."""
    paragraphs = [p for p in topics["assert"].split("\n\n") + topics["booleans"].split("\n\n") if len(p) > 20]
    return paragraphs[:12]


@pytest.fixture(scope="session")
def tiny_bridge():
    return models_zoo.make_model("llama", "SAETransformerBridge")


@pytest.fixture(scope="session")
def tiny_hooked():
    return models_zoo.make_model("llama", "HookedSAETransformer")


@pytest.fixture(scope="session")
def tiny_gpt2_bridge():
    return models_zoo.make_model("gpt2", "SAETransformerBridge")


@pytest.fixture(scope="session")
def tiny_gpt2_hooked():
    return models_zoo.make_model("gpt2", "HookedSAETransformer")


@pytest.fixture(scope="session")
def smol():
    """The small real model; loading takes seconds, so only behaviour that random weights cannot show is tested on
    it.
    """
    from saelens_ext.demo.packaged import load_demo_model

    return load_demo_model()


@pytest.fixture(scope="module")
def cluster():
    """A Ray of two workers on this machine."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    yield
    ray.shutdown()
