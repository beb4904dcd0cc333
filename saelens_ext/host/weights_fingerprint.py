"""Which weights a module has, enough to know them again."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from saelens_ext.host.models import HostModel, describe_model

# Entries of each tensor that are looked at.
_SAMPLED = 4096


def weights_fingerprint(module: torch.nn.Module) -> str:
    """A hash of a sample of all its tensors: other weights give another, and it costs next to nothing."""
    return tensors_fingerprint(module.state_dict())


def tensors_fingerprint(tensors: Mapping[str, Any]) -> str:
    """The same of tensors by name."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        if isinstance(value, torch.Tensor):
            flat = value.detach().flatten()
            sample = flat[:: max(1, len(flat) // _SAMPLED)].cpu().double()
            digest.update(f"{name} {tuple(value.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def identify_model(model: HostModel) -> dict[str, Any]:
    """What decides the activations that a model gives: its description with a fingerprint of its weights; JSON-safe."""
    return describe_model(model) | {"weights": weights_fingerprint(model)}
