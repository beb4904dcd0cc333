"""Starting points for semi-nonnegative matrix factorisation.

Symbols:
    X: ``(n, d)`` activations. G: ``(n, k)`` codes >= 0. H: ``(k, d)`` features, dense here.

Source: the three starts of Shafran et al. (arXiv 2506.10920), with the sign of each singular component chosen as in
NNDSVD (Boutsidis and Gallopoulos 2008).
"""

import warnings

import torch
from jaxtyping import Float
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

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
    """Centroids as features; each activation's code on its own centroid is the least-squares one.

    Clusters do not depend on where the origin is, but rounding does, so they are found about the mean. The
    features are the centroids themselves, since the factorisation has no intercept.
    """
    mean = x.double().mean(dim=0)
    seed = int(torch.randint(2**31 - 1, (1,), generator=generator))
    # scikit-learn's default, the text "auto", hides from type checkers that a number may be given.
    model = KMeans(n_clusters=k, n_init=1, max_iter=_LLOYD_ITERATIONS, random_state=seed)  # pyright: ignore[reportArgumentType]
    with warnings.catch_warnings():
        # Fewer distinct activations than clusters: the surplus features are duplicates, which the fit deals with.
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = torch.from_numpy(model.fit_predict((x.double() - mean).to(x.dtype).cpu().numpy())).to(x.device).long()
    features = (torch.from_numpy(model.cluster_centers_).to(mean) + mean).to(x.dtype)
    own = features[labels]
    size = own.square().sum(dim=1)
    code = torch.where(size > 0, (x * own).sum(dim=1) / size, 0.0).clamp(min=0)
    return torch.zeros(len(x), k, dtype=x.dtype, device=x.device).scatter_(1, labels[:, None], code[:, None]), features


def _random(x: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Uniform codes and normal features."""
    codes = torch.rand(len(x), k, generator=generator, dtype=torch.float64)
    return codes.to(x), torch.randn(k, x.shape[1], generator=generator, dtype=torch.float64).to(x)
