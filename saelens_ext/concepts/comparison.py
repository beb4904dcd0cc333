"""Which kind of dictionary tells a concept best: each chooses its score on some sentences and is judged on others.

The best of many scores looks better than it is on the sentences that chose it, and the more scores there are, the more
so. Sentences are therefore split once; every method chooses one score on the first part, and what is reported is that
score on the second.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from saelens_ext import _files
from saelens_ext.activations.stream import ActivationBatch
from saelens_ext.concepts.detection import compare_sentences
from saelens_ext.concepts.detector import Detector
from saelens_ext.concepts.diff_means import difference_of, sentence_sums, split_sentences
from saelens_ext.concepts.sentence_scores import Pooling, pool_scores, warn_of_bos
from saelens_ext.concepts.token_activations import token_activations
from saelens_ext.host.models import HostModel
from saelens_ext.ops.modes import standard_modes

DIFF_MEANS = "difference of means"


@dataclass(frozen=True, kw_only=True, eq=False)
class DetectionRow:
    """One method's score of a concept."""

    method: str
    """What it is, a dictionary's name or the difference of means."""
    n_scores: int
    """Scores it chose from."""
    column: int
    """Which of them it chose, in [0, n_scores): the one that separates the first part of the sentences best, with the
    highest AUROC, among equals the largest difference in standard deviations."""
    chosen: str
    """The name of that score."""
    hook_name: str
    """Where it is read."""
    direction: Tensor | None = None
    """Its unit direction ``(d,)`` for steering at ``hook_name``; None for a code. In no table and no JSON."""
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

    def to_dataframe(self) -> pd.DataFrame:
        """One row per method, without the directions."""
        return pd.DataFrame([_plain(row) for row in self.rows])

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, without the directions."""
        content = {field.name: getattr(self, field.name) for field in fields(self)}
        return _files.json_safe(content | {"rows": [_plain(row) for row in self.rows]})


@standard_modes(gradients=False)
def compare_detection(
    model: HostModel,
    detectors: Mapping[str, Detector],
    activating: Sequence[str],
    neutral: Sequence[str],
    *,
    concept: str = "",
    diff_means_at: str | None = None,
    pooling: Pooling = "max",
    seed: int = 0,
    batch_size: int = 16,
) -> ConceptComparison:
    """Let methods choose their best score on half of the sentences and judge it on the other half.

    The model reads each sentence once, whatever the number of methods and of hooks. Memory: the scores, and with
    ``diff_means_at`` the activations of the choosing half.

    Args:
        model: any TransformerLens model.
        detectors: methods by name: :meth:`Detector.from_dictionary` of dictionaries, or directions.
        activating: sentences that show the concept; at least 2 different ones, and better 20.
        neutral: sentences that do not.
        concept: the concept in words, for tables.
        diff_means_at: hook at which the difference of means, made from the first half, joins the methods; None leaves
            it out.
        pooling: how the scores of a sentence's tokens become its score, as for :func:`concept_scores`.
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
    if diff_means_at is not None and DIFF_MEANS in methods:
        raise ValueError(f"{DIFF_MEANS!r} is the name of what diff_means_at adds; give your detector another one.")
    if not methods and diff_means_at is None:
        raise ValueError("detectors is empty and diff_means_at is None: there is nothing to compare.")
    warn_of_bos(model, methods.values())
    hooks = [detector.hook_name for detector in methods.values()] + ([diff_means_at] if diff_means_at else [])
    read = partial(token_activations, model, hooks, batch_size=batch_size)
    sizes = [(len(up), len(down)) for up, down in (choosing, judging)]
    # A difference of means detects with what is known only after its pass, so the activations it is made of are kept.
    kept = [list(read(part)) if diff_means_at else read(part) for part in choosing]
    tables = [pool_scores(batches, methods, n, pooling) for batches, n in zip(kept, sizes[0], strict=True)]
    if diff_means_at is not None:
        methods[DIFF_MEANS] = _diff_means(kept, sizes[0], diff_means_at)
        for table, batches, n in zip(tables, kept, sizes[0], strict=True):
            table |= pool_scores(batches, {DIFF_MEANS: methods[DIFF_MEANS]}, n, pooling)
    others = [pool_scores(read(part), methods, len(part), pooling) for part in judging]
    rows = [_row(name, detector, tables, others) for name, detector in methods.items()]
    return ConceptComparison(concept=concept, rows=tuple(rows), n_choosing=sizes[0], n_judging=sizes[1])


def best_column(area: Tensor, d_prime: Tensor) -> int:
    """The score with the highest AUROC, among equals the one with the largest difference in standard deviations."""
    return int(np.lexsort((d_prime.nan_to_num(0.0).numpy(), area.numpy()))[-1])


def _diff_means(batches: Sequence[Iterable[ActivationBatch]], sizes: tuple[int, int], hook_name: str) -> Detector:
    up, down = (sentence_sums(part, hook_name, n, equal_norms=True) for part, n in zip(batches, sizes, strict=True))
    return difference_of(up, down, hook_name, weighting="sentence", equal_norms=True).detector()


def _row(
    method: str, detector: Detector, tables: Sequence[dict[str, Tensor]], others: Sequence[dict[str, Tensor]]
) -> DetectionRow:
    chosen, judged = (
        compare_sentences(*(table[method] for table in part), names=detector.names) for part in (tables, others)
    )
    best = best_column(chosen.auroc, chosen.d_prime)
    names = ("auroc", "auroc_low", "auroc_high", "log_ratio", "d_prime")
    return DetectionRow(
        method=method,
        n_scores=len(detector.names),
        column=best,
        chosen=detector.names[best],
        hook_name=detector.hook_name,
        direction=None if detector.directions is None else detector.directions[best],
        chosen_auroc=float(chosen.auroc[best]),
        **{name: float(getattr(judged, name)[best]) for name in names},
    )


def _plain(row: DetectionRow) -> dict[str, Any]:
    return {field.name: getattr(row, field.name) for field in fields(row) if field.name != "direction"}
