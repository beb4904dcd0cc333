"""Any SAELens SAE, ours or not, on activations that are already flat: one row of ``d_in`` numbers per token."""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, SupportsIndex, cast

from sae_lens import SAE, Transcoder
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.ops.modes import without_autocast

_RESHAPING = ("reshape_fn_in", "reshape_fn_out", "d_head", "hook_z_reshaping_mode")


def check_dictionary(sae: Any, name: str = "sae") -> None:
    """Raise ValueError for anything but a SAE or transcoder of SAELens."""
    if not isinstance(sae, SAE):
        swapped = "; are the model and the dictionary swapped?" if hasattr(sae, "hook_dict") else "."
        raise ValueError(
            f"{name} must be a SAE or transcoder of SAELens, or a subclass of theirs, got {_named(sae)}{swapped} "
            "SAE.load_from_disk(folder) loads a saved one."
        )


def dictionaries_of(given: Any, name: str = "dictionaries") -> list[SAE[Any]]:
    """One dictionary or several as a list; ValueError for anything else among them."""
    is_one = isinstance(given, SAE | str) or not isinstance(given, Iterable)
    saes: list[Any] = [given] if is_one else list(given)
    for sae in saes:
        check_dictionary(sae, name)
    return saes


def dictionaries_by_name(given: Any, name: str = "dictionaries") -> dict[str, SAE[Any]]:
    """Dictionaries by name; ValueError for anything else, or none."""
    if not isinstance(given, Mapping) or not given:
        got = "none" if isinstance(given, Mapping) else _named(given)
        raise ValueError(f"{name} must be at least one dictionary by its name, {{'name': sae}}, got {got}.")
    for key, sae in given.items():
        check_dictionary(sae, f"{name}[{key!r}]")
    return dict(given)


def _named(given: Any) -> str:
    return f"{given!r:.100}" if isinstance(given, str) else f"a {type(given).__name__}"


def refuse_sequence_codes(sae: SAE[Any]) -> None:
    """Raise ValueError for a SAE whose code of a token depends on the tokens before it.

    Such a code has no meaning on rows taken out of their sequence, nor at one step of cached generation.
    """
    if sae.cfg.architecture() == "temporal":
        raise ValueError("A temporal SAE codes a token with all before it, so it cannot be used token by token.")


def hooks_of(sae: SAE[Any], what: str = "This dictionary") -> tuple[str, str]:
    """The hooks at which a dictionary reads and at which it writes; one and the same but for transcoders.

    Its decoder's rows are directions at the second. Messages call it ``what``.

    Raises:
        ValueError: the dictionary does not record them.
    """
    check_dictionary(sae, what)
    read, write = sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out
    if not read:
        raise ValueError(f"{what} names no hook. Set sae.cfg.metadata.hook_name to where it was built.")
    if isinstance(sae, Transcoder) and not write:
        raise ValueError(f"{what} is a transcoder without sae.cfg.metadata.hook_name_out: set it to its output hook.")
    return read, write or read


@contextmanager
def flat_activations(sae: SAE[Any]) -> Iterator[None]:
    """Let a SAE of ``hook_z`` take and give flat activations inside the context; others are left alone.

    The host's own switch cannot be used to turn the reshaping on again: it refuses a hook whose name does not end in
    ``_z``, as on a bridge, and it forgets the head width.
    """
    if not sae.hook_z_reshaping_mode:
        yield
        return
    kept = {name: vars(sae)[name] for name in _RESHAPING if name in vars(sae)}
    sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        for name in _RESHAPING:
            vars(sae).pop(name, None)
        vars(sae).update(kept)


@without_autocast()
def encode_flat(sae: SAE[Any], x: Tensor) -> Tensor:
    """Encode flat activations ``(…, d_in)`` as dense codes ``(…, d_sae)``; ValueError for another width."""
    _checks.width(x, sae.cfg.d_in, "The activation")
    with flat_activations(sae):
        codes = sae.encode(x)
    return codes.to_dense() if codes.is_sparse else codes


def is_one_latent(latents: SupportsIndex | Sequence[SupportsIndex] | None) -> bool:
    """Whether a single latent is named, rather than several or (None) all."""
    # numpy's and torch's scalars count as indices too: latents are often chosen by an argmax.
    return latents is not None and not isinstance(latents, Sequence) and getattr(latents, "ndim", 0) == 0


def latent_indices(sae: SAE[Any], latents: SupportsIndex | Sequence[SupportsIndex] | None) -> list[int]:
    """The latents chosen, one or several (None: all), as a list; ValueError unless each is in [0, d_sae)."""
    check_dictionary(sae)
    if latents is None:
        return list(range(sae.cfg.d_sae))
    indices = [operator.index(index) for index in cast(Any, [latents] if is_one_latent(latents) else latents)]
    wrong = [index for index in indices if not 0 <= index < sae.cfg.d_sae]
    if wrong or not indices:
        raise ValueError(f"latents must be one or several of 0 to {sae.cfg.d_sae - 1}, got {wrong[:5] or indices}.")
    return indices


def latent_rows(sae: SAE[Any], latents: list[int], basis: str | None = None) -> Tensor:
    """The directions of latents ``(m, d)``, detached.

    ``basis`` is "exemplar" or "mean", of a dictionary that has both; None: its rows of ``W_dec``.

    Raises:
        ValueError: the dictionary has no such rows.
    """
    name = "W_dec"
    if basis is not None:
        name = {"exemplar": "exemplars", "mean": "means"}[_checks.choice(basis, ("exemplar", "mean"), "basis")]
    if not hasattr(sae, name):
        raise ValueError(f"A {sae.cfg.architecture()} has no {name}; leave basis out to use its rows of W_dec.")
    return getattr(sae, name).detach()[latents]
