"""Where the regions of a fine partition go in coarser ones.

Symbols
    majority  the coarse region that holds most members of a fine one
    share     of a fine region's members that lie in its majority, in (0, 1]
    expected  the same where the coarse labels are permuted over activations: what the sizes of regions alone give
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import pandas as pd
from sae_lens import SAE
from scipy.sparse import coo_array
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.activations.stream import ActivationStream
from saelens_ext.dictionaries.fit_result import ExemplarFitResult
from saelens_ext.evals.baselines import random_activations
from saelens_ext.evals.checkpoints.checkpoints import strongest_latents
from saelens_ext.evals.evidence import Evidence, evidence_table
from saelens_ext.evals.replicas import read_all
from saelens_ext.ops.modes import standard_modes
from saelens_ext.ops.spherical import assign_nearest
from saelens_ext.report.evidence_section import EvidenceTable

COARSER, RANDOM, PERMUTED = "coarser partition", "random activations", "permuted labels"
_SHOWN = 30


@dataclass(kw_only=True, eq=False)
class NestingEvidence(Evidence):
    """How far fine regions lie within single regions of coarser partitions; a unit is a document."""

    kind: ClassVar[str] = "nesting"
    title: ClassVar[str] = "Nesting"
    question: ClassVar[str] = "Do fine regions lie within single regions of coarser partitions?"
    unit: ClassVar[str] = "document"
    unit_text: ClassVar[str] = (
        "A unit is a document. Kept together is the share of its activations in the coarse region that holds most of "
        "their fine one; above chance: minus that with permuted labels. Which region that is, all documents together "
        "say. Any two divisions of one space agree beyond permuted labels; whether the coarser partition holds fine "
        "regions together is asked against regions around as many random activations."
    )
    groups: ClassVar[tuple[str, ...]] = ("pair",)
    metrics: ClassVar[dict[str, str]] = {
        "above_chance": "share kept together, above chance",
        "share": "share kept together",
    }
    chance: ClassVar[float | None] = 0.0
    bounds: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    other_bounds: ClassVar[Mapping[str, tuple[float, float]]] = {"share": (0.0, 1.0)}

    regions: pd.DataFrame = field(default_factory=pd.DataFrame)
    """One row per pair and region of the finer partition that holds an activation: "fine", "coarse", "region",
    "members", "majority" (a region of the coarser partition), "share", "expected" and "p": how often permuted labels
    give as large a share, (1 + #) / (n_shuffles + 1). A region of one member has share and p of 1.
    """

    def chain(self) -> pd.DataFrame:
        """Where each region of the finest partition goes, from partition to partition.

        Returns:
            One row per region, the largest first: "region", "members", for each coarser partition the majority and the
            "share of" it, and "stepwise": whether going from each partition to the next leads to the same regions.
        """
        names = self.settings["partitions"]
        found = {key: table.set_index("region") for key, table in self.regions.groupby(["fine", "coarse"], sort=False)}
        direct = [found[names[0], name] for name in names[1:]]
        chain = direct[0][["members"]].copy()
        at, same = chain.index.to_numpy(), np.ones(len(chain), dtype=bool)
        for (finer, name), table in zip(pairwise(names), direct):
            chain[name], chain[f"share of {name}"] = table["majority"], table["share"]
            at = found[finer, name]["majority"].loc[at].to_numpy()
            same &= at == table["majority"].to_numpy()
        chain = chain.assign(stepwise=same).sort_values("members", ascending=False, kind="stable")
        return chain.reset_index()

    def verdict(self, reference: str | None = None) -> str:
        """How much of each finer partition is kept together by each coarser one, and by what it is compared with.

        Args:
            reference: as for :meth:`comparisons`.
        """
        shares = self.summary(metric="share").set_index(["pair", "method"])["estimate"]
        lines = [
            f"{pair}: {own[COARSER]:.0%} of a document's activations lie in the coarse region that holds most of their "
            f"fine one; {own[RANDOM]:.0%} with as many random activations, {own[PERMUTED]:.0%} with permuted labels."
            for pair, own in shares.groupby(level="pair", sort=False)
            for own in [own.droplevel("pair")]
        ]
        if len(self.settings["partitions"]) > 2:
            chain = self.chain()
            lines.append(f"{chain['stepwise'].mean():.0%} of the finest regions go the same way step by step.")
        return "\n".join([*lines, super().verdict(reference)])

    def _tables(self, *standard: EvidenceTable) -> tuple[EvidenceTable, ...]:
        """Behind where the largest regions go."""
        largest = self.regions.sort_values("members", ascending=False, kind="stable")
        notes = (
            f"The {_SHOWN} largest of {len(largest)} rows. Share: of the fine region's members in the coarse region "
            "that holds most of them; expected: with permuted labels, and p how often these give as much.",
            f"The {_SHOWN} largest regions of the finest partition. Stepwise: whether going from each partition to the "
            "next leads to the same regions.",
        )
        parts = zip(("Where fine regions go", "From partition to partition"), (largest, self.chain()), notes)
        return *(evidence_table(title, table.head(_SHOWN), note) for title, table, note in parts), *standard


class _Majorities(NamedTuple):
    """Per fine region, 0 where it has no member."""

    region: np.ndarray
    count: np.ndarray


@standard_modes(gradients=False)
def partition_nesting(
    partitions: Mapping[str, SAE[Any] | ExemplarFitResult],
    source: ActivationStream | Tensor,
    *,
    document_ids: Tensor | None = None,
    n_shuffles: int = 99,
    n_random: int = 3,
    n_bootstrap: int = 2000,
    n_permutations: int = 10_000,
    confidence: float | int = 0.95,
    seed: int = 0,
) -> NestingEvidence:
    """Find where the regions of each partition go in every coarser one.

    Partitions at several thresholds are built apart, so a fine region need not lie within a coarse one. Every
    activation is assigned by all of them: for each fine region, which coarse region holds most of its members, and how
    many. Two things give such shares without any nesting: large coarse regions (labels permuted over activations tell
    how much), and that all partitions divide one space (regions around as many random activations, from the same
    centre, tell).

    Memory: the activations, and a label per partition.

    Args:
        partitions: at least 2 by name, of one hook; the more regions, the finer. Of a dictionary without regions, an
            activation belongs to the latent with the largest code.
        source: the activations to assign: a stream, or ``(n, d)``. Best others than the partitions were fitted to.
        document_ids: the document of each row of a matrix, integers ``(n,)``; None: each is one of its own.
        n_shuffles: permutations of labels, at least 1.
        n_random: draws of random activations, at least 1.
        n_bootstrap: redraws of documents.
        n_permutations: assignments of signs in the test against random activations.
        confidence: of the intervals, in (0, 1).
        seed: of everything random.

    Raises:
        ValueError: fewer than 2 partitions, activations of another width, or a number below 1.

    Examples:
        >>> fits = sx.fit_exemplar_partitions(stream, percentiles=(10, 40))
        >>> found = sx.partition_nesting({f"p{p}": fit for (_, p), fit in fits.items()}, stream, n_shuffles=9)
        >>> found.chain()["share of p40"].between(0, 1).all()
        np.True_

    Source: ours; arXiv 2605.14347 calls percentiles resolutions, and does not ask whether they nest.
    """
    if len(partitions) < 2:
        raise ValueError(f"partitions must be at least 2 by name, got {len(partitions)}: nesting takes a coarser one.")
    for name, value in (("n_shuffles", n_shuffles), ("n_random", n_random), ("n_bootstrap", n_bootstrap)):
        _checks.positive(value, name)
    _checks.between(confidence, 0, 1, "confidence")
    given = {name: one.dictionary if isinstance(one, ExemplarFitResult) else one for name, one in partitions.items()}
    saes = dict(sorted(given.items(), key=lambda item: -int(item[1].cfg.d_sae)))
    x, documents, _ = read_all(source, document_ids)
    for name, sae in saes.items():
        _checks.width(x, sae.cfg.d_in, f"Partition {name}")
    labels = {name: strongest_latents(sae, x).numpy() for name, sae in saes.items()}
    cells, tables = [], []
    for number, (fine, coarse) in enumerate(combinations(saes, 2)):
        generator = np.random.default_rng([seed, number])
        controls = [_random_labels(saes[coarse], labels[coarse], x, seed, draw) for draw in range(n_random)]
        own = [_values(labels[fine], other, n_shuffles, generator) for other in (labels[coarse], *controls)]
        columns = {
            (COARSER, "share"): own[0][0], (COARSER, "above_chance"): own[0][0] - own[0][1],
            (RANDOM, "share"): np.mean([kept for kept, *_ in own[1:]], axis=0),
            (RANDOM, "above_chance"): np.mean([kept - chance for kept, chance, _ in own[1:]], axis=0),
            (PERMUTED, "share"): own[0][1],
        }  # fmt: skip
        for (method, metric), values in columns.items():
            means = pd.Series(values).groupby(documents.numpy()).mean()
            where = {"pair": f"{fine} in {coarse}", "method": method, "metric": metric}
            cells.append(pd.DataFrame({**where, "document": means.index, "value": means.to_numpy()}))
        tables.append(own[0][2].assign(fine=fine, coarse=coarse))
    first = ["fine", "coarse", "region", "members"]
    regions = pd.concat(tables, ignore_index=True)
    return NestingEvidence(
        cells=pd.concat(cells, ignore_index=True),
        kinds={COARSER: "unsupervised", RANDOM: "control", PERMUTED: "control"},
        descriptions={
            COARSER: "The region of the coarser partition that holds most members of a fine region.",
            RANDOM: f"The same with regions around as many activations drawn at random, the mean of {n_random} draws.",
            PERMUTED: "The same with the labels of the coarser partition permuted over activations.",
        },
        settings={
            "partitions": list(saes), "n_regions": [int(sae.cfg.d_sae) for sae in saes.values()],
            "n_activations": len(x), "n_documents": int(documents.max()) + 1, "n_shuffles": n_shuffles,
            "n_random": n_random, "n_bootstrap": n_bootstrap, "n_permutations": n_permutations,
            "confidence": confidence, "seed": seed,
        },
        regions=regions[[*first, *(name for name in regions.columns if name not in first)]],
    )  # fmt: skip


def _random_labels(sae: SAE[Any], labels: np.ndarray, x: Tensor, seed: int, draw: int) -> np.ndarray:
    """The nearest of as many random activations as a partition has regions with members, from its centre."""
    center = sae.b_dec.detach()
    drawn = random_activations(x.to(center), len(np.unique(labels)), "", center=center, seed=seed, draw=draw)
    return assign_nearest(x.to(center), center, cast(Tensor, drawn.directions))[0].cpu().numpy()


def _values(
    fine: np.ndarray, coarse: np.ndarray, n_shuffles: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    """Per activation whether it lies in the majority of its fine region, and how often by chance; per region both."""
    found, members = _majorities(fine, coarse), np.bincount(fine)
    null = np.stack([_majorities(fine, generator.permutation(coarse)).count for _ in range(n_shuffles)])
    shares, expected = (counts / np.maximum(members, 1) for counts in (found.count, null.mean(axis=0)))
    p = (1 + (null >= found.count).sum(axis=0)) / (n_shuffles + 1)
    alive = members.nonzero()[0]
    columns = {"majority": found.region, "share": shares, "expected": expected, "p": p, "members": members}
    table = pd.DataFrame({"region": alive} | {name: column[alive] for name, column in columns.items()})
    return (coarse == found.region[fine]).astype(np.float64), expected[fine], table


def _majorities(fine: np.ndarray, coarse: np.ndarray) -> _Majorities:
    """The coarse region, the first of equals, that holds most members of each fine one, and how many."""
    counts: Any = coo_array((np.ones(len(fine), dtype=np.int64), (fine, coarse))).tocsr()
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    order = np.lexsort((counts.indices, -counts.data, rows))
    first = order[np.searchsorted(rows, np.arange(counts.shape[0])).clip(max=len(order) - 1)]
    alive = np.diff(counts.indptr) > 0
    return _Majorities(*(np.where(alive, column[first], 0) for column in (counts.indices, counts.data)))
