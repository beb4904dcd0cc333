"""Signatures from attribution graphs that circuit-tracer made, without running what a file says.

A graph holds the direct effect of every source (transcoder latents, transcoder errors, token embeddings) on the logits
of the token that comes after its prompt. It comes as JSON (what its viewer reads) or as a ``.pt`` file. The latter is
a pickle with objects of circuit-tracer's own classes inside: it is read by torch's restricted unpickler, and every
class it names is replaced by an inert record of its arguments, so that nothing but tensors and plain values is built.

Symbols
    L, M   layers and tokens of the graph's prompt
    m, k   sources and logits of a graph
"""

import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from saelens_ext import _checks, _files
from saelens_ext.continuations.continuation_set import ContinuationSet
from saelens_ext.continuations.source_table import NO_LATENT, SourceTable
from saelens_ext.host.tokens import token_strings

_KINDS = {"cross layer transcoder": "latent", "mlp reconstruction error": "error", "embedding": "embedding"}
_PT_KEYS = ("adjacency_matrix", "active_features", "selected_features", "activation_values", "input_tokens")
_PT_KEYS += ("logit_probabilities",)

SourceKey = tuple[str, int, int, int]


@dataclass(frozen=True)
class CircuitGraph:
    """The part of an attribution graph that signatures are made of."""

    token_ids: tuple[int, ...]
    """Of the prompt, M of them."""
    keys: tuple[SourceKey, ...]
    """Kind, layer (-1 for embeddings), position and latent (-1 for other kinds) of each source."""
    activations: tuple[float, ...]
    """Of latents; 0 for other kinds."""
    effects: Tensor
    """Direct effect of each source on each logit, float32 ``(k, m)``."""
    logit_tokens: tuple[int, ...]
    """The token that each logit is of."""
    logit_probabilities: Tensor
    """``(k,)``."""


def with_graph_signatures(
    continuations: ContinuationSet,
    graphs: str | Path | CircuitGraph | Sequence[str | Path | CircuitGraph],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sources: SourceTable | None = None,
) -> ContinuationSet:
    """Give n continuations the signatures that attribution graphs hold.

    One graph, of the prefix, explains first tokens: a continuation gets the row of its first token's logit. With one
    graph per continuation, each gets the mean over its graph's logits, weighted by their probabilities.

    Args:
        graphs: one graph or n, as files (``.json`` or ``.pt``) or as :func:`read_circuit_graph` gives them.
        tokenizer: names the tokens in the table of sources; without one they read ``<id 7>``.
        sources: have exactly these columns, in this order, 0 where no graph has one; from another set with graphs.

    Returns:
        The set with ``signatures`` over all sources of the graphs that lie in the prefix, 0 where a graph lacks one,
        and ``sources``, whose ``dictionaries`` are the transcoders' layers.

    Raises:
        ValueError: another number of graphs than one or n, a graph whose prompt does not start with the prefix, or
            without a logit of a continuation's first token; ``sources`` of a kind or at a hook that
            graphs do not have, or none.
    """
    single = isinstance(graphs, (str, Path, CircuitGraph))
    read = [
        one if isinstance(one, CircuitGraph) else read_circuit_graph(one) for one in ([graphs] if single else graphs)
    ]
    n = len(continuations)
    if not single and len(read) != n:
        raise ValueError(f"graphs must be one graph of the prefix or {n}, one per continuation, got {len(read)}.")
    for graph in read:
        _check_prompt(graph, continuations)
    if single:
        rows = [(read[0], _first_token_row(read[0], continuations, i)) for i in range(n)]
    else:
        rows = [(g, (g.logit_probabilities / g.logit_probabilities.sum()) @ g.effects) for g in read]
    activations = {key: a for graph in read for key, a in zip(graph.keys, graph.activations, strict=True)}
    if sources is None:
        keys = sorted(key for key in activations if key[2] < len(continuations.prefix_ids))
    else:
        keys = _fixed_keys(sources, len(continuations.prefix_ids))
    if not keys:
        raise ValueError("The graphs have no source in the prefix.")
    place = {key: i for i, key in enumerate(keys)}
    matrix = torch.zeros(len(rows), len(keys))
    for i, (graph, row) in enumerate(rows):
        columns = [(place[key], j) for j, key in enumerate(graph.keys) if key in place]
        matrix[i, [c for c, _ in columns]] = row[[j for _, j in columns]]
    return continuations.with_signatures(matrix, _table(keys, activations, continuations.prefix_ids, tokenizer))


def read_circuit_graph(path: str | Path) -> CircuitGraph:
    """Read a graph of circuit-tracer, ``.json`` or ``.pt``; nothing in the file is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind or of an unknown form.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    suffix = _checks.choice(path.suffix, (".json", ".pt"), "The suffix of a graph's file")
    try:
        return _from_json(_files.read_json(path)) if suffix == ".json" else _from_tensors(_inert_load(path))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is no graph of circuit-tracer of a known form ({said}).") from error


# --- JSON ---


def _from_json(content: Mapping[str, Any]) -> CircuitGraph:
    nodes = {node["node_id"]: node for node in content["nodes"]}
    logits = [name for name, node in nodes.items() if node["feature_type"] == "logit"]
    sources = [name for name, node in nodes.items() if node["feature_type"] in _KINDS]
    place = {name: i for i, name in enumerate(sources)}
    row = {name: i for i, name in enumerate(logits)}
    effects = torch.zeros(len(logits), len(sources))
    for link in content["links"]:
        if link["target"] in row and link["source"] in place:
            effects[row[link["target"]], place[link["source"]]] = link["weight"]
    embeddings = {name: node for name, node in nodes.items() if node["feature_type"] == "embedding"}
    tokens = {int(node["ctx_idx"]): int(name.split("_")[1]) for name, node in embeddings.items()}
    return CircuitGraph(
        token_ids=tuple(tokens[p] for p in range(len(tokens))),
        keys=tuple(_json_key(name, nodes[name]) for name in sources),
        activations=tuple(float(nodes[name].get("activation") or 0) for name in sources),
        effects=effects,
        logit_tokens=tuple(int(nodes[name]["feature"]) for name in logits),
        logit_probabilities=torch.tensor([float(nodes[name]["token_prob"]) for name in logits]),
    )


def _json_key(name: str, node: Mapping[str, Any]) -> SourceKey:
    kind, position = _KINDS[node["feature_type"]], int(node["ctx_idx"])
    if kind == "embedding":
        return kind, -1, position, NO_LATENT
    # The node's own number pairs layer and latent into one; its name keeps them apart.
    return kind, int(node["layer"]), position, int(name.split("_")[1]) if kind == "latent" else NO_LATENT


# --- .pt ---


class _Inert:
    """Stands for any object in a foreign pickle: remembers its arguments and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        made = super().__new__(cls)
        made.arguments = args
        return made

    def __init__(self, *args: Any, **kwargs: Any):
        self.arguments: tuple[Any, ...]

    def __setstate__(self, state: Any) -> None:
        pass


def _inert_load(path: Path) -> Mapping[str, Any]:
    serialization = torch.serialization
    if not hasattr(serialization, "get_unsafe_globals_in_checkpoint"):
        raise ValueError(f"Reading {path.name} safely needs torch 2.6 or newer; export the graph as JSON instead.")
    try:
        named = serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins: list[Any] = [(type("Inert", (_Inert,), {}), name) for name in named]
        with serialization.safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read without executing what it holds ({error}). Export the graph as JSON with "
            "circuit-tracer's create_graph_files and read that."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a graph of circuit-tracer.")
    return content


def _from_tensors(content: Mapping[str, Any]) -> CircuitGraph:
    missing = [key for key in _PT_KEYS if not isinstance(content.get(key), Tensor)]
    if missing:
        raise ValueError(f"The graph lacks the tensors {', '.join(missing)}.")
    selected = content["selected_features"].tolist()
    features = content["active_features"][selected].tolist()
    tokens = content["input_tokens"].flatten().tolist()
    probabilities = content["logit_probabilities"].float()
    targets = content.get("logit_targets", content.get("logit_tokens"))
    # Latents, then one error per layer and position, then one embedding per position, then the logits.
    n_errors = len(content["adjacency_matrix"]) - len(features) - len(tokens) - len(probabilities)
    keys: list[SourceKey] = [("latent", layer, position, latent) for layer, position, latent in features]
    keys += [("error", i // len(tokens), i % len(tokens), NO_LATENT) for i in range(n_errors)]
    keys += [("embedding", -1, position, NO_LATENT) for position in range(len(tokens))]
    activations = content["activation_values"]
    values = (activations if len(activations) == len(selected) else activations[selected]).tolist()
    return CircuitGraph(
        token_ids=tuple(tokens),
        keys=tuple(keys),
        activations=(*map(float, values), *[0.0] * (len(keys) - len(values))),
        effects=content["adjacency_matrix"][-len(probabilities) :, : len(keys)].float(),
        logit_tokens=tuple(int(target.arguments[1] if isinstance(target, _Inert) else target) for target in targets),
        logit_probabilities=probabilities,
    )


# --- from graphs to rows ---


def _check_prompt(graph: CircuitGraph, continuations: ContinuationSet) -> None:
    prefix = continuations.prefix_ids
    if graph.token_ids[: len(prefix)] != prefix:
        raise ValueError(
            f"A graph's prompt starts with the tokens {list(graph.token_ids[: len(prefix)])}, the prefix is "
            f"{list(prefix)}. Make the graph with the same tokenizer and the same BOS."
        )


def _first_token_row(graph: CircuitGraph, continuations: ContinuationSet, row: int) -> Tensor:
    token = continuations.ids_of(row)[0]
    if token not in graph.logit_tokens:
        raise ValueError(
            f"The graph has no logit of token {token}, the first of continuation {row} ({continuations.texts[row]!r}). "
            "Make the graph with more logits, or leave the continuation out with .select()."
        )
    return graph.effects[graph.logit_tokens.index(token)]


def _fixed_keys(sources: SourceTable, n_prefix: int) -> list[SourceKey]:
    keys: list[SourceKey] = []
    for kind, hook, position, latent in sources.keys:
        layer = re.fullmatch(r"blocks\.(\d+)\.hook_mlp_out", hook)
        if kind not in _KINDS.values() or (layer is None) != (kind == "embedding") or not 0 <= position < n_prefix:
            raise ValueError(
                f"sources has the {kind} at {hook}, position {position}; graphs have latents and errors at "
                f"blocks.N.hook_mlp_out and embeddings, at positions 0 to {n_prefix - 1} of this prefix."
            )
        keys.append((kind, -1 if layer is None else int(layer[1]), position, latent))
    if len(set(keys)) < len(keys):
        raise ValueError("sources has a column twice; every column must be another source.")
    return keys


def _table(
    keys: Sequence[SourceKey],
    activations: Mapping[SourceKey, float],
    prefix: Sequence[int],
    tokenizer: PreTrainedTokenizerBase | None,
) -> SourceTable:
    names = [f"<id {token}>" for token in prefix] if tokenizer is None else token_strings(tokenizer, list(prefix))
    return SourceTable(
        kinds=tuple(kind for kind, *_ in keys),
        hooks=tuple("hook_embed" if layer < 0 else f"blocks.{layer}.hook_mlp_out" for _, layer, _, _ in keys),
        positions=tuple(position for _, _, position, _ in keys),
        latents=tuple(latent for *_, latent in keys),
        activations=tuple(activations.get(key, 0.0) for key in keys),
        tokens=tuple(names[position] for _, _, position, _ in keys),
        dictionaries=tuple(layer for _, layer, _, _ in keys),
    )
