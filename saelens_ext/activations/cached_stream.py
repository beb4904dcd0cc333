"""Activations that SAELens' CacheActivationsRunner wrote, as a stream."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from sae_lens.load_model import HookedProxyLM
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from saelens_ext._checks import near_matches
from saelens_ext.activations.settings import checked_names
from saelens_ext.activations.stream import NO_TOKEN, ActivationBatch, ActivationStream
from saelens_ext.host.bos import begins_with_bos
from saelens_ext.host.hook_names import spellings_of
from saelens_ext.host.models import HostModel, describe_model, resolve_hook
from saelens_ext.ops.memory import memory_for
from saelens_ext.ops.modes import standard_modes

TOKEN_IDS = "token_ids"
"""The column of token ids in SAELens' cache of activations."""
_FIRST_WINDOWS = 16


class CachedStream(ActivationStream):
    """Activations that SAELens' CacheActivationsRunner wrote.

    The cache does not say where documents end, so a document here is a window of the cache. Without its token ids (an
    old cache) tokens are -1, and no token can be left out.

    Args:
        path: the folder of the cache.
        hook_name: the hook or hooks to read.
        model: the model that the activations came from, if at hand, and ``tokenizer`` its tokenizer by default.
        context_size: tokens in a window of the cache, and ``batch_size`` windows in a batch.
        max_tokens: activations after which a pass ends.
        exclude_special_tokens: leave out special tokens, the listed token ids, or none.
        seqpos_slice: positions of a window that are read.
    """

    def __init__(
        self,
        path: str | Path,
        hook_name: str | Sequence[str],
        *,
        model: HostModel | HookedProxyLM | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        context_size: int = 128,
        batch_size: int = 16,
        max_tokens: int | None = None,
        exclude_special_tokens: bool | Sequence[int] = True,
        seqpos_slice: Sequence[int | None] = (None,),
        device: str | torch.device = "cpu",
    ) -> None:
        if not Path(path).is_dir():
            raise FileNotFoundError(f"{path} is not a folder; give the new_cached_activations_path of the cache.")
        rows = datasets.load_from_disk(str(path))
        if isinstance(rows, datasets.DatasetDict):
            raise ValueError(f"{path} holds a dataset of several splits; activations in a cache have none.")
        names = checked_names(hook_name)
        self._columns = {name: _column(name, rows.column_names, path) for name in names}
        self.has_tokens = TOKEN_IDS in rows.column_names
        tokens = [TOKEN_IDS] if self.has_tokens else []
        self._rows = rows.with_format("torch", columns=[*self._columns.values(), *tokens])
        windows = {name: tuple(self._rows.features[column].shape) for name, column in self._columns.items()}
        length = next(iter(windows.values()))[0]
        if context_size != length:
            raise ValueError(f"{path} holds windows of {length} tokens, got context_size={context_size}.")
        self.model, self.tokenizer = model, tokenizer or getattr(model, "tokenizer", None)
        if exclude_special_tokens and not self.has_tokens:
            raise ValueError(f"{path} holds no token ids, so none can be left out: set exclude_special_tokens=False.")
        if exclude_special_tokens is True and self.tokenizer is None:
            raise ValueError(
                "exclude_special_tokens=True needs the tokenizer: name the model (model_name), list the token ids, or "
                "set it to False."
            )
        self._set_up(
            {name: self._columns[name] if model is None else resolve_hook(model, name) for name in names},
            context_size=context_size,
            batch_size=batch_size,
            max_tokens=max_tokens,
            exclude_special_tokens=exclude_special_tokens,
            seqpos_slice=seqpos_slice,
        )
        self._d_in = {name: shape[1] for name, shape in windows.items()}
        self._device, self.path, self.progress = torch.device(device), Path(path), False
        # Several windows, since one may start with BOS by chance, where it separates the texts in it.
        first = rows.with_format(columns=[TOKEN_IDS])[:_FIRST_WINDOWS][TOKEN_IDS] if self.has_tokens else []
        found = len(first) > 0 and all(begins_with_bos(self.tokenizer, window) for window in first)
        # Without token ids or a tokenizer nobody knows.
        self.prepend_bos = found if self.has_tokens and self.tokenizer is not None else None
        self.is_of_model = None if model is None or not self.has_tokens else self._comes_from(model)
        if self.is_of_model is False:
            warnings.warn(
                f"The activations in {path} are not those that this {type(model).__name__} gives for their tokens: it "
                "is another model, another class or another mode. The dictionaries do not record a model class, and "
                "their evaluation on this model says little.",
                UserWarning,
                stacklevel=2,
            )

    def _read(self, first_window: int) -> Iterator[ActivationBatch]:
        return map(self._batch_at, range(first_window, len(self._rows), self.batch_size))

    @property
    def device(self) -> torch.device:
        return self._device

    def token_windows(self) -> Iterator[tuple[int, list[int]]]:
        """Every window as its number and its token ids; none where the cache has no token ids."""
        if self.has_tokens:
            for number, row in enumerate(self._rows.with_format("torch", columns=[TOKEN_IDS])):
                yield number, cast(dict[str, Tensor], row)[TOKEN_IDS].tolist()

    def _describe_model(self) -> dict[str, Any]:
        # Only a model that gives the cached activations.
        return describe_model(self.model) if self.is_of_model else {}

    def _describe_data(self) -> dict[str, Any]:
        return {"cached_activations_path": str(self.path), "dataset_fingerprint": self._rows._fingerprint}

    @standard_modes()
    def _batch_at(self, start: int) -> ActivationBatch:
        n_bytes = 4 * self.batch_size * self.context_size * sum(self._d_in.values())
        what = f"A batch of {self.batch_size} cached windows of {self.context_size} tokens"
        with memory_for(what, n_bytes, "Lower batch_size."):
            rows: dict[str, Tensor] = self._rows[start : start + self.batch_size]
        n = len(next(iter(rows.values())))
        windows = rows[TOKEN_IDS].long() if self.has_tokens else torch.full((n, self.context_size), NO_TOKEN)
        keep = self._read_positions.expand(n, -1) & ~torch.isin(windows, self._excluded)
        window, position = keep.nonzero(as_tuple=True)
        on_device = keep.to(self._device)
        activations = {name: rows[column].to(self._device)[on_device] for name, column in self._columns.items()}
        self._check_activations(activations, window + start, position)
        return ActivationBatch(
            activations=activations,
            token_ids=windows[keep],
            sequence_ids=window + start,
            positions=position,
            document_ids=window + start,
            windows=windows,
            first_sequence_id=start,
        )

    @standard_modes()
    def _comes_from(self, model: HostModel | HookedProxyLM) -> bool:
        """Whether the model gives the first window's activations for its tokens, up to half-precision rounding."""
        row: dict[str, Tensor] = self._rows[0]
        again = ActivationStream(
            model,
            [{"tokens": row[TOKEN_IDS].tolist()}],
            self.hook_names,
            context_size=self.context_size,
            exclude_special_tokens=False,
            prepend_bos=self.prepend_bos,
        )
        computed = next(again.batches()).activations
        columns = zip(self._columns.values(), self.hook_names)
        pairs = [(row[column].float(), computed[name].float().cpu()) for column, name in columns]
        return all(old.shape == new.shape and bool((old - new).norm() <= 0.02 * new.norm()) for old, new in pairs)


def _column(hook_name: str, columns: Sequence[str], path: str | Path) -> str:
    """The column of a cache that holds a hook, by any of its spellings."""
    spellings = (hook_name, *spellings_of(hook_name, "plain"), *spellings_of(hook_name, "norms_around"))
    found = next((name for name in spellings if name in columns), None)
    if found is None:
        hooks = [name for name in columns if name != TOKEN_IDS]
        near = near_matches(hook_name, hooks)
        raise ValueError(f"The activations in {path} are of {', '.join(hooks)}, not of {hook_name!r}.{near}")
    return found
