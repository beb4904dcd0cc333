"""What the laws share: models, the places that a model has, and what is read there by the host's own means."""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saelens_ext.host.models import HostModel, resolve_hook
from tests.models_zoo import VOCABULARY, ZOO, Architecture, make_model

LAYER = 1
TOKENS = torch.randint(3, VOCABULARY, (2, 14), generator=torch.Generator().manual_seed(1))


class Host(NamedTuple):
    architecture: str
    row: Architecture
    model: HostModel

    @property
    def plain(self) -> tuple[Tensor, dict[str, Tensor]]:
        return plain_run(self.architecture, type(self.model).__name__)


@cache
def shared_model(architecture: str, model_class: str) -> HostModel:
    return make_model(architecture, model_class)


@cache
def plain_run(architecture: str, model_class: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the activations at all places, with nothing on the model."""
    names = [*places(ZOO[architecture]), f"blocks.{LAYER + 1}.hook_resid_pre"]
    return run(shared_model(architecture, model_class), names)


def stream_places(row: Architecture, layer: int = LAYER) -> list[str]:
    """Where d_model wide vectors are added to the residual stream or stand in it."""
    names = ["hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post"]
    if not row.parallel:
        names.insert(2, "hook_resid_mid")
    return [f"blocks.{layer}.{name}" for name in names]


def places(row: Architecture, layer: int = LAYER) -> list[str]:
    """Where dictionaries are built."""
    inner = ["attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "mlp.hook_in", "ln1.hook_normalized"]
    if not row.experts:
        inner += ["mlp.hook_pre", "mlp.hook_post"]
    return ["hook_embed", *stream_places(row, layer), *(f"blocks.{layer}.{name}" for name in inner)]


@torch.no_grad()
def run(model: HostModel, names: list[str], tokens: Tensor = TOKENS) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and what flows on from places, heads joined, by the host's own means."""
    seen: dict[str, Tensor] = {}
    hooks = [(resolve_hook(model, name), _keep(seen, name)) for name in names]
    with model.hooks(fwd_hooks=hooks):
        logits = model(tokens)
    return logits, seen


def _keep(seen: dict[str, Tensor], name: str) -> Any:
    def keep(x: Tensor, hook: Any) -> None:
        # A HookedTransformer normalises for queries, keys and values apart.
        seen.setdefault(name, x.detach().clone().flatten(2) if x.ndim > 2 else x.detach().clone())

    return keep


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
