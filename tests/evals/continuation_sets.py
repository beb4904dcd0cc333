"""Sets of continuations with planted views, without a model."""

import numpy as np
import torch

from saelens_ext.continuations.continuation_set import ContinuationSet


def planted_set(number, semantic, attribution, lengths=None, *, noise=0.3, n_sources=30):
    """A set whose row i has the mode ``semantic[i]`` in the one view and ``attribution[i]`` in the other."""
    rng = np.random.default_rng(number)
    n = len(semantic)
    e = 3 * rng.normal(size=(8, 12))[semantic] + noise * rng.normal(size=(n, 12))
    a = 3 * rng.normal(size=(8, n_sources))[attribution] + noise * rng.normal(size=(n, n_sources))
    lengths = torch.as_tensor(rng.integers(1, 9, size=n) if lengths is None else lengths)
    width = int(lengths.max())
    real = torch.arange(width) < lengths[:, None]
    made = ContinuationSet(
        prompt=f"Prefix {number}",
        prefix=f"Prefix {number}",
        prefix_ids=(0, number + 1),
        token_ids=torch.where(real, 5, -1),
        lengths=lengths,
        texts=tuple(f" {number} {row}" for row in range(n)),
        log_probs=torch.where(real, -1.0, 0.0),
        weights=torch.full((n,), 1 / n, dtype=torch.float64),
    )
    e = e / np.linalg.norm(e, axis=1, keepdims=True)
    return made.with_embeddings(e).with_signatures(a)


def two_view_set(number, n=48, **options):
    """Four modes, of which each view alone tells two apart; noise apart from that."""
    mode = np.random.default_rng(100 + number).permutation(np.arange(n) % 4)
    return planted_set(number, mode // 2, mode % 2, **options)


def one_view_set(number, view, n=48, **options):
    """Four modes in one view; the other is noise around one point."""
    mode = np.random.default_rng(100 + number).permutation(np.arange(n) % 4)
    nothing = np.zeros_like(mode)
    return planted_set(number, *((mode, nothing) if view == "semantic" else (nothing, mode)), **options)
