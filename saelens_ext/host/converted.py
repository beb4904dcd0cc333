"""A Hugging Face model in TransformerLens' own class, its weights converted."""

import tempfile
from copy import deepcopy
from pathlib import Path

import torch
from sae_lens import HookedSAETransformer
from transformer_lens.loading_from_pretrained import get_pretrained_model_config, get_pretrained_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from saelens_ext.host.agreement import Before
from saelens_ext.host.by_name import hooked_by_name


def hooked_from_hf(
    name_or_path: str | Path,
    hf_model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    device: str | torch.device | None,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> HookedSAETransformer:
    """A `HookedSAETransformer` with the weights of a Hugging Face model, whose name the host need not know.

    The host's own loader takes only names on its list, though its converters know every model of the same architecture.
    """
    trusted = {"trust_remote_code": trust_remote_code}
    if hf_model is None:
        hf_model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, **trusted)
    if tokenizer is None and Path(name_or_path).is_dir():
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **trusted)
    device = device or next(hf_model.parameters()).device
    before = Before.of(hf_model)
    model = _converted(name_or_path, hf_model, tokenizer, device, dtype).eval()
    model.cfg.model_name = Path(name_or_path).name
    # The host keeps no trace of it, and it names the tokens that end a turn. As an attribute of a module, to a type
    # checker only a tensor or a module may be set.
    model.generation_config = getattr(hf_model, "generation_config", None)  # pyright: ignore[reportArgumentType]
    if before is not None:
        before.warn_of_differences(model)
    return model


def _converted(
    name_or_path: str | Path,
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    device: str | torch.device,
    dtype: torch.dtype,
) -> HookedSAETransformer:
    hf_config = deepcopy(hf_model.config)
    if not hasattr(hf_config, "n_ctx"):
        # The host reads it for GPT-2, whose published configurations have it and whose saved ones have not.
        hf_config.n_ctx = getattr(hf_config, "max_position_embeddings", None)
    with tempfile.TemporaryDirectory() as directory:
        hf_config.save_pretrained(directory)
        try:
            config = get_pretrained_model_config(directory, hf_cfg=hf_config.to_dict(), device=str(device), dtype=dtype)
        except NotImplementedError:  # some architectures (Gemma, OLMo) the host knows by the names of models only
            return hooked_by_name(name_or_path, hf_model, tokenizer, device, dtype)
        except (AttributeError, KeyError, TypeError) as error:
            raise _not_converted(hf_model, error) from error
        try:
            weights = get_pretrained_state_dict(directory, config, hf_model, dtype=dtype)
        except (AttributeError, KeyError, TypeError) as error:  # of a part that the converter thought was there
            raise _not_converted(hf_model, error) from error
    model = HookedSAETransformer(config, tokenizer, move_to_device=False)
    model.load_and_process_state_dict(
        weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    model.move_model_modules_to_device()
    return model


def _not_converted(hf_model: PreTrainedModel, error: Exception) -> ValueError:
    return ValueError(
        f"TransformerLens' converter does not take this {type(hf_model).__name__} ({type(error).__name__}: {error}). "
        "Load it as an SAETransformerBridge."
    )
