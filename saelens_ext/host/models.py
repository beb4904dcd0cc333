"""Host models: loading and describing them, and moving an SAE from one to another.

Which place of a model a hook name means is settled in `hook_names`; its functions are offered here too.
"""

import tempfile
import warnings
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import torch
from sae_lens import SAE, HookedSAETransformer, SAETransformerBridge
from sae_lens.load_model import HookedProxyLM
from transformer_lens import HookedTransformer
from transformer_lens.loading_from_pretrained import make_model_alias_map
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources.transformers import boot
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from saelens_ext import _checks
from saelens_ext.host.agreement import Before, Watched
from saelens_ext.host.bos import text_start, warn_of_other_bos
from saelens_ext.host.converted import hooked_from_hf
from saelens_ext.host.devices import check_spread, chosen_device, chosen_dtype
from saelens_ext.host.flat_sae import check_dictionary
from saelens_ext.host.hook_names import AnyHost, hook_layer, locate, output_behind, resolve_hook, stop_layer
from saelens_ext.host.hook_pass import describe_proxy
from saelens_ext.host.mended_bridges import mend_bridge, warn_of_other_model
from saelens_ext.host.scaled_contributions import run_replaced_points
from saelens_ext.host.text_only import text_only
from saelens_ext.host.weight_processing import (
    WITHIN_A_LAYER,
    activation_differences,
    normalization_type,
    writing_weights_centered,
)
from saelens_ext.ops.memory import memory_for
from saelens_ext.ops.modes import out_of_inference, standard_modes

HostModel = Union[HookedTransformer, TransformerBridge]
"""The models that activations are read from: `HookedSAETransformer` and `SAETransformerBridge` are subclasses."""

AnySAE = TypeVar("AnySAE", bound=SAE)

__all__ = [
    "HostModel",
    "describe_model",
    "hook_layer",
    "in_residual_space",
    "load_model",
    "resolve_hook",
    "retarget",
    "stop_layer",
    "tokenizer_of",
]


def check_model(model: Any, *, proxy: bool = True) -> None:
    """Raise ValueError for anything but a hosted model, or SAELens' proxy of one where that will do."""
    if not isinstance(model, (HookedTransformer, TransformerBridge, *((HookedProxyLM,) if proxy else ()))):
        named = isinstance(model, str | Path)
        load = f"load_model({str(model)!r})" if named else "load_model(name, hf_model=model, tokenizer=tokenizer)"
        given = repr(str(model)) if named else f"a {type(model).__name__}"
        raise ValueError(
            f"model must be a HookedSAETransformer or an SAETransformerBridge, got {given}: saelens_ext.{load} makes "
            "one."
        )
    warn_of_other_model(model)


def describe_model(model: HostModel | HookedProxyLM) -> dict[str, Any]:
    """What decides which activations a model gives, as a JSON-safe dictionary.

    Returns:
        ``model_name``, ``model_class_name`` (``"HookedSAETransformer"``, ``"SAETransformerBridge"``, …),
        ``compatibility_mode`` (None for a `HookedTransformer`), ``normalization_type`` (ends in ``Pre`` once the norms'
        weights are folded away), ``writing_weights_centered`` (measured on the embedding: whether what is written to
        the residual stream has its mean over the width removed), ``dtype``, ``n_layers`` and ``d_model``.
    """
    check_model(model)
    if isinstance(model, HookedProxyLM):
        return describe_proxy(model)
    cfg = model.cfg
    mode = getattr(model, "compatibility_mode", None)
    return {
        "model_name": cfg.model_name,
        "model_class_name": type(model).__name__,
        "compatibility_mode": None if mode is None else bool(mode),
        "normalization_type": normalization_type(model),
        "writing_weights_centered": writing_weights_centered(model),
        "dtype": str(next(iter(model.parameters())).dtype).removeprefix("torch."),
        "n_layers": int(cfg.n_layers),
        "d_model": int(cfg.d_model),
    }


def tokenizer_of(model: HostModel | HookedProxyLM) -> PreTrainedTokenizerBase:
    """The model's tokenizer; ValueError when it has none, or is no model that is hosted."""
    check_model(model)
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(
            f"This {type(model).__name__} ({describe_model(model)['model_name']!r}) has no tokenizer, and text must be "
            "tokenised. Give it one when it is loaded (tokenizer=...), or set it: model.set_tokenizer(tokenizer) on a "
            "HookedTransformer, model.tokenizer = tokenizer on a bridge."
        )
    return tokenizer


def in_residual_space(hook_name: str) -> bool:
    """Whether what is read at a hook is the residual stream or is added to it, by the hook's name."""
    return not WITHIN_A_LAYER.search(hook_name)


@standard_modes()
def load_model(
    name_or_path: str | Path,
    *,
    model_class: Literal["SAETransformerBridge", "HookedSAETransformer"] = "SAETransformerBridge",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    hf_model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | dict[str, Any] | None = None,
    n_devices: int | None = None,
    max_memory: dict[int | str, int | str] | None = None,
) -> HostModel:
    """Load a model by name, with its weights as they are (nothing folded, nothing centred).

    Args:
        name_or_path: a Hugging Face name or the directory of a saved model; with ``hf_model``, any name to know it by.
        model_class: the class that hosts it.
        device: where to put it: "auto" (CUDA where there is one, else MPS, else the CPU), or a device of torch. None
            leaves ``hf_model`` where it is, or lets the host choose.
        dtype: torch dtype or its name; None keeps that of ``hf_model``, or float32.
        hf_model: an already loaded Hugging Face model; the host takes it over (a bridge rewires it in place).
        tokenizer: an already loaded tokenizer, by default that of ``name_or_path``; one that lives only in memory is
            fine.
        revision: branch, tag or commit of a model on the Hub.
        trust_remote_code: run the code that a model on the Hub brings along.
        device_map: how a bridge is spread over devices, as Hugging Face's accelerate takes it, instead of ``device``.
        n_devices: over how many CUDA devices a bridge is spread, instead of ``device``.
        max_memory: by device, how much of it a spread bridge may take, such as ``{0: "20GiB"}``; with ``device_map``
            or several ``n_devices``.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: for a path without a folder.
        ValueError: for an unknown class or dtype; a device that is not there, or one beside a way to spread the model;
            an option that does not apply to ``hf_model``, a folder or a `HookedSAETransformer`; a model that
            TransformerLens knows by its published name only, whose name or sizes are not among those.
        MemoryError: the weights do not fit.

    Warns:
        UserWarning: the host computes something else than the Hugging Face model that it takes over: log-probabilities
            after twelve tokens differ by more than rounding. Each of the two runs once on these; a
            `HookedSAETransformer` loaded by its name is not compared.
    """
    _checks.choice(model_class, ("SAETransformerBridge", "HookedSAETransformer"), "model_class")
    spread = {"device_map": device_map, "n_devices": n_devices, "max_memory": max_memory}
    fetched = {"revision": revision, "trust_remote_code": trust_remote_code or None}
    options = {name: value for name, value in {**spread, **fetched}.items() if value is not None}
    _check_options(model_class, name_or_path, hf_model, device, options)
    device = None if device is None else chosen_device(device)
    dtype = chosen_dtype(dtype) or (torch.float32 if hf_model is None else hf_model.dtype)
    remedy = "Give fewer bits (dtype='bfloat16'), or spread a bridge over devices (device_map='auto')."
    size = None if hf_model is None else dtype.itemsize * sum(p.numel() for p in hf_model.parameters())
    with memory_for(f"The weights of {str(name_or_path)!r} in {str(dtype).removeprefix('torch.')}", size, remedy):
        model = _hosted(name_or_path, model_class, hf_model, tokenizer, device, dtype, options)
    out_of_inference(model.eval())
    return model


def _hosted(
    name_or_path: str | Path,
    model_class: str,
    hf_model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    device: str | None,
    dtype: torch.dtype,
    options: dict[str, Any],
) -> HostModel:
    """The model in its class, on its device."""
    if hf_model is not None:
        if not hf_model.config.architectures:  # a configuration that was made, not loaded, has them only once saved
            hf_model.config.architectures = [type(hf_model).__name__]
        # The hosts take a given model as it lies, whatever device and dtype they are told.
        to: Any = hf_model.to  # transformers' wrapper of it hides `self` from type checkers
        placed = {"dtype": dtype} | ({} if device is None else {"device": device})
        unchanged = dtype == hf_model.dtype and model_class == "SAETransformerBridge"
        if unchanged and getattr(hf_model, "is_quantized", False):
            del placed["dtype"]  # transformers refuses it for a quantised model, even where it is the model's own
        hf_model = to(**placed) if placed else hf_model
    tokenizer = None if tokenizer is None else _with_bos(tokenizer)
    if model_class == "SAETransformerBridge":
        return bridge_of(name_or_path, device=device, dtype=dtype, hf_model=hf_model, tokenizer=tokenizer, **options)
    if hf_model is not None or Path(name_or_path).is_dir():
        return hooked_from_hf(name_or_path, hf_model, tokenizer, device, dtype, bool(options.get("trust_remote_code")))
    return hooked_of(name_or_path, device=device, dtype=dtype, tokenizer=tokenizer, **options)


def bridge_of(name_or_path: str | Path, **options: Any) -> SAETransformerBridge:
    """A bridge in evaluation mode, booted with the host's own options.

    Raises:
        FileNotFoundError: a path without a folder.
        ValueError: an option that the host does not know, or a way to spread the model that cannot be.
    """
    _checks.known_keys(options, list(signature(boot).parameters)[1:], "An SAETransformerBridge")
    check_spread(*(options.get(name) for name in ("device_map", "n_devices", "max_memory")))
    hf_model, watched = options.get("hf_model"), Watched(options.pop("model_class", None), options.get("device"))
    if hf_model is None:
        _check_path(name_or_path)
    else:
        # As the host loads a model itself. With another, some of its attention (DeepSeek's) sees later tokens, and in
        # half precision a mixture may choose other experts by rounding alone.
        hf_model.set_attn_implementation("eager")
        watched.before = Before.of(hf_model)
    with text_only():
        model = SAETransformerBridge.boot_transformers(str(name_or_path), model_class=watched, **options)
    run_replaced_points(model)
    mend_bridge(model)
    out_of_inference(model.eval())
    if watched.before is not None:
        watched.before.warn_of_differences(model)
    return model


def hooked_of(name: str | Path, **options: Any) -> HookedSAETransformer:
    """A model that the host knows by its name; FileNotFoundError for a path, ValueError for another name."""
    _check_path(name)
    names = list(make_model_alias_map())
    if str(name).lower() not in names:
        raise ValueError(
            f"A HookedSAETransformer is loaded by a name that TransformerLens lists, and {str(name)!r} is none."
            f"{_checks.near_matches(str(name), names)} Load it as an SAETransformerBridge, or from the folder of a "
            "saved model."
        )
    return HookedSAETransformer.from_pretrained_no_processing(str(name), **options).eval()


def _check_path(name: str | Path) -> None:
    """FileNotFoundError for a path where there is no folder; names on the Hub have one slash at most."""
    text = str(name)
    if (isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1) and not Path(name).is_dir():
        raise FileNotFoundError(
            f"{text} is no folder of a saved model; give one, or the name of a model on the Hub, such as 'gpt2'."
        )


def _check_options(
    model_class: str,
    name_or_path: str | Path,
    hf_model: PreTrainedModel | None,
    device: str | torch.device | None,
    options: Mapping[str, Any],
) -> None:
    """Raise ValueError for options of :func:`load_model` that do not go together."""
    spread = [name for name in ("device_map", "n_devices", "max_memory") if name in options]
    if spread and device is not None:
        raise ValueError(f"device={str(device)!r} puts the model in one place and {spread[0]} spreads it; give one.")
    if spread and model_class != "SAETransformerBridge":
        raise ValueError(f"{spread[0]} spreads a SAETransformerBridge over devices; a {model_class} stays on one.")
    where = "hf_model" if hf_model is not None else "a folder" if Path(name_or_path).is_dir() else ""
    unused = [name for name in options if hf_model is not None or (name == "revision" and where)]
    if unused:
        raise ValueError(f"{unused[0]} does not apply to {where}, which is loaded as it is; leave it out.")


@standard_modes()
def retarget(sae: AnySAE, model: AnyHost) -> AnySAE:
    """Rename an SAE's hooks (in place) so that it can be attached to ``model``.

    Args:
        sae: any SAELens SAE or transcoder; ``cfg.metadata.hook_name`` and ``hook_name_out`` are rewritten.
        model: the model it is to be attached to.

    Returns:
        The same object.

    Raises:
        ValueError: when the SAE records no hook name, or the model has no such place.

    Warns:
        UserWarning: when the SAE records that it was built on activations which this model does not give, or on texts
            that start with BOS where this model's do not (or the other way round); or when it writes in the middle of a
            block of a bridge, where attaching it replaces only what the MLP reads.
    """
    check_dictionary(sae)
    metadata = sae.cfg.metadata
    if not metadata.hook_name:
        raise ValueError("This SAE records no hook name: set sae.cfg.metadata.hook_name to the hook it was built at.")
    hook_name, hook_name_out = (locate(model, n)[0] if n else n for n in (metadata.hook_name, metadata.hook_name_out))
    metadata.hook_name = hook_name
    if hook_name_out:
        metadata.hook_name_out = hook_name_out
    run_replaced_points(model)
    _set_head_reshaping(sae, model)
    output = output_behind(model, hook_name_out or hook_name)
    if output is not None:
        warnings.warn(
            f"{hook_name_out or hook_name} is the middle of a block, where a bridge passes what an attached SAE gives "
            f"to the MLP alone; what flows past it to {output} stays as it was. Attached to the model "
            "(model.saes, run_evals), this SAE replaces less than on a HookedTransformer. The interventions, steering "
            "and attribution of this package act on the whole stream.",
            UserWarning,
            stacklevel=2,
        )
    if isinstance(model, (HookedTransformer, TransformerBridge)):
        warn_of_other_bos(metadata.get("prepend_bos"), text_start(model).prepends_bos, "this model's texts")
        differences = activation_differences(metadata, describe_model(model))
        if differences:
            warnings.warn(
                f"This SAE was built on activations that this model may not give: {'; '.join(differences)}. What it "
                "computes here would not be what it was built for. Load the model the way it was loaded then "
                "(HookedSAETransformer.from_pretrained_no_processing and an SAETransformerBridge outside compatibility "
                "mode give the same activations; from_pretrained and compatibility mode change them).",
                UserWarning,
                stacklevel=2,
            )
    return sae


def _set_head_reshaping(sae: SAE, model: AnyHost) -> None:
    """Let the SAE join the heads of ``hook_z`` exactly where the model keeps them apart."""
    has_heads = isinstance(model, HookedTransformer) and sae.cfg.metadata.hook_name.endswith("hook_z")
    if has_heads and sae.cfg.reshape_activations == "none":
        sae.cfg.reshape_activations = "hook_z"
        sae.turn_on_forward_pass_hook_z_reshaping()
    elif not has_heads and sae.cfg.reshape_activations == "hook_z":
        sae.cfg.reshape_activations = "none"
        sae.turn_off_forward_pass_hook_z_reshaping()


def _with_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that the hosts accept as it is.

    They want one that prepends BOS and read it again from where it came from when it does not, which fails with a
    bare KeyError for a tokenizer that came from nowhere. So it is written out and read back here.
    """
    adds_bos = tokenizer.init_kwargs.get("add_bos_token", getattr(tokenizer, "add_bos_token", False))
    if tokenizer.bos_token is None or adds_bos:
        tokenizer.init_kwargs.setdefault("name_or_path", tokenizer.name_or_path)
        return tokenizer
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        try:
            reread = AutoTokenizer.from_pretrained(directory, add_bos_token=True)
        except ValueError:  # a BOS that cannot be prepended (one with a colon in it); the hosts let it be, too
            return tokenizer
    reread.init_kwargs["name_or_path"] = reread.name_or_path = tokenizer.name_or_path
    return reread
