"""What a profile's files hold, and whether they belong to a dictionary."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from saelens_ext.analysis.examples import Examples
from saelens_ext.host.hook_names import BLOCKS, spellings_of

# What the JSON file holds of a profile, and as what.
SCALARS = {
    "hook_name": str,
    "hook_aliases": list,
    "n_activations": int,
    "n_unassigned": int,
    "context": int,
    "latent_names": list,
}
TENSORS = ("counts", "mean_activation", "max_activation", "coherence", "mean_distance", "max_distance")
TABLES = ("top", "boundary", "random")


def tensors_of(tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """The tensor fields of a profile, its tables of examples put together."""
    optional = {"coherence", "mean_distance", "max_distance"}
    tables = [table for table in TABLES if table == "top" or any(name.startswith(f"{table}.") for name in tensors)]
    needed = {name for name in TENSORS if name not in optional}
    needed |= {f"{table}.{field.name}" for table in tables for field in fields(Examples)}
    missing = sorted(needed - tensors.keys())
    if missing:
        raise ValueError(f"The profile in {path} lacks {', '.join(missing)}; it is not whole.")
    found: dict[str, Any] = {name: tensors[name] for name in TENSORS if name in tensors}
    return found | {
        table: Examples(**{field.name: tensors[f"{table}.{field.name}"] for field in fields(Examples)})
        for table in tables
    }


def check_belongs(content: dict[str, Any], config: dict[str, Any], what: str) -> None:
    """Raise ValueError if a profile is of another number of latents or another hook than a dictionary."""
    own = (config.get("metadata") or {}).get("hook_name")
    known = content["hook_aliases"]
    # The same place has another name in another host class, to which the dictionary may have been moved since.
    spellings = [] if own is None else [own, *(spelling for kind in BLOCKS for spelling in spellings_of(own, kind))]
    if content["d_sae"] != config.get("d_sae"):
        raise ValueError(
            f"The profile is of {content['d_sae']} latents, {what} has {config.get('d_sae')}: they do not belong "
            "together."
        )
    if own is not None and not set(spellings) & set(known):
        raise ValueError(
            f"The profile was made at {' = '.join(known)}, {what} is of {own!r}: they do not belong together."
        )
