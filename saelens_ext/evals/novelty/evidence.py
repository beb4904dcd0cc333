"""What a novelty evaluation gives: AUROCs of every score on every outside set, with documents as the units.

Symbols
    set      documents of one kind: "inside", held out of the reference, and any number of outside ones
    series   scores of all activations by one method; a coreset has one for each draw
    R        draws of a coreset
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.evals.evidence import Evidence, corrected
from saelens_ext.evals.novelty import report as novelty_report
from saelens_ext.ops.paired_auroc import (
    ScoredDocuments,
    bootstrap_weights,
    document_wins,
    exchange_contributions,
    resampled_auroc,
    resampled_fraction_above,
    resampled_thresholds,
    sign_flip_p_values,
)
from saelens_ext.ops.resampling import student_stretch, tpr_at_fpr
from saelens_ext.report.evidence_section import EvidenceSection

INSIDE = "inside"
Pair = tuple[ScoredDocuments, ScoredDocuments]
"""Outside and inside documents under one score."""


class Series(NamedTuple):
    """Scores of all activations by one method."""

    method: str
    draw: int
    """Number of the draw of a coreset, else 0."""


@dataclass(kw_only=True, eq=False)
class NoveltyEvidence(Evidence):
    """How well scores of novelty find activations of documents that are unlike a reference.

    ``cells`` has, for each document and method, the mean score of its activations ("score") and, for outside documents,
    the fraction of inside activations that they exceed ("auroc") and the fraction of them above the thresholds of
    ``rates`` ("tpr_at_…"), each the mean over a coreset's draws.

    Intervals redraw whole documents, outside and inside ones apart. A p-value is of exchanging the two methods' scores
    of whole documents at random. Against a coreset it is the larger of that and one over its draws, from Student's t
    for one more draw: a partition that is as good as a lucky coreset is no better than coresets.
    """

    kind: ClassVar[str] = "novelty"
    title: ClassVar[str] = "Novelty"
    question: ClassVar[str] = (
        "Does the distance to the nearest exemplar find activations of unfamiliar text, and better than as many random "
        "activations and other measures of novelty do?"
    )
    unit: ClassVar[str] = "document"
    unit_text: ClassVar[str] = (
        "Documents. Activations of one document resemble each other, so intervals redraw whole documents, those of the "
        "outside set and those of the inside set apart, and p-values exchange two methods' scores of whole documents. "
        "Against random activations, p is the larger of this and one over the draws of the coreset. Holm's "
        "correction is over the partitions and outside sets of one baseline."
    )
    groups: ClassVar[tuple[str, ...]] = ("set",)
    metrics: ClassVar[dict[str, str]] = {"auroc": "AUROC, outside against inside"}
    chance: ClassVar[float | None] = 0.5
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    scores: Tensor
    """Float32, one row per series and one column per activation, sets one after the other; NaN where a method failed on
    a set.
    """
    series: tuple[Series, ...]
    """What the rows are."""
    sizes: dict[str, list[int]]
    """Activations (or 1 at level "document") of each document by set, "inside" first."""
    baselines: dict[str, list[str]] = field(default_factory=dict)
    """By method whose merit is asked, the methods that it is compared with."""
    partitions: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """By partition: its "threshold", "percentile" and "n_regions"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rates = {f"tpr_at_{rate:g}": f"TPR at {rate:.0%} FPR" for rate in self.settings.get("rates", ())}
        self.metrics = dict(type(self).metrics) | rates  # pyright: ignore[reportAttributeAccessIssue]  # by its rates

    @property
    def outside(self) -> list[str]:
        """The names of the outside sets."""
        return [name for name in self.sizes if name != INSIDE]

    def documents(self, name: str, method: str, draw: int = 0) -> ScoredDocuments | None:
        """The scores of a set by one series, None where they could not be computed."""
        starts = dict(zip(self.sizes, np.cumsum([0, *map(sum, self.sizes.values())])))
        row = self.scores[self.series.index(Series(method, draw))]
        values = row[starts[name] : starts[name] + sum(self.sizes[name])].double().numpy()
        return None if np.isnan(values).any() else ScoredDocuments(values, np.asarray(self.sizes[name]))

    def pairs(self, name: str, method: str) -> list[Pair]:
        """The outside documents of a set and the inside ones, under each draw of a method; empty where it failed."""
        draws = [draw for own, draw in self.series if own == method]
        found = [(self.documents(name, method, draw), self.documents(INSIDE, method, draw)) for draw in draws]
        return [(out, own) for out, own in found if out is not None and own is not None]

    def document_cells(self) -> pd.DataFrame:
        """What ``cells`` holds, from the scores."""
        parts = [
            pd.DataFrame(
                {"set": name, "document": range(len(values)), "method": method, "metric": metric, "value": values}
            )
            for method in self.kinds
            for name in self.sizes
            for metric, values in self._unit_values(name, self.pairs(name, method)).items()
        ]
        return pd.concat(parts, ignore_index=True)

    def _unit_values(self, name: str, pairs: list[Pair]) -> dict[str, np.ndarray]:
        """One value per document of a set and metric, the mean over draws."""
        if not pairs:
            return {}
        found = {"score": [outside.means().scores for outside, _ in pairs]}
        if name != INSIDE:
            found["auroc"] = [
                document_wins(outside, inside).sum(axis=1) / (outside.sizes * len(inside.scores))
                for outside, inside in pairs
            ]
            for metric, rate in self._rates():
                found[metric] = [_fraction_above(*pair, rate) for pair in pairs]
        return {metric: np.mean(values, axis=0) for metric, values in found.items()}

    # --- estimates ---

    def summary(self) -> pd.DataFrame:
        """One row per set, metric and method: estimate, low, high, n_units (outside documents), n_inside, and draw_low
        and draw_high, the range over the draws of a coreset.
        """
        return self._summary.copy()

    @cached_property
    def _summary(self) -> pd.DataFrame:
        rows = []
        for metric, value in (("auroc", None), *self._rates()):
            for method in self.kinds:
                estimate = self._auroc if value is None else self._tpr(value)
                for name in self.outside:
                    pairs = self.pairs(name, method)
                    if pairs:
                        values = np.array([estimate(name, draw, pair) for draw, pair in enumerate(pairs)])
                        row = self._row(name, values)
                        rows.append({"set": name, "metric": metric, "method": method, **row})
        columns = ["estimate", "low", "high", "n_units", "n_inside", "draw_low", "draw_high"]
        return pd.DataFrame(rows, columns=["set", "metric", "method", *columns])

    def _rates(self) -> list[tuple[str, float]]:
        return [(f"tpr_at_{rate:g}", rate) for rate in self.settings.get("rates", ())]

    def _row(self, name: str, values: np.ndarray) -> dict[str, Any]:
        """An estimate with its interval, from the statistic and its resamples under each draw, ``(draws, 1 + b)``."""
        found = values.mean(axis=0)
        ends = (values[:, 0].min(), values[:, 0].max()) if len(values) > 1 else (np.nan, np.nan)
        return {"estimate": found[0], **self._interval(name, found), "draw_low": ends[0], "draw_high": ends[1]}

    def _interval(self, name: str, found: np.ndarray, bounds: tuple[float, float] = (0.0, 1.0)) -> dict[str, Any]:
        """The interval of a statistic that was found with all documents, then with each resample; and the documents."""
        tail = (1 - self.settings["confidence"]) / 2
        counts = {"n_units": len(self.sizes[name]), "n_inside": len(self.sizes[INSIDE])}
        stretch = student_stretch(min(counts.values()), self.settings["confidence"])
        ends = np.quantile(found[1:], [tail, 1 - tail])
        low, high = (float(np.clip(found[0] + stretch * (end - found[0]), *bounds)) for end in ends)
        return {"low": low, "high": high, **counts}

    def _auroc(self, name: str, draw: int, pair: Pair) -> np.ndarray:
        """The AUROC of all documents, then of each resample."""
        return resampled_auroc(document_wins(*pair), (pair[0].sizes, pair[1].sizes), self._weights(name))

    def _tpr(self, rate: float) -> Callable[[str, int, Pair], np.ndarray]:
        """The TPR at a rate, likewise, of one method; the thresholds of a draw serve all outside sets."""
        thresholds: dict[int, np.ndarray] = {}

        def found(name: str, draw: int, pair: Pair) -> np.ndarray:
            w, v = self._weights(name)
            if draw not in thresholds:
                thresholds[draw] = resampled_thresholds(pair[1], rate, v)
            return resampled_fraction_above(pair[0], thresholds[draw], w)

        return found

    def _weights(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """How often each document is in each resample, the first row being all of them once; the inside ones of a
        resample are the same for every set and method.
        """
        return self._all_weights[name], self._all_weights[INSIDE]

    @cached_property
    def _all_weights(self) -> dict[str, np.ndarray]:
        found, n_bootstrap = {}, self.settings["n_bootstrap"]
        for number, (name, sizes) in enumerate(self.sizes.items()):
            drawn = bootstrap_weights(len(sizes), n_bootstrap, np.random.default_rng([self.settings["seed"], number]))
            found[name] = np.concatenate([np.ones((1, len(sizes))), drawn])
        return found

    # --- differences ---

    def comparisons(self, reference: str | None = None, *, metric: str | None = None) -> pd.DataFrame:
        """Differences of AUROC between methods on the same documents.

        Args:
            reference: the method that all others are compared with; by default every partition and dictionary is
                compared with its baselines.
            metric: only "auroc".

        Returns:
            One row per set and pair: method, other, difference, low, high, p_documents, p_draws (NaN but against a
            coreset), p, n_units, n_inside, p_holm, corrected over the methods and sets of one baseline.

        Raises:
            ValueError: no such method, or another metric.
        """
        _checks.choice(metric or self.headline, (self.headline,), "metric of comparisons")
        if reference is not None:
            _checks.choice(reference, tuple(self.kinds), "reference")
            return self._compared({reference: [name for name in self.kinds if name != reference]})
        return self._comparisons.copy()

    @cached_property
    def _comparisons(self) -> pd.DataFrame:
        return self._compared(self.baselines)

    def _compared(self, baselines: dict[str, list[str]]) -> pd.DataFrame:
        rows = [
            {"set": name, "method": method, "other": other, **found}
            for name in self.outside
            for method, others in baselines.items()
            for other, found in self._differences(name, method, others)
        ]
        columns = ["difference", "low", "high", "p_documents", "p_draws", "p", "n_units", "n_inside"]
        table = pd.DataFrame(rows, columns=["set", "method", "other", *columns])
        return corrected(table, table["other"].map(self.family_of))

    @staticmethod
    def family_of(method: str) -> str:
        """The baseline that a method is one of: the coresets of all partitions are one."""
        return method.split(" of ")[0]

    def _differences(self, name: str, method: str, others: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        own = self.pairs(name, method)
        known = [(other, self.pairs(name, other)) for other in others]
        known = [(other, pairs) for other, pairs in known if own and pairs]
        if not known:
            return
        contributions = [
            np.mean([exchange_contributions(mine, theirs) for mine in own for theirs in pairs], axis=0)
            for _, pairs in known
        ]
        generator = np.random.default_rng([self.settings["seed"], 1])
        p_values = sign_flip_p_values(np.array(contributions), self.settings["n_permutations"], generator)
        mine = np.mean([self._auroc(name, draw, pair) for draw, pair in enumerate(own)], axis=0)
        for (other, pairs), p in zip(known, p_values, strict=True):
            theirs = np.array([self._auroc(name, draw, pair) for draw, pair in enumerate(pairs)])
            found = mine - theirs.mean(axis=0)
            p_draws = _p_of_one_more_draw(mine[0], theirs[:, 0])
            p_values = {"p_documents": float(p), "p_draws": p_draws, "p": float(np.fmax(p, p_draws))}
            yield other, {"difference": found[0], **p_values, **self._interval(name, found, (-1.0, 1.0))}

    # --- words and pages ---

    def verdict(self, reference: str | None = None) -> str:
        """What the evidence says in words.

        A partition is better than as many random activations only if every difference with a corrected p-value below
        .05 is positive and there is one.

        Args:
            reference: as for :meth:`comparisons`.
        """
        return novelty_report.verdict(self, self.comparisons(reference))

    def section(self) -> EvidenceSection:
        """What a page shows of this evidence."""
        return replace(super().section(), tables=novelty_report.tables(self), figures=novelty_report.figures(self))


def _fraction_above(outside: ScoredDocuments, inside: ScoredDocuments, rate: float) -> np.ndarray:
    """Of each outside document, the fraction of activations above the threshold of a false positive rate."""
    threshold = tpr_at_fpr(outside.scores, inside.scores, rate).threshold
    return ScoredDocuments((outside.scores > threshold).astype(float), outside.sizes).means().scores


def _p_of_one_more_draw(value: float, draws: np.ndarray) -> float:
    """Two-sided p-value of a value being one more of some draws, from Student's t; NaN for a single draw."""
    if len(draws) < 2:
        return float("nan")
    difference, spread = value - draws.mean(), draws.std(ddof=1)
    if abs(difference) < 1e-12:
        return 1.0
    t = abs(difference) / max(float(spread) * np.sqrt(1 + 1 / len(draws)), 1e-300)
    return float(2 * stats.t.sf(t, len(draws) - 1))
