"""Whether latents of two dictionaries are active on the same tokens, which needs no common space of directions.

Symbols
    A, B  tokens on which two latents are strongest, at most ``top_n`` each: places (sequence, position) in the stream
    F1    2 |A and B| / (|A| + |B|), in [0, 1]; the same as Dice's coefficient
    shift the other dictionary's tokens moved along the stream by a random number of places: what chance gives
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations, permutations
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from sae_lens import SAE
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.activations.stream import ActivationStream
from saelens_ext.evals.evidence import Evidence, corrected
from saelens_ext.evals.verdicts import LEVEL
from saelens_ext.host.flat_sae import dictionaries_by_name, encode_flat, hooks_of
from saelens_ext.host.hook_names import resolve_hook
from saelens_ext.ops.modes import standard_modes
from saelens_ext.ops.resampling import Interval, monte_carlo_p

STRONG = 0.5
"""Partners of a larger F1 are called strong."""
FOUND, SHIFTED = "same tokens", "shifted tokens"


@dataclass(kw_only=True, eq=False)
class OverlapEvidence(Evidence):
    """How far latents of one dictionary are active on the tokens of another's; intervals redraw documents."""

    kind: ClassVar[str] = "overlap"
    title: ClassVar[str] = "Overlap by tokens"
    question: ClassVar[str] = "Are latents of one dictionary active on the same tokens as those of another?"
    unit: ClassVar[str] = "latent"
    unit_text: ClassVar[str] = (
        "Figures are over all latents of a dictionary; hardly active ones count 0. Intervals redraw documents "
        "of the stream; the test shifts the other dictionary's tokens along the stream."
    )
    groups: ClassVar[tuple[str, ...]] = ("pair",)
    metrics: ClassVar[dict[str, str]] = {
        "share_strong": f"share of all latents with a partner of F1 above {STRONG}",
        "f1": "F1 with the best partner",
        "one_to_one": "F1 with the partner in the best one-to-one assignment",
    }
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    bootstrap: dict[str, Tensor] = field(default_factory=dict)
    """By pair, the share of strong latents in every redraw of documents: float64 ``(n_bootstrap,)``."""
    null: dict[str, Tensor] = field(default_factory=dict)
    """By pair, the share of strong latents under every shift: float64 ``(n_shifts,)``."""
    partners: dict[str, Tensor] = field(default_factory=dict)
    """By pair, the best partner of each latent: int64 ``(k,)``, -1 where no token is shared."""

    def _estimate(self, metric: str, group: Mapping[str, Any], method: str, values: np.ndarray) -> Interval:
        """The interval of the share is from redrawing documents; others have none."""
        low = high = np.nan
        if metric == self.headline and method == FOUND:
            tail = (1 - self.settings["confidence"]) / 2
            low, high = np.quantile(self.bootstrap[group["pair"]].numpy(), [tail, 1 - tail])
        return Interval(values.mean(), low, high, len(values))

    def comparisons(self, reference: str | None = None, *, metric: str | None = None) -> pd.DataFrame:
        """The share of strong latents against that under shifts, one-sided, with Holm's correction over pairs.

        Args:
            reference: "same tokens", the only method whose merit is asked.
            metric: "share_strong", the only one that is tested.
        """
        self._subjects(reference)
        _checks.choice(metric or self.headline, (self.headline,), "metric")
        rows = []
        for group, table in self._parts(self.headline):
            null = self.null[group["pair"]].numpy()
            share = float(table[FOUND].mean())
            p = monte_carlo_p(share - 1e-12, null, side="greater")
            row = {**group, "method": FOUND, "other": SHIFTED, "difference": share - null.mean()}
            rows.append(row | {"low": np.nan, "high": np.nan, "p": p, "n_units": len(table), "n_undefined": 0})
        return corrected(pd.DataFrame(rows))

    def verdict(self, reference: str | None = None) -> str:
        """How many latents of each dictionary have a strong partner in each other, and whether shifts give as many.

        Args:
            reference: as for :meth:`comparisons`.
        """
        table = self.comparisons(reference)
        figures = self.summary(metric=self.headline)
        found = figures[figures["method"] == FOUND].set_index("pair")
        least = len(table) / (1 + len(next(iter(self.null.values()))))
        lines = []
        for row in table.to_dict("records"):
            own: Any = found.loc[row["pair"]]
            above = "more than" if row["p_holm"] < LEVEL else "which cannot be told from"
            lines.append(
                f"{row['pair']}: {own['estimate']:.0%} of all {int(own['n_units'])} latents ({own['low']:.0%} to "
                f"{own['high']:.0%}) have a partner of F1 above {STRONG}, {above} shifted tokens give "
                f"({own['estimate'] - row['difference']:.0%}, corrected p = {row['p_holm']:.2g})."
            )
        if least >= LEVEL:
            lines.append(
                f"Too few shifts for any claim: {len(table)} pairs need more than {len(table) / LEVEL - 1:.0f}, and "
                f"the smallest corrected p-value possible is {least:.2g}."
            )
        return "\n".join(lines)


@standard_modes(gradients=False)
def overlap_by_tokens(
    saes: Mapping[str, SAE[Any]],
    stream: ActivationStream,
    *,
    top_n: int = 100,
    min_active: int = 20,
    n_shifts: int = 20,
    n_bootstrap: int = 200,
    confidence: float | int = 0.95,
    seed: int = 0,
) -> OverlapEvidence:
    """Compare dictionaries by the tokens on which their latents are strongest.

    Of every latent, the ``top_n`` tokens with the largest positive codes are kept; a latent that is positive on fewer
    than ``min_active`` tokens has none, and counts 0. Its F1 is that with its best partner. All latents are in the
    denominator of every figure.

    Memory: ``top_n`` values and places per latent, and the codes of one batch.

    Args:
        saes: at least 2 dictionaries by name, each of a hook of the stream; their widths may differ.
        stream: what is read, once.
        top_n: tokens per latent, at least ``min_active``.
        min_active: at least 1.
        n_shifts: shifts of the null, at least 1.
        n_bootstrap: redraws of documents.
        confidence: of the intervals, in (0, 1).
        seed: of shifts and redraws.

    Raises:
        ValueError: fewer than 2 dictionaries, ``top_n`` below ``min_active``, a hook that the stream does not read, or
            a stream of fewer than 2 tokens.

    Examples:
        >>> found = sx.overlap_by_tokens({"a": partition, "b": partition}, stream, min_active=1)
        >>> bool((found.per_unit("f1")["same tokens"] > 0.99).all())  # a dictionary overlaps with itself
        True

    Source: arXiv 2605.14347, which leaves latents without a shared token out of the denominator and has no null.
    """
    saes = dictionaries_by_name(saes, "saes")
    if len(saes) < 2:
        raise ValueError(f"saes must be at least 2 dictionaries by name, got {len(saes)}.")
    _checks.positive(min_active, "min_active")
    if _checks.positive(top_n, "top_n") < min_active:
        raise ValueError(f"top_n must be at least min_active={min_active}, got {top_n}.")
    _checks.positive(n_shifts, "n_shifts")
    _checks.positive(n_bootstrap, "n_bootstrap")
    _checks.between(confidence, 0, 1, "confidence")
    tops, documents = _strongest(saes, stream, top_n, min_active)
    n = len(documents)
    if n < 2:
        raise ValueError(f"The stream holds {n} token; shifts need at least 2.")
    generator = np.random.default_rng(seed)
    shifts = generator.integers(1, n, size=n_shifts).tolist()
    _, numbers = np.unique(documents, return_inverse=True)
    n_documents = int(numbers.max()) + 1
    draws = generator.multinomial(n_documents, np.full(n_documents, 1 / n_documents), size=n_bootstrap)
    # The same from either side, but for which latents are rows.
    f1s, strong = dict[tuple[str, str], np.ndarray](), dict[tuple[str, str], list[float]]()
    for name, other in combinations(saes, 2):
        f1s[name, other] = _f1(tops[name], tops[other])
        f1s[other, name] = f1s[name, other].T
        redrawn = (_f1(tops[name], tops[other], weights[numbers]) for weights in draws)
        shares = [[(f1.max(axis=axis) > STRONG).mean() for axis in (1, 0)] for f1 in redrawn]
        strong[name, other], strong[other, name] = map(list, zip(*shares))
    cells, parts = [], {"bootstrap": {}, "null": {}, "partners": {}}
    for name, other in permutations(saes, 2):
        pair, own, theirs = f"{name} in {other}", tops[name], tops[other]
        f1 = f1s[name, other]
        best, null = f1.max(axis=1), np.stack([_f1(own, _moved(theirs, s)).max(axis=1) for s in shifts])
        rows, columns = linear_sum_assignment(f1, maximize=True)
        assigned = np.zeros(len(f1))
        assigned[rows] = f1[rows, columns]
        values = {"share_strong": (best > STRONG, (null > STRONG).mean(axis=0)), "f1": (best, null.mean(axis=0))}
        values["one_to_one"] = (assigned, None)
        for metric, both in values.items():
            for method, column in zip((FOUND, SHIFTED), both):
                if column is not None:
                    where = {"pair": pair, "method": method, "metric": metric}
                    latents = np.arange(len(column))
                    cells.append(pd.DataFrame({**where, "latent": latents, "value": column.astype(np.float64)}))
        parts["bootstrap"][pair] = torch.tensor(strong[name, other], dtype=torch.float64)
        parts["null"][pair] = torch.from_numpy((null > STRONG).mean(axis=1))
        parts["partners"][pair] = torch.from_numpy(np.where(best > 0, f1.argmax(axis=1), -1))
    return OverlapEvidence(
        cells=pd.concat(cells, ignore_index=True),
        kinds={FOUND: "unsupervised", SHIFTED: "control"},
        descriptions={
            FOUND: "The tokens on which latents of both dictionaries are strongest.",
            SHIFTED: "The same with the other dictionary's tokens shifted by a random number of places.",
        },
        settings={
            "top_n": top_n, "min_active": min_active, "n_shifts": n_shifts, "n_bootstrap": n_bootstrap,
            "confidence": confidence, "seed": seed, "n_tokens": n, "n_documents": n_documents,
        },
        **parts,
    )  # fmt: skip


def _strongest(
    saes: Mapping[str, SAE[Any]], stream: ActivationStream, top_n: int, min_active: int
) -> tuple[dict[str, csr_array], np.ndarray]:
    """Per dictionary, which tokens each latent is strongest on ``(k, n)``; and the document of every token."""
    fired = dict(zip(stream.hook_names, stream.requested_hook_names))
    hooks = {}
    for name, sae in saes.items():
        hook = resolve_hook(stream.model, hooks_of(sae)[0])
        hooks[name] = fired[_checks.choice(hook, tuple(fired), f"the hook of {name}")]
    values = {name: torch.empty(sae.cfg.d_sae, 0) for name, sae in saes.items()}
    places = {name: torch.empty(sae.cfg.d_sae, 0, dtype=torch.int64) for name, sae in saes.items()}
    active = {name: torch.zeros(sae.cfg.d_sae, dtype=torch.int64) for name, sae in saes.items()}
    documents, n = [], 0
    for batch in stream:
        for name, sae in saes.items():
            codes = encode_flat(sae, batch.activations[hooks[name]].to(sae.W_dec)).T.float().cpu()
            active[name] += (codes > 0).sum(dim=1)
            rows = torch.arange(n, n + codes.shape[1]).expand(len(codes), -1)
            codes, rows = torch.cat([values[name], codes], dim=1), torch.cat([places[name], rows], dim=1)
            # Of equal codes the first in the stream are kept, however it is batched.
            order = codes.sort(dim=1, descending=True, stable=True).indices[:, :top_n]
            values[name], places[name] = codes.gather(1, order), rows.gather(1, order)
        documents.append(batch.document_ids)
        n += len(batch)
    tops = {}
    for name in saes:
        kept = (values[name] > 0) & (active[name] >= min_active)[:, None]
        latents = kept.nonzero()[:, 0].numpy()
        ones = np.ones(len(latents))
        tops[name] = csr_array((ones, (latents, places[name][kept].numpy())), shape=(len(kept), n))
    return tops, torch.cat(documents).numpy()


def _moved(tokens: Any, shift: int) -> csr_array:
    moved = tokens.tocoo()
    n = tokens.shape[1]
    return csr_array((moved.data, (moved.row, (moved.col + shift) % n)), shape=tokens.shape)


def _f1(own: Any, theirs: Any, weights: np.ndarray | None = None) -> np.ndarray:
    """F1 of every two latents ``(k, k')``, each token with a weight; 0 where either has none."""
    weighted = own if weights is None else own * weights[None].astype(np.float64)
    w = np.ones(own.shape[1]) if weights is None else weights.astype(np.float64)
    both = (weighted @ theirs.T).toarray()
    sizes = (own @ w)[:, None] + (theirs @ w)[None]
    return np.divide(2 * both, sizes, out=np.zeros_like(both), where=sizes > 0)
