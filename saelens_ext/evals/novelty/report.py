"""A `NoveltyEvidence` in words, tables and figures."""

from typing import Any

import numpy as np
import pandas as pd

from saelens_ext.evals.evidence import evidence_table
from saelens_ext.evals.verdicts import LEVEL
from saelens_ext.ops.resampling import smallest_p
from saelens_ext.report.evidence_section import EvidenceTable, Line, LineFigure

CORESET = "coreset"
_FALSE_POSITIVE_RATES = np.unique(np.r_[np.linspace(0, 0.1, 21), np.linspace(0.1, 1, 37)])
_N_BINS = 40


# --- the verdict ---


def verdict(evidence: Any, comparisons: pd.DataFrame) -> str:
    """What the comparisons say of each method whose merit is asked."""
    made = comparisons[comparisons["p"].notna()]
    if made.empty:
        return "No method could be compared with a baseline: nothing follows."
    families = made["other"].map(evidence.family_of)
    settings, n_units = evidence.settings, int(made[["n_units", "n_inside"]].sum(axis=1).max())
    least = smallest_p(n_units, settings["n_permutations"], int(families.value_counts().min()))
    if least >= LEVEL:
        return (
            f"Too few documents or permutations for any claim: the smallest corrected p-value possible is {least:.2g}, "
            f"and a claim needs one below {LEVEL:g}."
        )
    sentences = []
    for method, own in made.groupby("method", sort=False):
        against = own[own["other"].map(evidence.family_of) == CORESET]
        if len(against):
            sentences.append(_against_coreset(evidence, str(method), against))
        elif evidence.kinds[str(method)] == "unsupervised" and str(method) in evidence.partitions:
            sentences.append(f"{method} was not compared with as many random activations.")
        others = own[own["other"].map(evidence.family_of) != CORESET]
        if len(others):
            sentences.append(_against_others(str(method), others))
    return "\n".join(sentences)


def _against_coreset(evidence: Any, method: str, rows: pd.DataFrame) -> str:
    certain = rows[rows["p_holm"] < LEVEL]
    better = len(certain) > 0 and bool((certain["difference"] > 0).all())
    n = (evidence.partitions.get(method) or {}).get("n_regions")
    what = f"{method} ({n:,.0f} exemplars)" if n else method
    opening = f"{what} is {'better' if better else 'no better'} than as many random activations"
    parts = [
        f"{word} on {_listed(part)}"
        for word, part in (
            ("above", certain[certain["difference"] > 0]),
            ("below", certain[certain["difference"] < 0]),
        )
        if len(part)
    ]
    undecided = rows[~(rows["p_holm"] < LEVEL)]
    if len(undecided):
        size = float(undecided["difference"].abs().max())
        number = "on" if not parts else "on the other"
        sets = "set" if len(undecided) == 1 else "sets"
        parts.append(
            f"it cannot be told from them {number} {len(undecided)} {sets} (differences of AUROC up to {size:.3f})"
        )
    return f"{opening}: {'; '.join(parts)}."


def _listed(rows: pd.DataFrame) -> str:
    return ", ".join(f"{row.set} ({row.difference:+.3f}, p = {row.p_holm:.2g})" for row in rows.itertuples())


def _against_others(method: str, rows: pd.DataFrame) -> str:
    """In how many sets a method is above and below each of the other baselines."""
    parts = []
    for other, own in rows.groupby("other", sort=False):
        certain = own[own["p_holm"] < LEVEL]
        above, below = int((certain["difference"] > 0).sum()), int((certain["difference"] < 0).sum())
        parts.append(f"{other}: above on {above}, below on {below} of {len(own)} sets")
    return f"{method} against other measures ({'; '.join(parts)})."


# --- the page ---


def tables(evidence: Any) -> tuple[EvidenceTable, ...]:
    """Sets by scores for each metric, then the comparisons."""
    summary = evidence.summary()
    found = []
    for metric, words in evidence.metrics.items():
        own = summary[summary["metric"] == metric]
        shown = ((row, f"{row.estimate:.2f} ({row.low:.2f} to {row.high:.2f})") for row in own.itertuples())
        cells = {(row.method, row.set): text for row, text in shown}
        rows = tuple(
            (method, *(cells.get((method, name), "–") for name in evidence.outside)) for method in evidence.kinds
        )
        note = (
            f"Estimates with {evidence.settings['confidence']:.0%} intervals; a coreset's is the mean over its draws."
        )
        found.append(EvidenceTable(title=words, columns=("method", *evidence.outside), rows=rows, note=note))
    note = (
        "Intervals are over documents. p is the larger of p_documents, from exchanging scores of documents, and "
        "p_draws, over the draws of a coreset; p_holm is corrected over the methods and sets of one baseline."
    )
    return (*found, evidence_table("Differences of AUROC", evidence.comparisons(), note))


def figures(evidence: Any) -> tuple[LineFigure, ...]:
    """AUROC by percentile, distances with the threshold, and ROC curves."""
    found = _by_percentile(evidence)
    found += [figure for method in evidence.partitions for figure in _distances(evidence, method)]
    return tuple(found + [_roc(evidence, name) for name in evidence.outside])


def _by_percentile(evidence: Any) -> list[LineFigure]:
    at = {m: about["percentile"] for m, about in evidence.partitions.items() if about["percentile"] is not None}
    methods = sorted(at, key=lambda method: float(at[method] or 0))
    if len(methods) < 2:
        return []
    summary = evidence.summary()
    own = summary[summary["metric"] == "auroc"].set_index(["set", "method"])["estimate"]
    lines = []
    for name in evidence.outside:
        known = [method for method in methods if (name, method) in own.index]
        x, y = tuple(float(at[method] or 0) for method in known), tuple(float(own[name, m]) for m in known)
        lines.append(Line(label=name, x=x, y=y))
    note = "A lower percentile means more, narrower regions. Each line is one outside set."
    return [
        LineFigure(title="AUROC by percentile", x_label="percentile", y_label="AUROC", lines=tuple(lines), note=note)
    ]


def _distances(evidence: Any, method: str) -> list[LineFigure]:
    """How distances to the nearest exemplar are distributed in each set."""
    sets = {name: evidence.documents(name, method) for name in evidence.sizes}
    known = {name: documents.scores for name, documents in sets.items() if documents is not None}
    if not known:
        return []
    edges = np.histogram_bin_edges(np.concatenate(list(known.values())), bins=_N_BINS)
    x, top, lines = np.repeat(edges, 2)[1:-1], 0.0, []
    for name, values in known.items():
        fractions = np.histogram(values, bins=edges)[0] / len(values)
        top = max(top, float(fractions.max()))
        kind = "control" if name == "inside" else "unsupervised"
        lines.append(Line(label=name, x=tuple(x.tolist()), y=tuple(np.repeat(fractions, 2).tolist()), kind=kind))
    theta = evidence.partitions[method]["threshold"]
    if theta is not None:
        lines.append(Line(label="threshold θ", x=(theta, theta), y=(0.0, top), kind="supervised"))
    note = "Beyond the threshold θ an activation belongs to no region."
    title, label = f"Distances to the nearest exemplar, {method}", "cosine distance"
    return [LineFigure(title=title, x_label=label, y_label="fraction of activations", lines=tuple(lines), note=note)]


def _roc(evidence: Any, name: str) -> LineFigure:
    lines = []
    for method, kind in evidence.kinds.items():
        curves = [_tpr_at(*pair) for pair in evidence.pairs(name, method)]
        if curves:
            y = tuple(np.mean(curves, axis=0).round(4).tolist())
            lines.append(Line(label=method, x=tuple(_FALSE_POSITIVE_RATES.tolist()), y=y, kind=kind))
    return LineFigure(
        title=f"ROC, {name} against inside",
        x_label="false positive rate",
        y_label="true positive rate",
        lines=tuple(lines),
        note="Of all activations; a coreset's curve is the mean over its draws.",
    )


def _tpr_at(outside: Any, inside: Any) -> np.ndarray:
    """The fraction of outside activations found at each false positive rate."""
    thresholds = np.quantile(inside.scores, 1 - _FALSE_POSITIVE_RATES, method="higher")
    found = (outside.scores[:, None] > thresholds).mean(axis=0)
    found[-1] = 1.0
    return np.maximum.accumulate(found)
