"""Where an attribution reads its sources off a model, and which of them together make up the whole target.

Symbols
    site   a hook whose activation is a source: a dictionary's output, an MLP's output, the embeddings
    cut    the sites whose contributions sum, with the biases, to the target: every path from the input to the logits
           runs through exactly one of them

A dictionary on the residual stream describes everything that was written below it, so the nearest one to the output
takes the place of all sites before it. A dictionary that lies before it describes the same thing a second time: it is
attributed too, through the same frozen paths, but is not in the cut. A dictionary on an MLP's output, on its neurons
or on an attention output takes the place of that part alone.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sae_lens import SAE

from saelens_ext.host.flat_sae import hooks_of, refuse_sequence_codes
from saelens_ext.host.hook_names import hook_points
from saelens_ext.host.models import HostModel, resolve_hook

BACKENDS = ("linear", "gradient", "relp")

_RESIDUAL = re.compile(r"blocks\.\d+\.(hook_in|hook_out|hook_resid_pre|hook_resid_post)$")
_BLOCK = re.compile(r"blocks\.\d+(?=\.)")
_EMBEDDING = re.compile(r"(hook_embed|embed\.hook_out)$")


class Refusal(ValueError):
    """A backend cannot be used on this model, or with these dictionaries; says why, and not what else can be."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One hook that sources are read off."""

    hook: str
    """The name that fires on the model."""
    kind: str
    """What the whole activation is called where no dictionary describes it: ``"embedding"`` or ``"mlp"``."""
    read: str = ""
    """Where its dictionary reads; another hook for a transcoder."""
    dictionary: int = -1
    """Which dictionary writes here; -1: none."""
    leaf: bool = True
    """Whether what lies before is cut off here."""
    in_cut: bool = True

    @property
    def has_dictionary(self) -> bool:
        return self.dictionary >= 0


def dictionary_sites(model: HostModel, dictionaries: Sequence[SAE[Any]]) -> list[Site]:
    """Where dictionaries read and write on this model.

    Raises:
        ValueError: a dictionary without a hook name, at a hook that the model lacks or that an attached SAE has taken,
            one that codes whole sequences, or two dictionaries at one hook.
    """
    if attached := getattr(model, "acts_to_saes", None):
        raise ValueError(
            f"SAEs are attached to the model ({', '.join(attached)}), which changes what it computes. Detach "
            "them with model.reset_saes() and pass them as dictionaries."
        )
    sites: list[Site] = []
    for index, sae in enumerate(dictionaries):
        refuse_sequence_codes(sae)
        read, write = hooks_of(sae, f"Dictionary {index}")
        site = Site(hook=resolve_hook(model, write), read=resolve_hook(model, read), kind="error", dictionary=index)
        for other in sites:
            if other.hook == site.hook:
                raise ValueError(
                    f"Dictionaries {other.dictionary} and {index} both write at {site.hook}: an activation can be "
                    "taken apart in one way at a time. Attribute with one of them."
                )
        sites.append(site)
    return sites


def base_sites(model: HostModel, backend: str) -> list[Site]:
    """The sites of a model without dictionaries: its embeddings and, where MLPs are frozen, their outputs."""
    embedding = Site(hook=resolve_hook(model, "blocks.0.hook_resid_pre"), kind="embedding")
    return [embedding, *(Site(hook=hook, kind="mlp") for hook in (mlp_outputs(model) if backend == "linear" else ()))]


def mlp_outputs(model: HostModel) -> list[str]:
    """Where MLPs write into the residual stream; blocks without one have none."""
    outputs = (_resolved(model, f"blocks.{layer}.hook_mlp_out") for layer in range(int(model.cfg.n_layers)))
    return [hook for hook in outputs if hook is not None]


def plan_sites(
    model: HostModel, dictionaries: Sequence[Site], base: Sequence[Site], order: Sequence[str], backend: str
) -> list[Site]:
    """The sites to read in one pass, in the order in which they fire, each knowing its part in the cut.

    ``dictionaries`` and ``base`` come from :func:`dictionary_sites` and :func:`base_sites`, ``order`` is of firing.

    Raises:
        Refusal: two dictionaries of which one lies inside the other's MLP, for the linear backend.
    """
    taken = {site.hook for site in dictionaries} | _described_by_parts(model, dictionaries, order, backend)
    sites = [*dictionaries, *(site for site in base if site.hook not in taken)]
    if any(_is_input(site) for site in dictionaries):
        sites = [site for site in sites if site.kind != "embedding"]
    sites.sort(key=lambda site: order.index(site.hook))
    # Every path to the logits runs through these.
    stream = [
        i
        for i, site in enumerate(sites)
        if site.has_dictionary and (_RESIDUAL.match(site.hook) or _is_between(model, site.hook))
    ]
    nearest = stream[-1] if stream else None
    plan = _linear_plan if backend == "linear" else _live_plan
    return plan(model, sites, nearest)


def _linear_plan(model: HostModel, sites: list[Site], nearest: int | None) -> list[Site]:
    if nearest is None:
        return sites
    # Before the residual dictionary, only other dictionaries are worth a pass; and where no edit can reach the stream
    # itself (a bridge reads its middle off the norm's input) the graph must run on below.
    runs_on = any(site.has_dictionary for site in sites[:nearest]) or _is_between(model, sites[nearest].hook)
    before = [replace(site, in_cut=False) for site in sites[:nearest]] if runs_on else []
    return [*before, replace(sites[nearest], leaf=not runs_on), *sites[nearest + 1 :]]


def _live_plan(model: HostModel, sites: list[Site], nearest: int | None) -> list[Site]:
    """Nothing is cut off: the first site starts the graph, and all later ones see everything that comes after."""
    kept = [site for site in sites if site.has_dictionary or nearest is None]
    whole = sites[nearest].hook if nearest is not None else next(site.hook for site in sites if _is_input(site))
    if _is_between(model, kept[0].hook):
        # A bridge reads the middle of a block off its norm's input, behind the point where the stream runs past it.
        kept = [site for site in sites if site.kind == "embedding"] + kept
    return [replace(site, leaf=i == 0, in_cut=site.hook == whole) for i, site in enumerate(kept)]


def _is_input(site: Site) -> bool:
    return site.kind == "embedding" or _EMBEDDING.search(site.hook) is not None


def _described_by_parts(model: HostModel, dictionaries: Sequence[Site], order: Sequence[str], backend: str) -> set[str]:
    """MLP outputs that a dictionary from which they follow, by an output matrix and a norm, takes the place of."""
    if backend != "linear":
        return set()
    parts: set[str] = set()
    taken = {site.hook for site in dictionaries}
    for site in dictionaries:
        written = _written_from(model, site.hook, order)
        both = [hook for hook in written if hook in taken and hook != site.hook]
        if both:
            raise Refusal(
                f"One dictionary writes at {both[0]} and another at {site.hook}, inside the same MLP: the linear "
                "backend can start from one of them only. Leave one out, or use another backend."
            )
        parts |= written
    return parts


def _written_from(model: HostModel, hook: str, order: Sequence[str]) -> set[str]:
    """What follows linearly from the neurons or the output of an MLP in the same block, itself included."""
    block = _BLOCK.match(hook)
    if block is None:
        return set()
    names = (f"{block[0]}.mlp.{end}" for end in ("hook_post", "out.hook_out", "hook_out"))
    chain = [name for name in (_resolved(model, name) for name in names) if name is not None]
    if hook not in chain:
        return set()
    end = _resolved(model, f"{block[0]}.hook_mlp_out")
    behind = {*chain, end} & set(order)
    return {name for name in behind if order.index(hook) <= order.index(name) <= order.index(end)} if end else set()


def _resolved(model: HostModel, name: str) -> str | None:
    try:
        return resolve_hook(model, name)
    except ValueError:
        return None


def _is_between(model: HostModel, hook: str) -> bool:
    """Whether a hook is read off the middle of a block whose MLP follows its attention."""
    block = _BLOCK.match(hook)
    if block is None or getattr(model.cfg, "parallel_attn_mlp", False):
        return False
    return hook == _resolved(model, f"{block[0]}.hook_resid_mid")


def points_ending(model: HostModel, ending: str) -> list[str]:
    """The names of all hook points that end so, each point once."""
    return [name for name, point in hook_points(model).items() if name.endswith(ending) and point.name == name]
