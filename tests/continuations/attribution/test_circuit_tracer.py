"""Signatures from attribution graphs, and that reading one executes nothing."""

import json
import os
import pickle
import sys
from collections import namedtuple
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from saelens_ext.continuations.attribution.circuit_tracer import read_circuit_graph, with_graph_signatures
from saelens_ext.continuations.sample import score_continuations
from tests.models_zoo import make_model, make_tokenizer

# A prompt of two tokens and one layer: latents 7 and 9, an error per position, an embedding per position, two logits.
LATENTS = [[0, 0, 7], [0, 1, 9]]
EFFECTS = torch.tensor([[1.0, -2.0, 0.1, 0.2, 3.0, 4.0], [5.0, 6.0, -0.1, -0.2, 0.5, 0.7]])
PROBABILITIES = [0.75, 0.25]
TOKENS = [65, 66]


@pytest.fixture(scope="module")
def found():
    model = make_model("llama", "HookedSAETransformer")
    return score_continuations(model, "T", [[TOKENS[1], 70], [TOKENS[0]]])


@pytest.fixture
def json_graph(found, tmp_path):
    def node(name, layer, position, kind, **more):
        return {"node_id": name, "layer": str(layer), "ctx_idx": position, "feature_type": kind, "feature": 0, **more}

    nodes = [node(f"0_{j}_{p}", 0, p, "cross layer transcoder", activation=2.5) for _, p, j in LATENTS]
    nodes += [node(f"0_-1_{p}", 0, p, "mlp reconstruction error") for p in range(2)]
    nodes += [node(f"E_{token}_{p}", "E", p, "embedding") for p, token in enumerate(found.prefix_ids)]
    links = []
    for row, (token, probability) in enumerate(zip(TOKENS, PROBABILITIES)):
        name = f"2_{token}_1"
        links += [
            {"source": nodes[i]["node_id"], "target": name, "weight": float(w)} for i, w in enumerate(EFFECTS[row])
        ]
        nodes.append(node(name, 2, 1, "logit", token_prob=probability) | {"feature": token})
    links.append({"source": "E_0_0", "target": "0_7_0", "weight": 9.0})
    path = tmp_path / "graph.json"
    path.write_text(json.dumps({"metadata": {}, "nodes": nodes, "links": links}))
    return path


@pytest.fixture
def foreign(monkeypatch):
    """Classes of a library that is gone when the file is read."""
    module = ModuleType("a_foreign_library")
    module.LogitTarget = namedtuple("LogitTarget", ["token_str", "vocab_idx"], module=module.__name__)
    module.Config = type("Config", (), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def pt_content(found, foreign):
    adjacency = torch.zeros(8, 8)
    adjacency[6:, :6] = EFFECTS
    config = foreign.Config()
    config.n_layers, config.dtype = 1, torch.float32
    return {
        "input_string": "T",
        "adjacency_matrix": adjacency,
        "cfg": config,
        "scan_name": None,
        "vocab_size": 320,
        "active_features": torch.tensor([[0, 0, 3], *LATENTS]),
        "selected_features": torch.tensor([1, 2]),
        "activation_values": torch.tensor([9.0, 2.5, 2.5]),
        "input_tokens": torch.tensor(found.prefix_ids),
        "logit_targets": [foreign.LogitTarget("x", token) for token in TOKENS],
        "logit_probabilities": torch.tensor(PROBABILITIES),
    }


@pytest.fixture
def pt_graph(found, foreign, tmp_path):
    torch.save(pt_content(found, foreign), tmp_path / "graph.pt")
    del sys.modules[foreign.__name__]
    return tmp_path / "graph.pt"


@pytest.mark.parametrize("form", ["json_graph", "pt_graph"])
def test_one_graph_explains_first_tokens(found, form, request):
    made = with_graph_signatures(found, request.getfixturevalue(form), tokenizer=make_tokenizer())
    table = made.sources
    column = {(k, p, j): i for i, (k, p, j) in enumerate(zip(table.kinds, table.positions, table.latents))}
    order = [
        ("latent", 0, 7),
        ("latent", 1, 9),
        ("error", 0, -1),
        ("error", 1, -1),
        ("embedding", 0, -1),
        ("embedding", 1, -1),
    ]
    assert sorted(column) == sorted(order)
    torch.testing.assert_close(made.signatures[:, [column[key] for key in order]], EFFECTS[[1, 0]])
    assert table.activations[column["latent", 0, 7]] == 2.5 and table.tokens[column["latent", 1, 9]] == "T"
    assert table.hooks[column["latent", 0, 7]] == "blocks.0.hook_mlp_out"


@pytest.mark.parametrize("form", ["json_graph", "pt_graph"])
def test_one_graph_each_is_averaged_over_its_logits(found, form, request):
    graph = read_circuit_graph(request.getfixturevalue(form))
    made = with_graph_signatures(found, [graph, graph])
    expected = torch.tensor(PROBABILITIES) @ EFFECTS
    assert sorted(made.signatures[0].tolist()) == pytest.approx(sorted(expected.tolist()))
    assert torch.equal(made.signatures[0], made.signatures[1])


def test_graphs_that_do_not_belong_to_the_set(found, json_graph):
    graph = read_circuit_graph(json_graph)
    with pytest.raises(ValueError, match="starts with the tokens"):
        with_graph_signatures(type(found)(**{**vars(found), "prefix_ids": (0, 5)}), graph)
    with pytest.raises(ValueError, match="one graph of the prefix or 2"):
        with_graph_signatures(found, [graph])
    model = make_model("llama", "HookedSAETransformer")
    with pytest.raises(ValueError, match="no logit of token 99"):
        with_graph_signatures(score_continuations(model, "T", [[99]]), graph)


class Intruder:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("plain", [True, False])
def test_a_file_cannot_run_anything(found, foreign, tmp_path, plain):
    mark, path = tmp_path / "ran", tmp_path / "graph.pt"
    if plain:
        path.write_bytes(pickle.dumps({"adjacency_matrix": Intruder(mark)}))
    else:
        torch.save(pt_content(found, foreign) | {"adjacency_matrix": Intruder(mark)}, path)
    with pytest.raises(ValueError, match="JSON|lacks the tensors"):
        read_circuit_graph(path)
    assert not mark.exists()


def test_files_that_are_no_graphs(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_circuit_graph(tmp_path / "none.json")
    (tmp_path / "other.json").write_text('{"nodes": []}')
    with pytest.raises(ValueError, match="known form"):
        read_circuit_graph(tmp_path / "other.json")
    (tmp_path / "graph.npz").write_text("")
    with pytest.raises(ValueError, match="suffix"):
        read_circuit_graph(tmp_path / "graph.npz")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        read_circuit_graph(tmp_path / "list.pt")


def test_fixed_sources_of_graphs(found, json_graph):
    own = with_graph_signatures(found, json_graph)
    again = with_graph_signatures(found, json_graph, sources=own.sources)
    assert again.sources == own.sources and torch.equal(again.signatures, own.signatures)
    table = own.sources.select([3, 0])
    other = replace(table, latents=(table.latents[0], 5), kinds=(table.kinds[0], "latent"))
    other = replace(other, hooks=(table.hooks[0], "blocks.4.hook_mlp_out"))
    found_there = with_graph_signatures(found, json_graph, sources=other)
    assert torch.equal(found_there.signatures[:, 0], own.signatures[:, 3]) and not found_there.signatures[:, 1].any()
    assert found_there.sources.activations[1] == 0.0
    mlps = replace(table, kinds=("mlp", "mlp"), hooks=("blocks.0.hook_mlp_out",) * 2, positions=(0, 1))
    with pytest.raises(ValueError, match="the mlp at blocks.0.hook_mlp_out, position 0; graphs have latents"):
        with_graph_signatures(found, json_graph, sources=mlps)
    with pytest.raises(ValueError, match="column twice"):
        with_graph_signatures(found, json_graph, sources=own.sources.select([0, 0]))
