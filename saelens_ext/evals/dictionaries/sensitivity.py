"""What hangs on the threshold of a partition: outcomes against the percentile, and against the factor of a stated rule.

Symbols
    resolution  a percentile of the pairwise distances, or a factor of the median distance to the nearest neighbour
    order       in which the documents are clustered: as they come, "0", and at random; the threshold is the same in all
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import adjusted_mutual_info_score
from torch import Tensor

from saelens_ext import _checks, _files
from saelens_ext.activations.matrix_stream import MatrixStream
from saelens_ext.activations.stream import ActivationStream
from saelens_ext.dictionaries.fit_exemplars import fit_exemplar_partitions
from saelens_ext.dictionaries.fit_result import ExemplarFitResult
from saelens_ext.evals.evidence import evidence_table
from saelens_ext.evals.replicas import read_all, replicas
from saelens_ext.ops.modes import standard_modes
from saelens_ext.ops.precision import wide
from saelens_ext.report.evidence_section import EvidenceSection, ForestPlot, Line, LineFigure

RULES = {"percentile": "percentile of the pairwise distances", "nearest_neighbour": "times the nearest neighbour"}
OUTCOMES = {
    "n_regions": "regions",
    "unseen_mass": "share of further activations that would start a region",
    "held_out_distance": "mean cosine distance of held-out activations to the nearest exemplar",
    "held_out_error": "squared error of held-out activations over their variance, reconstructed from their regions",
    "agreement": "adjusted mutual information of the regions that two orders put held-out activations in",
}
_ROWS = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class ThresholdSensitivity:
    """Outcomes of partitions at several thresholds, by two rules for choosing one."""

    cells: pd.DataFrame
    """One row per resolution, order and outcome: "rule" ("percentile" or "nearest_neighbour"), "resolution",
    "threshold" (cosine distance), "low" and "high" (its interval), "order", "outcome" and "value".
    """
    outcomes: dict[str, str]
    """Names of the outcomes, and what they are."""
    settings: dict[str, Any] = field(default_factory=dict)

    def table(self) -> pd.DataFrame:
        """One row per rule and resolution: the threshold, and of each outcome the mean over orders and its "spread",
        the largest value minus the smallest.
        """
        keys = ["rule", "resolution", "threshold", "low", "high"]
        values = self.cells.groupby([*keys, "outcome"], sort=False)["value"]
        parts = {"": values.mean(), " spread": values.max() - values.min()}
        wide = [part.unstack("outcome").add_suffix(suffix) for suffix, part in parts.items()]
        columns = [f"{name}{suffix}" for name in self.outcomes for suffix in parts]
        return pd.concat(wide, axis=1)[columns].sort_index().reset_index()

    def verdict(self) -> str:
        """Where the thresholds of the two rules lie, and over what range each outcome goes."""
        table, lines = self.table(), []
        for rule, part in table.groupby("rule", sort=False):
            ends = part.iloc[[0, -1]]
            (first, last), (low, high) = ends["resolution"], ends["threshold"]
            ranges = "; ".join(
                f"{name.replace('_', ' ')} {ends[name].iloc[0]:.3g} to {ends[name].iloc[1]:.3g}"
                for name in self.outcomes
            )
            what = "percentile" if rule == "percentile" else "factor"
            lines.append(
                f"From {what} {first:g} to {last:g} the threshold goes from {low:.3f} to {high:.3f}: {ranges}."
            )
        return "\n".join(lines)

    def section(self) -> EvidenceSection:
        """What a page shows: every outcome against the threshold, by either rule, and the table."""
        table = self.table()
        figures = []
        for name, words in self.outcomes.items():
            lines = [
                Line(
                    label=RULES[str(rule)], x=tuple(part["threshold"]), y=tuple(part[name].astype(float)),
                    kind="unsupervised" if rule == "percentile" else "supervised",
                )
                for rule, part in table.groupby("rule", sort=False)
            ]  # fmt: skip
            note = "Both rules choose a threshold, so their points lie on one curve; they differ in where they stand."
            title = name.replace("_", " ").capitalize()
            figures.append(
                LineFigure(
                    title=title, x_label="threshold, cosine distance", y_label=words, lines=tuple(lines), note=note
                )
            )
        explained = "; ".join(f"{name.replace('_', ' ')}: {words}" for name, words in self.outcomes.items())
        note = f"Means over orders; spread: the largest minus the smallest. {explained}."
        return EvidenceSection(
            kind="sensitivity",
            title="Sensitivity to the threshold",
            question="How much do the outcomes hang on the threshold, and on the rule that chose it?",
            verdict=self.verdict(),
            forest=ForestPlot(axis="", rows=()),
            tables=(evidence_table("Outcomes by resolution", table, note),),
            figures=tuple(figures),
            units=(
                f"Every partition is built from {self.settings['n_fitted']} activations, in "
                f"{self.settings['n_orders']} orders of their documents with one threshold; "
                f"{self.settings['n_held_out']} activations of other documents judge."
            ),
            settings=_files.json_safe(self.settings),
        )


@standard_modes(gradients=False)
def threshold_sensitivity(
    source: ActivationStream | Tensor,
    *,
    percentiles: Sequence[float | int] = (1, 2, 4, 8, 16),
    neighbour_factors: Sequence[float | int] = (1, 1.25, 1.5, 2, 2.5),
    outcomes: Mapping[str, Callable[[ExemplarFitResult], float]] | None = None,
    document_ids: Tensor | None = None,
    held_out: float = 0.2,
    n_orders: int = 3,
    seed: int = 0,
) -> ThresholdSensitivity:
    """Build partitions at several thresholds, and tell how far what is read off them depends on the threshold.

    The threshold is a percentile of the pairwise distances, or a factor times the median distance to the nearest
    neighbour, a rule that can be stated beforehand. Both are calibrated on the documents that are fitted; other
    documents judge. The order of the documents changes a partition too: how much, its spread says.

    Memory: the activations.

    Args:
        source: activations of one hook: a stream, or ``(n, d)``.
        percentiles: each in (0, 100); none to leave the rule out.
        neighbour_factors: each above 0; none to leave the rule out.
        outcomes: what else is to be read off each fit, by name: a function of it that gives a number, such as the AUROC
            of a detection or the change of a rate under ablation.
        document_ids: the document of each row of a matrix, integers ``(n,)``; None: each is one of its own.
        held_out: fraction of the documents that judge, in (0, 1), drawn at random.
        n_orders: orders of the documents, at least 2.
        seed: of the documents held out and of the orders.

    Raises:
        ValueError: no resolution, one given twice or out of range, an outcome with the name of one of ours, fewer than
            2 orders, fewer than 2 documents to fit or none to judge.

    Examples:
        >>> found = sx.threshold_sensitivity(
        ...     stream, percentiles=(10, 40), neighbour_factors=(1, 1.5), n_orders=2,
        ...     outcomes={"largest": lambda fit: float(fit.counts.max())},
        ... )
        >>> found.table()["rule"].tolist()
        ['nearest_neighbour', 'nearest_neighbour', 'percentile', 'percentile']

    Source: ours; the public review of arXiv 2605.14347 asks for a rule stated beforehand and this sensitivity.
    """
    more = dict(outcomes or {})
    if taken := sorted(set(more) & set(OUTCOMES)):
        raise ValueError(f"outcomes must have names other than {', '.join(OUTCOMES)}; got {taken[0]!r}.")
    if _checks.positive(n_orders, "n_orders") < 2:
        raise ValueError(f"n_orders must be at least 2, got {n_orders}: agreement and spread take another.")
    given = {"percentile": tuple(percentiles), "nearest_neighbour": tuple(neighbour_factors)}
    if not any(given.values()):
        raise ValueError("percentiles and neighbour_factors are both empty; give a resolution of one rule.")
    _checks.between(held_out, 0, 1, "held_out")
    x, documents, hook_name = read_all(source, document_ids)
    judges, n_documents = _judges(documents, held_out, seed), int(documents.max()) + 1
    fitted, own = x[~judges], documents[~judges].unique(return_inverse=True)[1]
    rows = []
    for rule, resolutions in given.items():
        if not resolutions:
            continue
        options: dict[str, Any] = {"percentiles" if rule == "percentile" else "neighbour_factors": resolutions}
        stream = MatrixStream(fitted, hook_name, document_ids=own, batch_size=_ROWS)
        for (_, resolution), fit in fit_exemplar_partitions(stream, threshold_rule=cast(Any, rule), **options).items():
            others = replicas(fitted, own, n_orders - 1, fit, [seed], hook_name=hook_name or None)
            theta = fit.threshold
            where = {"rule": rule, "resolution": float(resolution), "threshold": theta.threshold}
            where |= {"low": theta.low, "high": theta.high}
            values = _values([fit, *others.values()], x[judges], more)
            rows += [where | row for row in values]
    return ThresholdSensitivity(
        cells=pd.DataFrame(rows),
        outcomes=OUTCOMES | {name: name.replace("_", " ") for name in more},
        settings={
            "percentiles": list(given["percentile"]), "neighbour_factors": list(given["nearest_neighbour"]),
            "n_orders": n_orders, "held_out": held_out, "seed": seed, "n_fitted": len(fitted),
            "n_held_out": int(judges.sum()), "n_documents": n_documents,
        },
    )  # fmt: skip


def _judges(documents: Tensor, held_out: float, seed: int) -> Tensor:
    """Which activations judge, bool ``(n,)``: those of documents drawn at random."""
    n_documents = int(documents.max()) + 1
    n_out = round(held_out * n_documents)
    if n_out < 1 or n_documents - n_out < 2:
        raise ValueError(
            f"held_out={held_out:g} of {n_documents} documents leaves {n_documents - n_out} to fit and {n_out} to "
            "judge; at least 2 and 1 are needed. Give more documents, or another fraction."
        )
    out = np.zeros(n_documents, dtype=bool)
    out[np.random.default_rng([seed, 1]).permutation(n_documents)[:n_out]] = True
    return torch.from_numpy(out)[documents]


def _values(
    fits: Sequence[ExemplarFitResult], x: Tensor, more: Mapping[str, Callable[[ExemplarFitResult], float]]
) -> list[dict[str, Any]]:
    """Every outcome of fits that differ in their order; agreement with the others is a mean over them."""
    variance = float((wide(x) - wide(x).mean(dim=0)).square().sum())
    values: list[dict[str, float]] = []
    labels = []
    for fit in fits:
        found = fit.dictionary.assign(x)
        labels.append(found.regions.cpu().numpy())
        error = sum(float(wide(part - fit.dictionary(part)).square().sum()) for part in x.float().split(_ROWS))
        values.append(
            {
                "n_regions": fit.n_regions, "unseen_mass": fit.unseen_mass, "held_out_error": error / variance,
                "held_out_distance": float(wide(found.distances).mean()),
            }
            | {name: float(function(fit)) for name, function in more.items()}
        )  # fmt: skip
    pairs = np.full((len(fits), len(fits)), np.nan)
    for i, j in combinations(range(len(fits)), 2):
        pairs[i, j] = pairs[j, i] = adjusted_mutual_info_score(labels[i], labels[j])
    return [
        {"order": order, "outcome": name, "value": value}
        for order, own in enumerate(values)
        for name, value in (own | {"agreement": float(np.nanmean(pairs[order]))}).items()
    ]
