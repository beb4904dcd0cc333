"""The rate-distortion curve of a prefix: rate and distortion at every beta and gamma tried.

Symbols
    beta, gamma    weight of distortion, and the fraction of it on the semantic view
    D / D_0        distortion of a partition over that of one cluster for all, in [0, 1]
"""

from typing import Any, cast

import numpy as np

from saelens_ext import _files
from saelens_ext.continuations.prefix_audit import PrefixAudit
from saelens_ext.continuations.validation.figures import NOTHING, fixed
from saelens_ext.report.format import Line, count, percentage


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
            "chosen": row.beta == audit.clusterer.beta and row.gamma == audit.clusterer.gamma,
        }
        for row in cast(Any, table.sort_values(["gamma", "beta"]).itertuples())
    ]
    return {"points": _files.json_safe(points, 6)}


def path_rows(audit: PrefixAudit) -> list[Line]:
    """The same as a table, by gamma and then beta."""
    data = path_data(audit)
    return [] if data is None else [_line(point) for point in data["points"]]


def _line(point: dict[str, Any]) -> Line:
    stability = NOTHING
    if point["stability"] is not None:
        error = "" if point["stability_se"] is None else f" ± {fixed(point['stability_se'], 2)}"
        stability = f"{fixed(point['stability'], 2)}{error}"
    cells = {
        "γ": (f"γ {point['gamma']:g}", "this report" if point["chosen"] else ""),
        "β": f"{point['beta']:g}",
        "Modes": count(point["n"]),
        "Rate, nats": fixed(point["rate"], 2),
        "Meaning unexplained": percentage(point["meaning"]),
        "Mechanism unexplained": percentage(point["mechanism"]),
        "Stability": stability,
    }
    return Line(cells, point["chosen"])


def one_cluster(audit: PrefixAudit) -> tuple[float, float]:
    """D_0 of both views; 1 for a view without any difference."""
    rows = audit.continuations
    labels, weights = np.zeros(len(rows), dtype=np.int64), rows.weights.double().numpy()
    whole = audit.clusterer.partition_objective(*rows.both_views(), labels, sample_weight=weights)
    return whole.semantic_distortion or 1.0, whole.attribution_distortion or 1.0
