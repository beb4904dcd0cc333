"""Which kind of dictionary tells a concept best: each chooses its score on some sentences and is judged on others.

The best of many scores looks better than it is on the sentences that chose it, and the more scores there are, the more
so. Sentences are therefore split once; every method chooses one score on the first part, and what is reported is that
score on the second.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from saelens_ext._modes import standard_modes
from saelens_ext.concepts.detection import ConceptScores, Detector, concept_scores
from saelens_ext.concepts.diff_means import diff_means, split_sentences
from saelens_ext.host.models import HostModel

if TYPE_CHECKING:
    import pandas

DIFF_MEANS = "difference of means"


@dataclass(frozen=True, kw_only=True)
class DetectionRow:
    """One method's score of a concept."""

    method: str
    """What it is, a dictionary's name or the difference of means."""
    n_scores: int
    """Scores it chose from."""
    chosen: str
    """The score that told the first part of the sentences best: highest AUROC, among equals the largest difference in
    standard deviations."""
    chosen_auroc: float
    """AUROC on the sentences that chose it, in [0, 1]; above what to expect of others."""
    auroc: float
    """AUROC on the other sentences."""
    auroc_low: float
    """Lower limit of its 95 % interval."""
    auroc_high: float
    """Upper limit."""
    log_ratio: float
    """log(A / B) on the other sentences, in nats; see :func:`saelens_ext.ops.detection.log_ratio`."""
    d_prime: float
    """A - B in standard deviations over sentences, on the other sentences; NaN for a single sentence, infinite where
    the scores of a set are all equal.
    """


@dataclass(frozen=True, kw_only=True)
class ConceptComparison:
    """Several methods on the same sentences."""

    concept: str
    """What the activating sentences show, in words."""
    rows: tuple[DetectionRow, ...]
    """One per method, in the order given."""
    n_choosing: tuple[int, int]
    """Activating and neutral sentences that chose."""
    n_judging: tuple[int, int]
    """Activating and neutral sentences that judged."""

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per method."""
        import pandas

        return pandas.DataFrame([asdict(row) for row in self.rows])

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return asdict(self) | {
            "rows": [
                {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(row).items()}
                for row in self.rows
            ]
        }


@standard_modes()
def compare_detection(
    model: HostModel,
    detectors: Mapping[str, Detector],
    activating: Sequence[str],
    neutral: Sequence[str],
    *,
    concept: str = "",
    diff_means_at: str | None = None,
    seed: int = 0,
    batch_size: int = 16,
) -> ConceptComparison:
    """Let methods choose their best score on half of the sentences and judge it on the other half.

    Args:
        model: any TransformerLens model.
        detectors: methods by name: :meth:`Detector.from_dictionary` of dictionaries, or directions.
        activating: sentences that show the concept; at least 2 different ones, and better 20.
        neutral: sentences that do not.
        concept: the concept in words, for tables.
        diff_means_at: hook at which the difference of means, made from the first half, joins the methods; None leaves
            it out.
        seed: of the split.
        batch_size: windows in a forward pass.

    Raises:
        ValueError: no method, a name used twice, and as :func:`~saelens_ext.concepts.detection.concept_scores`.

    Examples:
        >>> with_colon = ["a: b", "if x: pass", "else: y", "try: z"]
        >>> without = ["a b", "if x pass", "else y", "try z"]
        >>> detectors = {"regions": sx.Detector.from_dictionary(partition)}
        >>> compared = sx.compare_detection(model, detectors, with_colon, without, concept="a colon")
        >>> [row.method for row in compared.rows]
        ['regions']

    Source: the concept detection of arXiv 2506.10920, with sentences that choose kept apart from those that judge.
    """
    choosing, judging = zip(split_sentences(activating, seed=seed), split_sentences(neutral, seed=seed), strict=True)
    methods = dict(detectors)
    if diff_means_at is not None:
        if DIFF_MEANS in methods:
            raise ValueError(
                f"A detector is called {DIFF_MEANS!r}, as the one that diff_means_at adds; give it another name."
            )
        methods[DIFF_MEANS] = diff_means(model, diff_means_at, *choosing, batch_size=batch_size).detector()
    if not methods:
        raise ValueError("detectors is empty and diff_means_at is None: there is nothing to compare.")
    rows = []
    for name, detector in methods.items():
        found, confirmed = (
            concept_scores(model, detector, *part, batch_size=batch_size) for part in (choosing, judging)
        )
        rows.append(_row(name, found, confirmed))
    sizes = [(len(part[0]), len(part[1])) for part in (choosing, judging)]
    return ConceptComparison(concept=concept, rows=tuple(rows), n_choosing=sizes[0], n_judging=sizes[1])


def _row(method: str, found: ConceptScores, confirmed: ConceptScores) -> DetectionRow:
    order = np.lexsort((found.d_prime.nan_to_num(0.0).numpy(), found.auroc.numpy()))
    best = int(order[-1])
    values = {
        name: float(getattr(confirmed, name)[best])
        for name in ("auroc", "auroc_low", "auroc_high", "log_ratio", "d_prime")
    }
    return DetectionRow(
        method=method,
        n_scores=len(found.names),
        chosen=found.names[best],
        chosen_auroc=float(found.auroc[best]),
        **values,
    )
