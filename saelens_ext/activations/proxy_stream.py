"""Activations of a Hugging Face model that SAELens hosts as a `HookedProxyLM`."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int64
from sae_lens.load_model import HookedProxyLM
from torch import Tensor

from saelens_ext._checks import positive
from saelens_ext._modes import callers_autocast
from saelens_ext.activations.settings import (
    checked_context_size,
    checked_names,
    excluded_ids,
    positions_read,
)
from saelens_ext.activations.stream import ActivationStream, kept_rows
from saelens_ext.activations.windows import WindowSource
from saelens_ext.host.bos import text_start
from saelens_ext.host.models import HostModel, describe_model, resolve_hook


class ProxyStream(ActivationStream):
    """Activations of a Hugging Face model in SAELens' HookedProxyLM; hooks are the paths of its modules.

    Args:
        model: the proxy.
        dataset: as for :class:`~saelens_ext.activations.stream.ActivationStream`, as all that follow.
        hook_name: the hook or hooks to read; TransformerLens names are translated.
        context_size: tokens in a window.
        batch_size: windows in a forward pass.
        max_tokens: activations per hook after which a pass ends.
        exclude_special_tokens: leave out special tokens, the listed token ids, or none.
        prepend_bos: whether every window starts with BOS; None: if it does on a bridge of the same architecture.
        text_column: the column of the documents.
        seqpos_slice: positions of a window that are read.
        progress: show a progress bar.
    """

    def __init__(
        self,
        model: HookedProxyLM,
        dataset: Any,
        hook_name: str | Sequence[str],
        *,
        context_size: int = 128,
        batch_size: int = 16,
        max_tokens: int | None = None,
        exclude_special_tokens: bool | Sequence[int] = True,
        prepend_bos: bool | None = None,
        text_column: str = "text",
        seqpos_slice: Sequence[int | None] = (None,),
        progress: bool = False,
    ) -> None:
        self.model, self.tokenizer = model, model.tokenizer
        self.requested_hook_names = checked_names(hook_name)
        self.hook_names = tuple(resolve_hook(model, name) for name in self.requested_hook_names)
        self.context_size = checked_context_size(
            context_size, getattr(model.model.config, "max_position_embeddings", None)
        )
        self.batch_size = positive(batch_size, "batch_size")
        self.max_tokens = None if max_tokens is None else positive(max_tokens, "max_tokens")
        self.exclude_special_tokens = exclude_special_tokens
        start = text_start(model, prepend_bos)
        self._excluded = excluded_ids(self.tokenizer, exclude_special_tokens, start)
        self.seqpos_slice = tuple(seqpos_slice)
        self._read_positions = positions_read(self.seqpos_slice, self.context_size)
        self.progress = progress
        self._d_in: dict[str, int] = {}
        self._windows = WindowSource(
            dataset,
            self.tokenizer,
            context_size=self.context_size,
            start=start,
            text_column=text_column,
            vocabulary_size=model.model.config.vocab_size,
        )
        if prepend_bos is None:
            self._windows.leave_start_to_template()
        self.prepend_bos = self._windows.start.prepends_bos

    def _describe_model(self) -> dict[str, Any]:
        return describe_any(self.model)

    @torch.no_grad()
    def _forward(
        self, tokens: Int64[Tensor, "b l"], real: Bool[Tensor, "b l"], keep: Bool[Tensor, "b l"]
    ) -> dict[str, Tensor]:
        read: dict[str, Tensor] = {}
        names = dict(zip(self.requested_hook_names, self.hook_names))

        def reader(name: str):
            def read_rows(activation: Tensor, hook: Any) -> None:
                read.setdefault(name, kept_rows(activation, keep, name))
                if len(read) == len(set(self.hook_names)):
                    raise _AllRead

            return read_rows

        device = next(self.model.parameters()).device
        # The proxy's own forward drops the attention mask; its hooks fire in the model's forward too.
        hooks = [(name, reader(name)) for name in dict.fromkeys(self.hook_names)]
        with self.model.hooks(fwd_hooks=hooks), callers_autocast():
            try:
                self.model.model(input_ids=tokens.to(device), attention_mask=real.to(device, torch.int64))
            except _AllRead:
                pass
        missing = [name for name in self.hook_names if name not in read]
        if missing:
            raise ValueError(
                f"The module {missing[0]!r} was not called in a forward pass of this {type(self.model.model).__name__}."
            )
        return {given: read[name] for given, name in names.items()}


class _AllRead(Exception):
    """Ends a forward pass once every hook has fired."""


def describe_any(model: HostModel | HookedProxyLM) -> dict[str, Any]:
    """``describe_model`` for a proxy too, whose class SAELens records as "AutoModelForCausalLM"."""
    if not isinstance(model, HookedProxyLM):
        return describe_model(model)
    config, rows = model.model.config, model.model.get_input_embeddings().weight[:64].detach().float()
    return {
        "model_name": config.name_or_path,
        "model_class_name": "AutoModelForCausalLM",
        "compatibility_mode": None,
        "normalization_type": None,
        "writing_weights_centered": bool((rows.mean(dim=-1).abs() < 1e-3 * rows.std(dim=-1)).all()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "n_layers": int(config.num_hidden_layers),
        "d_model": int(config.hidden_size),
    }
