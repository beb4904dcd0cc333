"""A pass spread over a cluster of two nodes, of which one is lost on the way."""

from tempfile import TemporaryDirectory

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from saelens_ext.activations.ray_stream import RayActivationStream
from saelens_ext.activations.stream import ActivationStream
from tests import models_zoo

HOOK = "blocks.1.hook_out"
OPTIONS = {"context_size": 16, "batch_size": 3, "max_tokens": 500}
NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}

pytestmark = pytest.mark.slow  # starts a cluster


def load():
    return models_zoo.make_model("llama", "SAETransformerBridge")


@pytest.fixture
def nodes(monkeypatch):
    with TemporaryDirectory(prefix="ray_") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)  # where another Ray does not find this one and join it
        cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **NODE})
        try:
            cluster.add_node(**NODE)
            ray.init(address=cluster.address, log_to_driver=False)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def where_and_what(batches):
    return ray.get_runtime_context().get_node_id(), [batch.activations[HOOK] for batch in batches]


def test_a_pass_over_two_nodes_goes_on_where_one_is_lost(nodes, tiny_texts):
    expected = [batch.activations[HOOK] for batch in ActivationStream(load(), tiny_texts, HOOK, **OPTIONS)]
    with RayActivationStream(load, tiny_texts, HOOK, n_workers=2, restarts=1, **OPTIONS) as spread:
        answers = spread.mapped(where_and_what)
        found = [next(answers), next(answers)]
        before = {node for node, _ in found}
        (other,) = nodes.worker_nodes
        nodes.remove_node(other)
        nodes.add_node(**NODE)
        found += answers
    after = {node for node, _ in found[-2:]}
    assert len(before) == len(after) == 2 and other.node_id not in after, "both nodes did a part of it"
    for mine, there in zip(expected, (one for _, batches in found for one in batches), strict=True):
        assert torch.equal(mine, there)
