"""Which sources are the columns of a signature where the caller fixes them, and how much each kind of source has."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor

from saelens_ext.continuations.attribution.sites import Site
from saelens_ext.continuations.attribution.sources import SiteSources
from saelens_ext.continuations.source_table import SourceTable
from saelens_ext.host.models import HostModel, resolve_hook

_OF_DICTIONARIES = ("latent", "error", "bias")


def known_sources(
    model: HostModel, saes: Sequence[SAE[Any]], sites: Sequence[Site], n_prefix: int, table: SourceTable
) -> SourceTable:
    """A table of fixed sources under this model's hook names and these dictionaries' numbers.

    Raises:
        ValueError: no source, one twice, or one that these sites do not have at a prefix of so many tokens.
    """
    if not len(table):
        raise ValueError("sources has no column; give the table of an attributed set, or None to choose columns.")
    resolved = {hook: resolve_hook(model, hook) for hook in dict.fromkeys(table.hooks)}
    table = replace(table, hooks=tuple(resolved[hook] for hook in table.hooks))
    if len(set(table.keys)) < len(table):
        twice = next(key for i, key in enumerate(table.keys) if key in table.keys[:i])
        raise ValueError(f"sources has {_spelled(twice)}, twice; every column must be another source.")
    by_hook = {site.hook: site for site in sites}
    for key in table.keys:
        kind, hook, position, latent = key
        site = by_hook.get(hook)
        if site is None or kind not in (_OF_DICTIONARIES if site.has_dictionary else (site.kind,)):
            have = ", ".join(f"{s.hook} ({'dictionary' if s.has_dictionary else s.kind})" for s in sites)
            raise ValueError(
                f"sources has {_spelled(key)}, which these dictionaries and this backend do not have; they have "
                f"sources at {have}. Attribute with the dictionaries and the backend of the set that the table is of."
            )
        if not 0 <= position < n_prefix:
            raise ValueError(
                f"sources has {_spelled(key)}, and this prefix has positions 0 to {n_prefix - 1}: fixed sources need "
                "a prefix of the same length."
            )
        width = saes[site.dictionary].cfg.d_sae if kind == "latent" else 0
        if kind == "latent" and not 0 <= latent < width:
            raise ValueError(f"sources has {_spelled(key)}, and the dictionary there has latents 0 to {width - 1}.")
    return replace(table, dictionaries=tuple(by_hook[hook].dictionary for hook in table.hooks))


def _spelled(key: tuple[str, str, int, int]) -> str:
    kind, hook, position, latent = key
    return f"the {kind}{f' {latent}' if kind == 'latent' else ''} at {hook}, position {position}"


def fixed_columns(effects: Tensor, table: SourceTable, wanted: SourceTable) -> tuple[Tensor, SourceTable]:
    """The columns of ``effects`` ``(n, m)`` that are wanted, with what they are in this prefix; 0 where inactive."""
    place = {key: i for i, key in enumerate(table.keys)}
    at = [place.get(key, len(table)) for key in wanted.keys]
    padded = torch.cat([effects, effects.new_zeros(len(effects), 1)], dim=1)
    inactive = replace(wanted, activations=(0.0,) * len(wanted))
    rows = [place.get(key, len(table) + i) for i, key in enumerate(wanted.keys)]
    return padded[:, at], SourceTable.joined([table, inactive]).select(rows)


def by_kind(parts: Sequence[SiteSources], effects: Tensor, backend: str) -> dict[str, Any]:
    """Each kind's fraction of the absolute effect, and the mean over continuations of its signed sum.

    On the linear backend sources of the cut add up, and a dictionary that describes the same activation once more does
    not count. The other backends cut at one place only, and whatever lies on a path has the whole effect of the path:
    there every source counts, and kinds overlap.
    """
    live = backend != "linear"
    absolute: dict[str, float] = {}
    signed: dict[str, float] = {}
    for part, block in zip(parts, effects.split([len(part.kinds) for part in parts], dim=1), strict=True):
        if not (part.site.in_cut or live):
            continue
        sizes, means = block.abs().sum(dim=0).tolist(), block.mean(dim=0).tolist()
        for kind, size, mean in zip(part.kinds, sizes, means, strict=True):
            absolute[kind] = absolute.get(kind, 0.0) + size
            signed[kind] = signed.get(kind, 0.0) + mean
    total = sum(absolute.values()) or 1.0
    return {
        "share_by_kind": {kind: value / total for kind, value in sorted(absolute.items())},
        "sum_by_kind": dict(sorted(signed.items())),
        "kinds_overlap": live and sum(bool(part.kinds) for part in parts) > 1,
    }
