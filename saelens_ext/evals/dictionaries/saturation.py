"""Whether new activations still start regions: curves of several streams that one calibration makes comparable.

Symbols
    n, K(n)  activations seen, and the regions that they started
    order    in which the documents are clustered, at random; the curve of a stream depends on it
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from torch import Tensor

from saelens_ext import _checks, _files
from saelens_ext.activations.stream import ActivationStream
from saelens_ext.dictionaries.fit_exemplars import fit_exemplar_partition
from saelens_ext.dictionaries.fit_result import ExemplarFitResult
from saelens_ext.evals.evidence import evidence_table
from saelens_ext.evals.replicas import read_all, replicas
from saelens_ext.ops.modes import standard_modes
from saelens_ext.report.dictionary.growth import growth_points
from saelens_ext.report.evidence_section import EvidenceSection, ForestPlot, ForestRow, Line, LineFigure


@dataclass(frozen=True, kw_only=True, eq=False)
class Saturation:
    """Regions against activations seen, for several streams with one centre and one threshold."""

    curves: pd.DataFrame
    """One row per source, order and point: "source", "order", "seen" and "regions"."""
    ends: pd.DataFrame
    """One row per source and order, at the end: "n_seen", "regions", and "unseen_mass" with "unseen_mass_upper", the
    share of further activations that would start a region, as its last half tells, and the 95% upper limit of it.
    """
    settings: dict[str, Any] = field(default_factory=dict)

    def table(self) -> pd.DataFrame:
        """One row per source: means over orders of what :attr:`ends` has, and "regions_at", "low" and "high", the mean,
        the least and the most regions after as many activations as the shortest source has.
        """
        common = self.settings["n_common"]
        same = self.curves[self.curves["seen"] == common].groupby("source", sort=False)["regions"]
        at = same.agg(["mean", "min", "max"]).astype(float).set_axis(["regions_at", "low", "high"], axis=1)
        ends = self.ends.drop(columns="order").groupby("source", sort=False).mean()
        return ends.assign(n_seen=ends["n_seen"].astype(int)).join(at).reset_index()

    def verdict(self) -> str:
        """How many regions each source starts, after as many activations, and whether it still starts new ones."""
        start = (
            f"With a threshold of {self.settings['threshold']:.3f} calibrated on {self.settings['calibrated_on']}, "
            f"after {self.settings['n_common']} activations each:"
        )
        lines = [
            f"{row['source']}: {row['regions_at']:.0f} regions ({row['low']:.0f} to {row['high']:.0f} over orders); at "
            f"its end, after {row['n_seen']}, {row['unseen_mass']:.2%} of further activations would start one (at most "
            f"{row['unseen_mass_upper']:.2%})."
            for row in self.table().to_dict("records")
        ]
        return "\n".join([start, *lines])

    def section(self) -> EvidenceSection:
        """What a page shows: the curves, and the regions after as many activations."""
        means = self.curves.groupby(["source", "seen"], sort=False)["regions"].mean()
        lines = [
            Line(label=str(source), x=tuple(map(float, part.index.get_level_values("seen"))), y=tuple(map(float, part)))
            for source, part in means.groupby(level="source", sort=False)
        ]
        table = self.table()
        rows = [
            ForestRow(
                label=row["source"], estimate=row["regions_at"], low=row["low"], high=row["high"],
                n_units=self.settings["n_orders"],
            )
            for row in table.to_dict("records")
        ]  # fmt: skip
        axis = f"regions after {self.settings['n_common']} activations, the least and the most over orders"
        return EvidenceSection(
            kind="saturation",
            title="Saturation",
            question="How many regions do activations of each source start, and do new ones still start regions?",
            verdict=self.verdict(),
            forest=ForestPlot(axis=axis, rows=tuple(rows)),
            tables=(evidence_table("Sources", table, "Means over orders; low and high over orders of regions at."),),
            figures=(
                LineFigure(
                    title="Regions against activations seen", x_label="activations seen", y_label="regions",
                    lines=tuple(lines), note="Means over orders of the documents, with one centre and one threshold.",
                ),
            ),
            units="Every source is clustered in several random orders of its documents, none of them read twice.",
            settings=_files.json_safe(self.settings),
        )  # fmt: skip


@standard_modes(gradients=False)
def saturation_curves(
    sources: Mapping[str, ActivationStream | Tensor],
    *,
    calibration: ExemplarFitResult | str | None = None,
    percentile: float | int = 10.0,
    document_ids: Mapping[str, Tensor] | None = None,
    n_orders: int = 3,
    n_points: int = 160,
    seed: int = 0,
) -> Saturation:
    """Count the regions that activations of several sources start, with the same centre and threshold for all.

    How many regions there are depends on the threshold, and that on what calibrated it: curves of partitions with
    thresholds of their own cannot be compared. Here one source, or a fit, calibrates, and all are clustered alike.
    Sources of other lengths are compared after as many activations as the shortest has; no document is read twice, so
    a source of few documents is short instead of seeming full.

    Memory: the activations of one source.

    Args:
        sources: streams over one hook, or activations ``(n, d)``, by name, of one width: other texts, models or layers.
        calibration: which calibrates: the name of a source, by default the first, or a fit of activations of this
            width. With a source, its documents in their order.
        percentile: of the calibration, unless it is a fit.
        document_ids: of matrices, by name, the document of each row, integers ``(n,)``; each row is one of its own
            where there is none.
        n_orders: random orders of the documents, at least 1.
        n_points: about so many points of a curve, at least 4.
        seed: of the orders.

    Raises:
        ValueError: no source, a calibration by none of them, documents of a source that is none, other widths, or as
            for :func:`~saelens_ext.dictionaries.fit_exemplars.fit_exemplar_partition`.

    Examples:
        >>> found = sx.saturation_curves({"text": stream, "again": stream}, percentile=20, n_orders=2)
        >>> found.table()["regions_at"].nunique()  # the same activations
        1

    Source: the saturation curves of arXiv 2605.14347, with one calibration; orders, the comparison after as many
    activations, and the unseen mass are ours.
    """
    names = list(sources)
    if not names:
        raise ValueError("sources is empty; give a stream or a matrix by name.")
    if _checks.positive(n_points, "n_points") < 4:
        raise ValueError(f"n_points must be at least 4, got {n_points}.")
    _checks.positive(n_orders, "n_orders")
    _checks.known_keys(document_ids or {}, names, "document_ids")
    like, calibrated_on = calibration, "a fit"
    if not isinstance(like, ExemplarFitResult):
        calibrated_on = _checks.choice(names[0] if like is None else like, tuple(names), "calibration")
        x, documents, _ = read_all(sources[calibrated_on], (document_ids or {}).get(calibrated_on))
        like = fit_exemplar_partition(x, document_ids=documents, percentile=percentile)
    fits: dict[str, dict[str, ExemplarFitResult]] = {}
    for name, source in sources.items():
        x, documents, _ = read_all(source, (document_ids or {}).get(name))
        fits[name] = replicas(x, documents, n_orders, like, [seed])
    lengths = {name: own["0"].n_seen for name, own in fits.items()}
    common = min(lengths.values())
    grid = growth_points(max(lengths.values()), n_points)
    curves, ends = [], []
    for name, own in fits.items():
        seen = sorted({*grid[grid < lengths[name]].tolist(), lengths[name], common})
        for order, fit in own.items():
            where = {"source": name, "order": int(order)}
            curves.append(pd.DataFrame(where | {"seen": seen, "regions": fit.regions_after(seen)}))
            masses = {"unseen_mass": fit.unseen_mass, "unseen_mass_upper": fit.unseen_mass_upper}
            ends.append(where | {"n_seen": fit.n_seen, "regions": fit.n_regions} | masses)
    return Saturation(
        curves=pd.concat(curves, ignore_index=True),
        ends=pd.DataFrame(ends),
        settings={
            "calibrated_on": calibrated_on, "threshold": like.threshold.threshold, "percentile": like.percentile,
            "n_common": common, "n_orders": n_orders, "seed": seed,
        },
    )  # fmt: skip
