"""The rate-distortion curve of a prefix: rate and distortion at every beta and gamma tried.

Symbols
    beta, gamma    weight of distortion, and the fraction of it on the semantic view
    D / D_0        distortion of a partition over that of one cluster for all, in [0, 1]
"""

from typing import Any, NamedTuple, cast

import numpy as np

from saelens_ext import _files
from saelens_ext.continuations.prefix_audit import PrefixAudit
from saelens_ext.continuations.validation.figures import NOTHING, fixed
from saelens_ext.report.format import count, percentage


class PathRow(NamedTuple):
    """One beta and gamma, formatted."""

    beta: str
    gamma: str
    chosen: bool
    n_clusters: str
    rate: str
    semantic: str
    attribution: str
    stability: str


def path_data(audit: PrefixAudit) -> dict[str, Any] | None:
    """The curves for the page's script, JSON-safe; None where no others were tried."""
    table = audit.path
    if table.empty:
        return None
    whole_e, whole_a = one_cluster(audit)
    points = [
        {
            "beta": float(row.beta),
            "gamma": float(row.gamma),
            "n": int(row.n_clusters),
            "rate": row.rate,
            "meaning": row.semantic_distortion / whole_e,
            "mechanism": row.attribution_distortion / whole_a,
            "stability": getattr(row, "stability", None),
            "stability_se": getattr(row, "stability_se", None),
            "chosen": _is_chosen(audit, row),
        }
        for row in cast(Any, table.sort_values(["gamma", "beta"]).itertuples())
    ]
    return {"points": _files.json_safe(points, 6)}


def path_rows(audit: PrefixAudit) -> list[PathRow]:
    """The same as a table, by gamma and then beta."""
    data = path_data(audit)
    return [] if data is None else [_row(point) for point in data["points"]]


def _row(point: dict[str, Any]) -> PathRow:
    stability = NOTHING
    if point["stability"] is not None:
        error = "" if point["stability_se"] is None else f" ± {fixed(point['stability_se'], 2)}"
        stability = f"{fixed(point['stability'], 2)}{error}"
    return PathRow(
        f"{point['beta']:g}",
        f"{point['gamma']:g}",
        point["chosen"],
        count(point["n"]),
        fixed(point["rate"], 2),
        percentage(point["meaning"]),
        percentage(point["mechanism"]),
        stability,
    )


def _is_chosen(audit: PrefixAudit, row: Any) -> bool:
    return row.beta == audit.clusterer.beta and row.gamma == audit.clusterer.gamma


def one_cluster(audit: PrefixAudit) -> tuple[float, float]:
    """D_0 of both views; 1 for a view without any difference."""
    held = audit.continuations
    whole = audit.clusterer.partition_objective(
        *held.both_views(),
        np.zeros(len(held), dtype=np.int64),
        sample_weight=held.weights.double().numpy(),
    )
    return whole.semantic_distortion or 1.0, whole.attribution_distortion or 1.0
