"""What the page's script works on: every SNMF feature of every level as plain JSON, texts as indices into one
vocabulary.

Symbols
    f   number of a feature over all levels, the finest level first: rows of every list
    v   index into ``vocabulary``; the commonest tokens have the smallest
Figures that do not exist are null.
"""

from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from sae_lens import SAE
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from saelens_ext._files import json_safe
from saelens_ext.analysis.examples import Examples
from saelens_ext.analysis.logit_lens import LensResult
from saelens_ext.analysis.neuron_overlap import neuron_overlap
from saelens_ext.dictionaries.hierarchy import HierarchicalSNMF
from saelens_ext.dictionaries.snmf import SNMFDictionary
from saelens_ext.host.tokens import token_strings
from saelens_ext.ops.precision import wide
from saelens_ext.report.dictionary.regions import (
    Vocabulary,
    example_columns,
    label_column,
    lens_columns,
    map_columns,
    token_ids,
)
from saelens_ext.report.dictionary.snmf_section import ProfiledDictionary, SNMFSection
from saelens_ext.report.format import visible
from saelens_ext.report.projection import project
from saelens_ext.steering.steer_features import SteeredFeatures

Table = TypeVar("Table", Examples, LensResult)

MAX_NEURONS = 40
"""Neurons listed per feature, the heaviest; the page says how many there are in all."""
N_OVERLAPS = 6
"""Features listed with which a feature shares most neurons."""


def feature_data(section: SNMFSection, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Everything the page shows of the features of a section's dictionaries, JSON-safe."""
    levels = section.levels
    vocabulary = Vocabulary(ids for level in levels for ids in token_ids(level.profile.top, level.lens))
    sizes = [level.dictionary.cfg.d_sae for level in levels]
    starts = [sum(sizes[:number]) for number in range(len(levels))]
    data: dict[str, Any] = {
        "n_profiled": levels[0].profile.n_activations,
        "context": [level.profile.context for level in levels],
        "width": levels[0].dictionary.cfg.d_in,
        "sizes": sizes,
        "level": [number for number, size in enumerate(sizes) for _ in range(size)],
        "index": [index for size in sizes for index in range(size)],
        "vocabulary": token_strings(tokenizer, vocabulary.token_ids),
    }
    columns = [
        latent_columns(level, vocabulary)
        | {"n_neurons": level.dictionary.support.sum(dim=1).tolist(), "overlaps": _overlaps(level.dictionary, start)}
        | _neurons(level.dictionary)
        for level, start in zip(levels, starts, strict=True)
    ]
    data |= {name: [row for level in columns for row in level[name]] for name in columns[0]}
    data |= latent_map(levels[0].dictionary)
    data |= _tree_columns(section.hierarchy, starts, sum(sizes))
    data["steered"] = _steered(section.steered, sum(sizes))
    return data


def latent_columns(
    level: ProfiledDictionary, vocabulary: Vocabulary, rows: Tensor | None = None
) -> dict[str, list[Any]]:
    """The columns that the latents of any dictionary have; ``rows`` are those shown, all by default."""
    profile = level.profile
    rows = torch.arange(profile.d_sae) if rows is None else rows
    examples = example_columns(of_rows(profile.top, rows), vocabulary)
    labels = label_column(level.labels, rows.tolist())
    return {
        "labels": [None] * len(rows) if labels is None else labels,
        "members": profile.counts[rows].tolist(),
        "firing": json_safe(profile.counts[rows].double() / max(1, profile.n_activations), 6),
        "activity": json_safe(activity_fractions(level)[rows], 6),
        "largest": json_safe(profile.max_activation[rows], 6),
        "examples": examples,
        "top_token": [columns["tokens"][0][columns["mark"][0]] if columns["tokens"] else None for columns in examples],
        **_lens(None if level.lens is None else of_rows(level.lens, rows), len(rows), vocabulary),
    }


def of_rows(table: Table, rows: Tensor) -> Table:
    """The rows of every tensor of a dataclass."""
    columns = {field.name: getattr(table, field.name) for field in fields(table)}
    return replace(table, **{name: column[rows] for name, column in columns.items() if isinstance(column, Tensor)})


def latent_map(dictionary: SAE[Any], rows: Tensor | None = None) -> dict[str, Any]:
    """The map of a dictionary's directions."""
    directions = torch.nn.functional.normalize(dictionary.W_dec.detach().float().cpu(), dim=1)
    return map_columns(project((directions if rows is None else directions[rows]).double().numpy(), "directions"))


def activity_fractions(level: ProfiledDictionary) -> Tensor:
    """Each feature's fraction of all that the features write: sum of its codes times its length; ``(k,)``."""
    profile = level.profile
    lengths = torch.linalg.vector_norm(wide(level.dictionary.W_dec.detach()).cpu(), dim=1)
    written = profile.counts.double() * profile.mean_activation.double() * lengths
    return written / written.sum().clamp_min(torch.finfo(torch.float64).tiny)


def _neurons(dictionary: SNMFDictionary) -> dict[str, list[Any]]:
    """The heaviest neurons of each feature and their weights in the feature at unit length."""
    units = torch.nn.functional.normalize(dictionary.W_dec.detach().float().cpu(), dim=1)
    found = [dictionary.neurons(feature, MAX_NEURONS).indices for feature in range(len(units))]
    return {
        "neurons": [indices.tolist() for indices in found],
        "weights": [
            [round(value, 4) for value in row[indices].tolist()] for row, indices in zip(units, found, strict=True)
        ],
    }


def _lens(lens: LensResult | None, k: int, vocabulary: Vocabulary) -> dict[str, list[Any]]:
    if lens is not None:
        return lens_columns(lens, vocabulary)
    return {name: [None] * k for name in ("promoted", "promoted_logits", "suppressed", "suppressed_logits")}


def _overlaps(dictionary: SNMFDictionary, start: int) -> list[list[dict[str, Any]]]:
    """For each feature the others of its level that share most neurons with it, the least likely by chance first."""
    if dictionary.cfg.d_sae < 2:
        return [[]]
    table = neuron_overlap(dictionary.W_dec.detach())
    columns = {"shared": table.overlap, "same_sign": table.same_sign, "expected": table.expected}
    columns |= {"p": table.p_value, "q": table.p_adjusted}
    found: list[list[dict[str, Any]]] = []
    rows = zip(table.overlap.tolist(), table.p_value.tolist(), strict=True)
    for i, (shared, p_values) in enumerate(rows):
        others = (j for j, n in enumerate(shared) if j != i and n > 0)
        best = sorted(others, key=lambda j, p=p_values, n=shared: (p[j], -n[j], j))[:N_OVERLAPS]
        pairs = [{name: column[i, j] for name, column in columns.items()} | {"feature": start + j} for j in best]
        found.append(json_safe(pairs, 4))
    return found


def _tree_columns(hierarchy: HierarchicalSNMF | None, starts: list[int], n: int) -> dict[str, list[Any]]:
    """For each feature the coarser ones it is part of and the finer ones it gathers, each as [f, weight]."""
    parents: list[list[list[Any]]] = [[] for _ in range(n)]
    children: list[list[list[Any]]] = [[] for _ in range(n)]
    trees = [] if hierarchy is None else [hierarchy.trees(level) for level in range(1, len(starts))]
    for level, nodes in enumerate(trees, 1):
        for node in nodes:
            own = starts[level] + node.feature
            children[own] = [[starts[level - 1] + child.feature, json_safe(child.weight, 4)] for child in node.children]
            for child, weight in children[own]:
                parents[child].append([own, weight])
    for row in parents:
        row.sort(key=lambda pair: (-pair[1], pair[0]))
    return {"parents": parents, "children": children}


def _steered(steered: SteeredFeatures | None, n: int) -> dict[str, Any] | None:
    if steered is None:
        return None
    texts: list[list[dict[str, Any]]] = [[] for _ in range(n)]
    for one in steered.texts:
        strength = one.strength
        texts[one.feature].append(
            {
                "sign": strength.sign,
                "coefficient": json_safe(strength.coefficient, 4),
                "kl": json_safe(strength.kl, 4),
                "text": None if one.text is None else visible(one.text),
            }
        )
    return {
        "prompt": visible(steered.prompt),
        "target": steered.target,
        "hook": steered.hook_name,
        "unsteered": visible(steered.unsteered),
        "texts": texts,
    }
