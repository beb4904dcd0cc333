"""What the sources of one step do to the candidates of a later one: modes from those sources, and steering along them.

Symbols
    j        the step whose candidates are explained, from 2
    i        the step whose tokens are the sources, below j; 0 is the prompt
    columns  of the signatures over the whole prefix of step j; those at the positions of step i are its own
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sae_lens import SAE

from saelens_ext.continuations.attribution.attribute import attribute_continuations
from saelens_ext.continuations.audit_stages.config import AuditConfig
from saelens_ext.continuations.audit_stages.stages import choose_clustering
from saelens_ext.continuations.continuation_set import ContinuationSet
from saelens_ext.continuations.embed import embed_continuations, visible_rows
from saelens_ext.continuations.step_tree import StepTree
from saelens_ext.continuations.validation.findings import MEASURE, STATISTIC
from saelens_ext.continuations.validation.statistics import member_statistics
from saelens_ext.continuations.validation.validate import validate_clusters
from saelens_ext.host.models import HostModel

OWN = "the step's own tokens"
ELSEWHERE = "as many tokens elsewhere"
MOVED = "the step moved elsewhere"
PLACE = "other tokens at the step's place"
ALL = "the whole prefix"
ANOTHER, RANDOM, NOTHING = "another mode", "random features", "no steering"
DESCRIPTIONS = {
    OWN: "Modes and directions from the sources at the tokens of the step.",
    ELSEWHERE: "The same from a run of as many tokens that is not in the step: of other steps, or else of the prompt.",
    MOVED: "The same from the tokens of the step, in a prefix whose steps stand in another order.",
    PLACE: "The same from the tokens that stand at the step's place, as far from the candidates, in that other order.",
    ALL: "The same from all sources of the prefix, for every step alike.",
    ANOTHER: "Modes from the step's own tokens, and the direction of another mode.",
    RANDOM: "Modes from the step's own tokens, and random latents at the same hooks and positions.",
    NOTHING: "The model left alone, so that every slope is 0.",
}
_OF_VALIDATION = {"joint": OWN, "wrong_cluster": ANOTHER, "random_features": RANDOM}


@dataclass(frozen=True, kw_only=True)
class Target:
    """The candidates of step j, attributed to the whole prefix in its own order and, from 3 on, in another."""

    number: int
    """j."""
    rows: ContinuationSet
    spans: tuple[tuple[int, int], ...]
    """Of the prompt and of the steps before j."""
    shuffled: ContinuationSet | None
    moved: tuple[tuple[int, int], ...]
    """Where the prompt and each of those steps stand in the other order."""

    def columns(self, span: tuple[int, int], rows: ContinuationSet | None = None) -> list[int]:
        """Columns of the signatures at the positions of a span."""
        sources = (self.rows if rows is None else rows).sources
        assert sources is not None
        return [column for column, position in enumerate(sources.positions) if span[0] <= position < span[1]]


def read_target(
    model: HostModel,
    saes: Sequence[SAE[Any]],
    tree: StepTree,
    number: int,
    embedder: Any,
    config: AuditConfig,
) -> Target:
    """Embed the candidates of a step and attribute them."""
    rows = tree.steps[number - 1].with_weights(config.weights)
    seen = visible_rows(rows, embedder)
    if int(seen.sum()) < 2:
        raise ValueError(f"Step {number} has {int(seen.sum())} candidates with visible text; two are needed.")
    rows = embed_continuations(rows.select(seen), embedder, mode=config.embedding, **config.per_pass)
    options: dict[str, Any] = {"backend": config.backend, "max_sources": config.max_sources, **config.per_pass}
    spans, shuffled, moved = tree.spans[:number], None, ()
    if number > 2:
        order = _derangement(number - 1, np.random.default_rng([config.seed, number]))
        blocks = [list(tree.prompt_ids), *(tree.ids_of(step) for step in order)]
        texts = [tree.steps[0].prefix, *(tree.texts[step] for step in order)]
        ends = np.cumsum([len(block) for block in blocks]).tolist()
        places = {step + 1: (ends[place], ends[place + 1]) for place, step in enumerate(order)}
        moved = (spans[0], *(places[step] for step in range(1, number)))
        other = replace(rows, prefix="".join(texts), prefix_ids=tuple(token for block in blocks for token in block))
        shuffled = attribute_continuations(model, saes, other, **options)
    rows = attribute_continuations(model, saes, rows, **options)
    return Target(number=number, rows=rows, spans=spans, shuffled=shuffled, moved=moved)


def _derangement(n: int, generator: np.random.Generator) -> list[int]:
    """An order of n >= 2 things in which none stands where it stood."""
    while True:
        order = generator.permutation(n)
        if (order != np.arange(n)).all():
            return order.tolist()


def elsewhere(spans: Sequence[tuple[int, int]], source: int, generator: np.random.Generator) -> tuple[int, int] | None:
    """A run of as many tokens as a span, outside of it: within the steps, or else in the prompt; None for no room."""
    start, end = spans[source]
    n, first = end - start, spans[1][0] if len(spans) > 1 else spans[0][1]
    for low, high in ((first, spans[-1][1]), (0, first)):
        starts = [s for s in range(low, high - n + 1) if s + n <= start or s >= end]
        if starts:
            chosen = int(generator.choice(starts))
            return chosen, chosen + n
    return None


def measure_columns(
    model: HostModel, saes: Sequence[SAE[Any]], rows: ContinuationSet, columns: Sequence[int], config: AuditConfig
) -> dict[str, float]:
    """Cluster by some columns of the signatures, steer along the modes; the slopes by method, modes and stability.

    Raises:
        ValueError: no source with an effect there, or no modes that can be tested.
    """
    assert rows.signatures is not None and rows.sources is not None
    part = rows.signatures[:, list(columns)]
    if not columns or not bool((part != 0).any()):
        raise ValueError("no source there has an effect on the candidates")
    if "latent" not in (kinds := set(rows.sources.select(columns).kinds)):
        raise ValueError(f"the sources there are of the kinds {', '.join(sorted(kinds))}, none of which can be steered")
    own = rows.with_signatures(part, rows.sources.select(columns))
    found = choose_clustering(own, config)
    if found.not_validated:
        raise ValueError(found.not_validated)
    options = config.validation_options()
    members = validate_clusters(model, saes, own, found.clusterer, options, **config.per_pass).members
    table = member_statistics(members[members["measure"] == MEASURE])
    slopes = table.groupby("method")[STATISTIC].mean()
    values = {name: float(slopes.get(method, np.nan)) for method, name in _OF_VALIDATION.items()}
    return values | {"n_modes": float(found.clusterer.n_clusters_), "stability": found.stability[0]}


def measure_pair(
    model: HostModel, saes: Sequence[SAE[Any]], target: Target, source: int, config: AuditConfig
) -> tuple[dict[tuple[str, str], float], dict[str, str]]:
    """Values of one pair of source and target by method and metric, and why others are missing, by method."""
    found: dict[tuple[str, str], float] = {(NOTHING, "slope"): 0.0}
    failed: dict[str, str] = {}
    generator = np.random.default_rng([config.seed, target.number, source])
    span = target.spans[source]
    other = elsewhere(target.spans, source, generator)
    tried = {OWN: (target.rows, target.columns(span))}
    if other is not None:
        tried[ELSEWHERE] = target.rows, target.columns(other)
    if target.shuffled is not None and source:
        tried[MOVED] = target.shuffled, target.columns(target.moved[source], target.shuffled)
        tried[PLACE] = target.shuffled, target.columns(span, target.shuffled)
    for method, (rows, columns) in tried.items():
        try:
            values = measure_columns(model, saes, rows, columns, config)
        except ValueError as error:
            failed[method] = str(error)
            continue
        if method == OWN:
            found |= {(name, "slope"): values[name] for name in _OF_VALIDATION.values()}
            found |= {(OWN, name): values[name] for name in ("n_modes", "stability")}
        else:
            found[method, "slope"] = values[OWN]
    found[OWN, "attribution_share"] = share_of(target.rows, target.columns(span))
    return {key: value for key, value in found.items() if np.isfinite(value)}, failed


def share_of(rows: ContinuationSet, columns: Sequence[int]) -> float:
    """The fraction of the absolute effect of all columns that some of them have."""
    assert rows.signatures is not None
    strength = rows.signatures.double().abs().sum(dim=0)
    return float(strength[torch.tensor(list(columns), dtype=torch.long)].sum()) / (float(strength.sum()) or 1.0)
