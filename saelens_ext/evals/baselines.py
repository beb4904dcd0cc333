"""Methods without merit of their own, against which a dictionary must stand: made from the same activations.

All measure activations from a centre c, by default their mean; for a fair comparison give that of the dictionary.

Symbols
    x  activations, ``(n, d)``, best those that the dictionary was fitted to
    k  directions, best as many as the dictionary has
    c  centre, ``(d,)``
"""

from copy import deepcopy
from typing import Any

import numpy as np
import torch
from sae_lens import SAE
from sklearn.cluster import KMeans
from torch import Tensor
from transformer_lens import HookedTransformer

from saelens_ext import _checks
from saelens_ext.dictionaries.fit_sae import fit_sae
from saelens_ext.evals.methods import Method
from saelens_ext.host.flat_sae import hooks_of
from saelens_ext.host.models import HostModel, load_model
from saelens_ext.ops.modes import standard_modes
from saelens_ext.ops.precision import wide
from saelens_ext.ops.spherical import has_direction


def random_activations(
    x: Tensor,
    k: int,
    hook_name: str,
    *,
    center: Tensor | None = None,
    seed: int = 0,
    draw: int = 0,
    name: str | None = None,
) -> Method:
    """A coreset: k of the activations, drawn at random, as directions.

    It has what a dictionary of observed activations has but for how they are chosen.

    Args:
        x: activations, ``(n, d)``.
        k: how many, at most n.
        hook_name: where they were read.
        center: c; by default the mean of x.
        seed: of the draw.
        draw: number of this draw, where there are several under one name; each is another.
        name: by default "random activations (K=k)".

    Raises:
        ValueError: k above the number of activations that differ from c.
    """
    rows, origin = _from_center(x, center, k)
    generator = torch.Generator().manual_seed(_seed_of(seed, draw))
    chosen = rows[torch.randperm(len(rows), generator=generator)[:k].to(rows.device)]
    what = f"{k} activations drawn at random, in place of those that a dictionary chose."
    title = name or f"random activations (K={k})"
    return _control(title, chosen, hook_name, origin, draw=draw, description=what)


@standard_modes()
def gaussian_directions(
    x: Tensor,
    k: int,
    hook_name: str,
    *,
    center: Tensor | None = None,
    seed: int = 0,
    draw: int = 0,
    name: str | None = None,
) -> Method:
    """k directions uniform on the sphere, and their opposites; arguments as :func:`random_activations`."""
    _, origin = _centered(x, center)
    generator = torch.Generator().manual_seed(_seed_of(seed, draw))
    rows = torch.randn(_checks.positive(k, "k"), x.shape[1], generator=generator).to(origin)
    what = f"{k} directions drawn from a Gaussian, with both signs, which know nothing of the model."
    title = name or f"Gaussian directions (K={k})"
    return _control(title, rows, hook_name, origin, draw=draw, both_signs=True, description=what)


@standard_modes()
def principal_directions(
    x: Tensor, k: int, hook_name: str, *, center: Tensor | None = None, name: str | None = None
) -> Method:
    """The first k principal components about c, and their opposites; arguments as :func:`random_activations`.

    Raises:
        ValueError: k above the smaller of n and d.
    """
    rows, origin = _centered(x, center)
    _at_most(k, min(rows.shape), "principal components")
    # Of the d x d matrix, which is small however many activations there are; on the CPU, where float64 is.
    wide = rows.cpu().double()
    components = torch.linalg.eigh(wide.T @ wide).eigenvectors.T.flip(0)[:k].to(origin)
    what = f"The first {k} principal components of the activations, with both signs."
    title = name or f"principal components (K={k})"
    return _control(title, components, hook_name, origin, both_signs=True, description=what)


@standard_modes()
def kmeans_directions(
    x: Tensor, k: int, hook_name: str, *, center: Tensor | None = None, seed: int = 0, name: str | None = None
) -> Method:
    """The k means of a k-means clustering of the unit directions of x - c; arguments as :func:`random_activations`.

    Raises:
        ValueError: k above the number of activations that differ from c.
    """
    rows, origin = _from_center(x, center, k)
    units = torch.nn.functional.normalize(rows.float(), dim=1)
    clustering: Any = KMeans(k, n_init="auto", random_state=seed)
    found = clustering.fit(units.numpy(force=True))
    means = torch.from_numpy(found.cluster_centers_).to(origin)
    what = f"The means of a k-means clustering of the activations' directions into {k}."
    return _control(name or f"k-means (K={k})", means, hook_name, origin, description=what)


def single_neurons(
    x: Tensor, k: int, hook_name: str, *, center: Tensor | None = None, name: str | None = None
) -> Method:
    """The k coordinates of x with the largest variance, and their opposites; arguments as :func:`random_activations`.

    Raises:
        ValueError: k above d.
    """
    rows, origin = _centered(x, center)
    _at_most(k, rows.shape[1], "coordinates")
    largest = wide(rows).var(dim=0, correction=0).argsort(descending=True, stable=True)[:k]
    axes = torch.eye(rows.shape[1], device=origin.device)[largest].to(origin)
    what = f"The {k} single coordinates of the activations with the largest variance, with both signs."
    return _control(name or f"single neurons (K={k})", axes, hook_name, origin, both_signs=True, description=what)


def trained_sae(
    x: Tensor,
    k: int,
    hook_name: str,
    *,
    architecture: str = "topk",
    training_samples: int = 200_000,
    seed: int = 0,
    name: str | None = None,
) -> Method:
    """A SAE of k latents, trained on the same activations, scored by its codes.

    Args:
        x: activations, ``(n, d)``.
        k: latents.
        hook_name: where they were read.
        architecture: as for :func:`~saelens_ext.dictionaries.fit_sae.fit_sae`.
        training_samples: activations to train on, repeats included.
        seed: of the training.
        name: by default "SAE (K=k)".
    """
    options: dict[str, Any] = {"architecture": architecture, "training_samples": training_samples, "seed": seed}
    sae = fit_sae(x, k, hook_name=hook_name, batch_size=min(1024, training_samples), **options)
    what = f"A {architecture} SAE of {k} latents, trained on {training_samples} of the same activations."
    return Method.from_dictionary(name or f"SAE (K={k})", sae, similarity="code", description=what)


def matched_controls(sae: SAE[Any], x: Tensor, *, n_draws: int = 5, seed: int = 0) -> list[Method]:
    """The controls of a dictionary: coresets and Gaussian directions, as many as it has latents, about its centre.

    Args:
        sae: the dictionary; not a transcoder, whose directions live at another hook than its activations.
        x: activations at its hook, best those it was fitted to.
        n_draws: coresets, whose results are averaged.
        seed: of the draws.

    Raises:
        ValueError: more latents than activations, or another width.
    """
    read, write = hooks_of(sae)
    if read != write:
        raise ValueError(
            f"The dictionary reads at {read} and writes at {write}: make its controls with random_activations from "
            "activations at the hook it writes to."
        )
    k = sae.W_dec.shape[0]
    options: dict[str, Any] = {"center": sae.b_dec.detach().to(x), "seed": seed}
    coresets = [random_activations(x, k, read, draw=draw, **options) for draw in range(n_draws)]
    return [*coresets, gaussian_directions(x, k, read, **options)]


@standard_modes()
def untrained_twin(model: HostModel, *, seed: int = 0) -> HostModel:
    """The same architecture with the weights that training would start from.

    What can be detected in it is there without learning: the tokens themselves.

    Args:
        model: any TransformerLens model; left as it is.
        seed: of the weights.
    """
    device = next(iter(model.parameters())).device
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        if isinstance(model, HookedTransformer):
            cfg = deepcopy(model.cfg)
            cfg.init_weights, cfg.seed = True, None
            return type(model)(cfg, model.tokenizer, move_to_device=False).to(device).eval()
        original: Any = model.original_model
        fresh = type(original)(deepcopy(original.config)).to(device)
        twin: Any = load_model(str(model.cfg.model_name), hf_model=fresh, tokenizer=model.tokenizer)
    if getattr(model, "compatibility_mode", False):
        twin.enable_compatibility_mode()
    return twin


def _control(
    name: str,
    rows: Tensor,
    hook_name: str,
    origin: Tensor,
    *,
    both_signs: bool = False,
    draw: int = 0,
    description: str,
) -> Method:
    return Method.from_directions(
        name, rows, hook_name, center=origin, both_signs=both_signs, kind="control", draw=draw, description=description
    )


@standard_modes()
def _centered(x: Tensor, center: Tensor | None) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or not len(x) or not x.is_floating_point():
        raise ValueError(f"Activations must be floating point of shape (n, d), got {x.dtype} of {tuple(x.shape)}.")
    rows = _checks.finite(x.detach(), "activations").to(torch.promote_types(x.dtype, torch.float32))
    origin = rows.mean(dim=0) if center is None else _checks.width(center.detach(), x.shape[1], "center").to(rows)
    return rows - origin, origin


def _from_center(x: Tensor, center: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The differences from c that have a direction, at least k of them, and c."""
    rows, origin = _centered(x, center)
    rows = rows[has_direction(rows.norm(dim=1))]
    _at_most(k, len(rows), "activations that differ from the centre")
    return rows, origin


def _at_most(k: int, n: int, what: str) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in 1 to {n}, the number of {what}, got {k!r}. Give more activations or lower k.")


def _seed_of(seed: int, draw: int) -> int:
    """Another seed for each draw, that of draw 0 being the one given."""
    return seed if draw == 0 else int(np.random.SeedSequence([seed, draw]).generate_state(1)[0])
