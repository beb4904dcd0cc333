"""Directions as control vectors, for runtimes that know neither SAELens nor TransformerLens.

A control vector is added to what a block of the model puts out, at every token. llama.cpp (``--control-vector``) and
repeng read it from a GGUF file with one float32 tensor ``direction.L`` for block L, counted from 0; llama.cpp leaves
the output of block 0 alone.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from saelens_ext._files import tensors_writer, write_together
from saelens_ext.host.hook_edits import hooked
from saelens_ext.host.hook_names import hook_layer, hook_points, locate, resolve_hook
from saelens_ext.host.models import HostModel
from saelens_ext.host.prompt_passes import device_of, logits_of
from saelens_ext.ops.modes import evaluating, standard_modes
from saelens_ext.steering.interventions import add_direction

_N_TOKENS = 6
_SAME = 1e-3
"""Largest difference of the change at one token from the mean, as a fraction of it, that rounding may explain."""


@standard_modes(model_too=True)
@torch.no_grad()
def export_direction(
    model: HostModel, hook_name: str, direction: Tensor, coefficient: float | int, path: str | Path
) -> Path:
    """Write what :func:`add_direction` does as a control vector for llama.cpp, repeng and the like.

    The vector holds the coefficient: at a scale of 1 (``--control-vector FILE``) the other runtime does what
    ``add_direction(model, hook_name, direction, coefficient)`` does here, as far as its weights are the same.
    ``--control-vector-scaled FILE:-0.5`` goes half as far the other way.

    Such a vector can only be added to the output of a block. At another hook, the same must come out: a direction over
    an MLP's neurons becomes its image under the output matrix, one at a block's input is added one block earlier. That
    the block's output moves by one and the same vector at every token is measured on the model.

    Args:
        model: any TransformerLens model.
        hook_name: any alias of the hook, such as :func:`latent_directions` gives.
        direction: ``(d,)``; only its direction counts.
        coefficient: any sign but 0, in units of the activation.
        path: ends in ``.gguf``, or in ``.safetensors`` for a file with the same tensor and metadata.

    Returns:
        The path.

    Raises:
        ValueError: another ending; a hook whose effect on the block's output depends on the activations (an attention
            output in front of an MLP, neurons with a norm behind the MLP) or lies in front of block 1; as
            :func:`add_direction`.
        ImportError: a GGUF file without the package gguf.

    Examples:
        >>> hook, direction, norm = sx.latent_directions(model, partition, 0)
        >>> path = sx.export_direction(model, hook, direction, 0.5 * norm, "/tmp/region_0.gguf")
    """
    path = Path(path)
    if path.suffix not in _WRITERS:
        raise ValueError(f"path must end in {' or '.join(_WRITERS)}, got {str(path)!r}.")
    if coefficient == 0:
        raise ValueError("coefficient must not be 0: such a control vector changes nothing.")
    layer, vector = _at_block_output(model, hook_name, direction, coefficient)
    if layer < 1:
        raise ValueError(
            f"{hook_name!r} acts in front of block 1, and a control vector acts on the output of block 1 at the "
            "earliest. Use a direction from a later layer."
        )
    write_together({path: lambda temporary: _WRITERS[path.suffix](temporary, layer, vector, _model_type(model))})
    return path


def _at_block_output(model: HostModel, hook_name: str, direction: Tensor, coefficient: float) -> tuple[int, Tensor]:
    """The block (-1: the embedding) whose output moves by one vector at every token, and that vector."""
    add_direction(model, hook_name, direction, coefficient)  # its checks
    name, layer = locate(model, hook_name)[0], hook_layer(model, hook_name)
    if layer is None:
        if name in hook_points(model) and not name.startswith(("embed", "hook_embed", "hook_pos", "pos")):
            raise _depends(hook_name, "lies behind the blocks")
        return -1, direction
    output = f"blocks.{layer}.hook_resid_post"
    if name == locate(model, f"blocks.{layer}.hook_resid_pre")[0]:
        layer, output = layer - 1, hook_name
    if layer < 0:
        return layer, direction
    base = _seen(model, [hook_name, output])
    # As large as what stands there: what is linear shows least rounding then, and what is not shows best.
    size = float(base[hook_name].flatten(2).norm(dim=-1).mean()) or 1.0
    with add_direction(model, hook_name, direction, size):
        moved = _seen(model, [output])[output] - base[output]
    vector = moved.flatten(0, 1).mean(dim=0)
    rounding = max(_SAME, 8 * torch.finfo(next(iter(model.parameters())).dtype).eps)
    if not float((moved - vector).norm(dim=-1).max()) <= rounding * float(vector.norm()):
        raise _depends(hook_name, "moves the output of its block by another vector at every token")
    return layer, (vector * (coefficient / size)).float().cpu()


def _seen(model: HostModel, names: list[str]) -> dict[str, Tensor]:
    """Activations of a few tokens at hooks, ``(1, length, ...)``, each in float32 or wider."""
    seen: dict[str, Tensor] = {}

    def reader(name: str) -> Any:
        def read(x: Tensor, hook: Any = None) -> None:
            seen[name] = x.detach().to(torch.promote_types(x.dtype, torch.float32)).clone()

        return read

    ids = (torch.arange(_N_TOKENS, device=device_of(model))[None] + _N_TOKENS) % model.cfg.d_vocab
    with evaluating(model), hooked(model, [(resolve_hook(model, name), reader(name)) for name in names]):
        logits_of(model, ids)
    return seen


def _depends(hook_name: str, reason: str) -> ValueError:
    return ValueError(
        f"{hook_name!r} {reason}, so no control vector does what add_direction does there. Use a direction of the "
        "residual stream between blocks (hook_resid_post), or of an MLP whose output is added to it unchanged."
    )


def _model_type(model: HostModel) -> str:
    """The name that transformers has for the architecture, such as ``llama``; the class's own where it has none."""
    architecture = str(getattr(model.cfg, "architecture", None) or getattr(model.cfg, "original_architecture", ""))
    names = {cls: kind for kind, cls in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}
    return names.get(architecture, architecture)


# --- files ---


def _write_gguf(path: Path, layer: int, vector: Tensor, model_type: str) -> None:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("A .gguf file needs the package gguf: pip install 'saelens-ext[export]'") from error
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", model_type)
    writer.add_uint32("controlvector.layer_count", 1)
    writer.add_tensor(f"direction.{layer}", vector.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_safetensors(path: Path, layer: int, vector: Tensor, model_type: str) -> None:
    metadata = {"format": "pt", "general.architecture": "controlvector", "controlvector.model_hint": model_type}
    tensors_writer({f"direction.{layer}": vector}, metadata)(path)


_WRITERS = {".gguf": _write_gguf, ".safetensors": _write_safetensors}
