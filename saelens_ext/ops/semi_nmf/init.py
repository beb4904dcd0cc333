"""Starting points for semi-nonnegative matrix factorisation.

Symbols:
    X: ``(n, d)`` activations. G: ``(n, k)`` codes >= 0. H: ``(k, d)`` features, dense here.

Source: the three starts of Shafran et al. (arXiv 2506.10920), with the sign of each singular component chosen as in
NNDSVD (Boutsidis and Gallopoulos 2008), and k-means of directions (Dhillon and Modha 2001), to which large activations
are no more than others.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from saelens_ext.ops.semi_nmf.updates import CHUNK_ROWS, normalised

_OVERSAMPLING = 16
_POWER_ITERATIONS = 4
_LLOYD_ITERATIONS = 15


def initialise(
    x: Float[Tensor, "n d"], k: int, init: str, generator: torch.Generator
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "k d"]]:
    """Codes and features to start from.

    Args:
        x: ``(n, d)`` activations.
        k: features.
        init: ``"svd"``, ``"kmeans"`` or ``"random"``.
        generator: on the CPU; advanced.

    Raises:
        ValueError: more features than the start can give.
    """
    n, d = x.shape
    if init == "svd" and k > min(n, d):
        raise ValueError(
            f"n_components is {k}, but init='svd' gives at most min(n, d) = {min(n, d)} components for {n} activations "
            f"of {d} neurons. Ask for fewer, or use init='kmeans' (up to {n}) or 'random'."
        )
    if init == "kmeans" and k > n:
        raise ValueError(
            f"n_components is {k}, but init='kmeans' needs at least as many activations and there are {n}. "
            "Ask for fewer, collect more, or use init='random'."
        )
    return {"svd": _svd, "kmeans": _kmeans, "random": _random}[init](x, k, generator)


def _svd(x: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The first k singular components; of the two signs of each, the one whose positive codes carry more of it.

    The published code takes the signs as they come, and so deletes a random half of each component.
    """
    left, values, right = _singular_components(x, k, generator)
    positive, negative = left.clamp(min=0).square().sum(dim=0), left.clamp(max=0).square().sum(dim=0)
    sign = torch.where(positive >= negative, 1.0, -1.0).to(x.dtype)
    root = values.sqrt() * sign
    return (left * root).clamp(min=0), right * root[:, None]


def _singular_components(x: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """U ``(n, k)``, S ``(k,)``, V' ``(k, d)``; by subspace iteration where k is well below both sizes."""
    width = k + _OVERSAMPLING
    if 2 * width >= min(x.shape):
        left, values, right = torch.linalg.svd(x, full_matrices=False)
        return left[:, :k], values[:k], right[:k]
    basis = torch.randn(x.shape[1], width, generator=generator, dtype=torch.float64).to(x)
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(x.T @ (x @ basis)).Q
    left, values, small = torch.linalg.svd(x @ basis, full_matrices=False)
    return left[:, :k], values[:k], (small @ basis.T)[:k]


def _kmeans(x: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Directions of spherical k-means as features; each activation has a code on its own alone, the least-squares one.

    A direction that no activation is nearest to starts again at the activation that is farthest from its own.
    """
    first = torch.randperm(len(x), generator=generator)[:k].sort().values
    features = normalised(x[first.to(x.device)])[0]
    for _ in range(_LLOYD_ITERATIONS):
        labels, products = _nearest(x, features)
        # Activations weigh the same, however large: their directions are averaged, not they.
        size = torch.linalg.vector_norm(x, dim=1).clamp(min=torch.finfo(x.dtype).tiny)
        sums = torch.zeros_like(features, dtype=torch.float64)
        for rows, label, length in zip(*(part.split(CHUNK_ROWS) for part in (x, labels, size)), strict=True):
            sums.index_add_(0, label, (rows / length[:, None]).double())
        empty = (torch.bincount(labels, minlength=k) == 0).nonzero()[:, 0]
        farthest = (products / size).sort(stable=True).indices[: len(empty)]
        sums[empty[: len(farthest)]] = x[farthest].double()
        features = normalised(sums.to(x.dtype))[0]
    labels, products = _nearest(x, features)
    codes = torch.zeros(len(x), k, dtype=x.dtype, device=x.device)
    return codes.scatter_(1, labels[:, None], products.clamp(min=0)[:, None]), features


def _nearest(x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Of each activation: which unit feature it has the largest product with, and that product."""
    parts = [(rows @ features.T).max(dim=1) for rows in x.split(CHUNK_ROWS)]
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])


def _random(x: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Uniform codes and normal features."""
    codes = torch.rand(len(x), k, generator=generator, dtype=torch.float64)
    return codes.to(x), torch.randn(k, x.shape[1], generator=generator, dtype=torch.float64).to(x)
