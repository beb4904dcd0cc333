"""A model's activations on a dataset, each with the token, document and position that it belongs to.

Symbols: ``n`` activations in a batch, ``d_in`` the width of one, ``b`` windows in a batch, ``L`` the context size.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Int64
from sae_lens.load_model import HookedProxyLM
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from saelens_ext._checks import positive
from saelens_ext.activations.batch import NO_TOKEN, ActivationBatch
from saelens_ext.activations.settings import checked_context_size, checked_names, excluded_ids, positions_read
from saelens_ext.activations.windows import Window, WindowSource
from saelens_ext.host.bos import TextStart, text_start
from saelens_ext.host.hook_pass import limits_of, run_to_last_hook
from saelens_ext.host.models import HostModel, check_model, describe_model, resolve_hook, tokenizer_of
from saelens_ext.ops.groups import groups
from saelens_ext.ops.memory import memory_for
from saelens_ext.ops.modes import standard_modes

T = TypeVar("T")


class ActivationStream:
    """A model's activations on a dataset, batch by batch, the same on every pass.

    Documents are tokenised without special tokens and cut into consecutive windows of ``context_size`` tokens. Windows
    are padded on the right, and the attention mask alone says what is padding. The forward pass ends at the last hooked
    block. Hooks on the model and SAEs attached to it stay in force (what is read is what they let through), and the
    model's training mode and the grad mode are left as they are.

    Args:
        model: a `HookedSAETransformer` or `SAETransformerBridge` (or the TransformerLens class beneath), or SAELens'
            `HookedProxyLM` of a Hugging Face model.
        dataset: a `datasets.Dataset` or `IterableDataset`, a list of strings, a table (pandas, polars, pyarrow, a dict
            of columns), or the name of a dataset, whose train split is streamed. Rows hold text, token ids
            (``input_ids``, ``tokens``) or chat ``messages`` (``conversations``).
        hook_name: the hook to read, or several; any spelling that `resolve_hook` knows.
        context_size: tokens in a window, BOS included; 2 to the model's own limit.
        batch_size: windows in a forward pass.
        max_tokens: activations per hook after which a pass ends, exactly; None reads the whole dataset.
        exclude_special_tokens: leave out activations at BOS, EOS, padding and separator tokens (True), at the listed
            token ids, or at none (False).
        prepend_bos: whether every window starts with BOS; None: as texts do in ``model.to_tokens``, and
            conversations in their chat template. A document that starts with BOS gets no second.
        text_column: the column of the documents.
        seqpos_slice: ``(stop,)``, ``(start, stop)`` or ``(start, stop, step)`` over the positions of a whole window, as
            in SAELens: positions outside it are not read.
        last_token_only: read only the last token of each document, whatever token it is.
        add_generation_prompt: end conversations with what their chat template writes before an answer.
        shuffle_seed: read the documents in a random order that this seed gives, the same on every pass; None: in the
            dataset's order. What cannot be indexed is shuffled within a buffer of 10,000 documents.
        progress: show a progress bar.

    Raises:
        ValueError: for a hook that the model does not have, a size out of range, a dataset that is empty or has no such
            column, a model without a tokenizer where one is needed; and while iterating, for activations that are not
            finite, and when the dataset holds nothing to read.

    Attributes:
        model, tokenizer, context_size, batch_size, max_tokens, prepend_bos: as given, or as settled from None.
        requested_hook_names: the names as given, by which a batch's activations are found.
        hook_names: the names that fire on the model, in the same order.

    Examples:
        >>> stream = sx.ActivationStream(model, texts, "blocks.1.hook_out", context_size=16, max_tokens=100)
        >>> sum(len(batch) for batch in stream)
        100
        >>> batch = next(iter(stream))
        >>> batch.activations["blocks.1.hook_out"].shape == (len(batch), model.cfg.d_model)
        True
    """

    model: Any  # of classes that share few attributes; None where activations were read from a cache without it
    tokenizer: PreTrainedTokenizerBase | None
    last_token_only: bool = False

    def __init__(
        self,
        model: HostModel | HookedProxyLM,
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
        last_token_only: bool = False,
        add_generation_prompt: bool = False,
        shuffle_seed: int | None = None,
        progress: bool = False,
    ):
        check_model(model)
        n_ctx, d_vocab = limits_of(model)
        self.model, self.tokenizer, self.progress = model, getattr(model, "tokenizer", None), progress
        names, start = checked_names(hook_name), text_start(model, prepend_bos)
        if exclude_special_tokens is True:
            tokenizer_of(self.model)
        self._set_up(
            {name: resolve_hook(model, name) for name in names},
            context_size=checked_context_size(context_size, n_ctx),
            batch_size=batch_size,
            max_tokens=max_tokens,
            exclude_special_tokens=exclude_special_tokens,
            seqpos_slice=seqpos_slice,
            start=start,
        )
        self.last_token_only = last_token_only
        self._windows = WindowSource(
            dataset,
            self.tokenizer,
            context_size=self.context_size,
            start=start,
            text_column=text_column,
            vocabulary_size=d_vocab,
            add_generation_prompt=add_generation_prompt,
            shuffle_seed=shuffle_seed,
        )
        if prepend_bos is None:
            self._windows.leave_start_to_template()
        self.prepend_bos = self._windows.start.prepends_bos

    def _set_up(
        self,
        hook_names: Mapping[str, str],
        *,
        context_size: int,
        batch_size: int,
        max_tokens: int | None,
        exclude_special_tokens: bool | Sequence[int],
        seqpos_slice: Sequence[int | None],
        start: TextStart = TextStart(),
    ) -> None:
        """The settings that all streams share, checked; ``hook_names`` gives for each name asked for the one that
        fires.
        """
        self.requested_hook_names, self.hook_names = tuple(hook_names), tuple(hook_names.values())
        self.context_size = context_size
        self.batch_size = positive(batch_size, "batch_size")
        self.max_tokens = None if max_tokens is None else positive(max_tokens, "max_tokens")
        self.exclude_special_tokens = exclude_special_tokens
        self._excluded = excluded_ids(self.tokenizer, exclude_special_tokens, start)
        self.seqpos_slice = tuple(seqpos_slice)
        self._read_positions = positions_read(self.seqpos_slice, context_size)
        self._d_in: dict[str, int] = {}

    def __iter__(self) -> Iterator[ActivationBatch]:
        """Start a pass from the first document."""
        with self._bar() as bar:
            for batch in self.batches():
                bar.update(len(batch))
                yield batch
        self._check_read()

    def mapped(self, work: Callable[[Iterator[ActivationBatch]], T], n_batches: int = 1) -> Iterator[T]:
        """What some work gives for the batches of a pass, so many consecutive ones at a time, in order.

        A stream whose forward passes run elsewhere does the work there, and only what it gives comes back.

        Args:
            work: a function of an iterator of batches, all of which it must read; it travels by cloudpickle.
            n_batches: batches at a time, at least 1; fewer at the end.
        """
        return (work(batches) for batches in groups(self, n_batches))

    def _bar(self) -> Any:
        return tqdm(total=self.max_tokens, unit="tok", desc="activations", disable=not self.progress)

    def _check_read(self) -> None:
        """ValueError after a pass in which there was nothing to read."""
        if not self._d_in:
            raise ValueError(
                f"No activation to read: exclude_special_tokens={self.exclude_special_tokens!r}, "
                f"seqpos_slice={self.seqpos_slice!r} and last_token_only={self.last_token_only!r} leave out every "
                "token of all windows."
            )

    def batches(self, first_window: int = 0, n_read: int = 0) -> Iterator[ActivationBatch]:
        """The batches of a pass from a window on, the same as in a whole pass; without a progress bar.

        Args:
            first_window: windows that came before, a whole number of batches.
            n_read: activations that they gave.
        """
        left = math.inf if self.max_tokens is None else self.max_tokens - n_read
        if left > 0:
            yield from up_to(left, self._read(first_window))

    def _read(self, first_window: int) -> Iterator[ActivationBatch]:
        """All batches from a window on, whatever their number."""
        warn_of_dropout(self.model)
        return self._batches(numbered_chunks(self._windows, self.batch_size, first_window))

    def token_windows(self) -> Iterator[tuple[int, list[int]]]:
        """Every window as its document and its token ids; the model is not run."""
        for window in self._windows:
            yield window.document_id, window.token_ids

    @property
    def excluded_ids(self) -> list[int]:
        """Token ids whose activations are left out."""
        return self._excluded.tolist()

    def _batches(self, chunks: Iterator[tuple[int, list[Window]]]) -> Iterator[ActivationBatch]:
        """A batch for every chunk of windows, in order; each comes with the number of its first window."""
        for first, windows in chunks:
            yield self._batch(windows, first)

    @property
    def device(self) -> torch.device:
        """Where the activations are."""
        return next(iter(self.model.parameters())).device

    @property
    def d_in(self) -> dict[str, int]:
        """The width of the activations of each hook, by the name the user gave; read from one window if need be."""
        if not self._d_in:
            window = next(iter(self._windows))
            tokens, real = self._padded([window])
            self._remember_widths(self._forward(tokens, real, real))
        return dict(self._d_in)

    def describe(self) -> dict[str, Any]:
        """What was read and how, as a JSON-safe dictionary in the names of SAELens' metadata."""
        excluded = self.exclude_special_tokens
        return {
            **self._describe_model(),
            "hook_names": list(self.hook_names),
            "context_size": self.context_size,
            "prepend_bos": self.prepend_bos,
            "exclude_special_tokens": excluded if isinstance(excluded, bool) else [int(i) for i in excluded],
            "seqpos_slice": list(self.seqpos_slice),
            "last_token_only": self.last_token_only,
            "max_tokens": self.max_tokens,
            # SAELens' multiple_evals unpacks it, given or not.
            "model_from_pretrained_kwargs": {},
            **self._describe_data(),
        }

    def _describe_model(self) -> dict[str, Any]:
        return describe_model(self.model)

    def _describe_data(self) -> dict[str, Any]:
        return self._windows.describe()

    @standard_modes()
    def _batch(self, windows: list[Window], first_sequence_id: int) -> ActivationBatch:
        tokens, real, keep = self._to_read(windows)
        window, position = keep.nonzero(as_tuple=True)
        documents = torch.tensor([w.document_id for w in windows])[window]
        # A batch in which nothing is to be read needs no pass through the model.
        what = f"A pass over {len(windows)} windows of up to {tokens.shape[1]} tokens on {self.device}"
        with memory_for(what, None, f"Lower batch_size (now {self.batch_size}) or context_size."):
            activations = self._forward(tokens, real, keep) if len(window) else {}
        self._check_activations(activations, documents, position)
        self._remember_widths(activations)
        return ActivationBatch(
            activations=activations,
            token_ids=tokens[keep],
            sequence_ids=window + first_sequence_id,
            positions=position,
            document_ids=documents,
            windows=self._full_width(tokens, real),
            first_sequence_id=first_sequence_id,
        )

    def _to_read(self, windows: list[Window]) -> tuple[Int64[Tensor, "b l"], Bool[Tensor, "b l"], Bool[Tensor, "b l"]]:
        """As :meth:`_padded`, and the tokens whose activations are to be read."""
        tokens, real = self._padded(windows)
        keep = real & self._read_positions[: tokens.shape[1]]
        if self.last_token_only:
            ends = [len(w.token_ids) - 1 if w.ends_document else NO_TOKEN for w in windows]
            keep &= torch.arange(tokens.shape[1]) == torch.tensor(ends)[:, None]
        elif self._excluded.numel():
            keep &= ~torch.isin(tokens, self._excluded)
        return tokens, real, keep

    def _padded(self, windows: list[Window]) -> tuple[Int64[Tensor, "b l"], Bool[Tensor, "b l"]]:
        """Token ids and which of them are real, as wide as the longest window."""
        width = max(len(window.token_ids) for window in windows)
        pad_id = getattr(self.tokenizer, "pad_token_id", None) or 0
        tokens = torch.full((len(windows), width), pad_id, dtype=torch.int64)
        real = torch.zeros((len(windows), width), dtype=torch.bool)
        for row, window in enumerate(windows):
            length = len(window.token_ids)
            tokens[row, :length] = torch.tensor(window.token_ids, dtype=torch.int64)
            real[row, :length] = True
        return tokens, real

    def _full_width(self, tokens: Int64[Tensor, "b l"], real: Bool[Tensor, "b l"]) -> Int64[Tensor, "b L"]:
        windows = torch.full((tokens.shape[0], self.context_size), NO_TOKEN, dtype=torch.int64)
        windows[:, : tokens.shape[1]] = tokens.masked_fill(~real, NO_TOKEN)
        return windows

    def _forward(
        self, tokens: Int64[Tensor, "b l"], real: Bool[Tensor, "b l"], keep: Bool[Tensor, "b l"]
    ) -> dict[str, Tensor]:
        """One pass through the model, up to the last hook; the kept rows of every hook."""
        read: dict[str, Tensor] = {}
        # Resolved anew, as an SAE may have been attached or detached since the last pass.
        names = {given: resolve_hook(self.model, given) for given in self.requested_hook_names}

        def reader(name: str):
            def read_rows(activation: Tensor, hook: Any) -> None:
                # HookedTransformer normalises for queries, keys and values apart, firing the norm's hooks three times.
                if name not in read:
                    read[name] = kept_rows(activation, keep, name)

            return read_rows

        run_to_last_hook(self.model, tokens, real, [(name, reader(name)) for name in dict.fromkeys(names.values())])
        for name in names.values():
            if name not in read:
                raise ValueError(f"The hook {name!r} does not fire on this {type(self.model).__name__} as it is set.")
        return {given: read[name] for given, name in names.items()}

    def _check_activations(
        self, activations: dict[str, Tensor], documents: Int64[Tensor, " n"], positions: Int64[Tensor, " n"]
    ) -> None:
        for name, rows in activations.items():
            if rows.shape[1] == 0:
                raise ValueError(f"The hook {name!r} gives activations of width 0; there is nothing to read.")
            # One reduction answers for all entries; where they are is asked only when something is wrong.
            if not bool(torch.isfinite(rows).all()):
                first = int((~torch.isfinite(rows)).any(dim=1).nonzero()[0])
                raise ValueError(
                    f"The activation at hook {name!r}, document {int(documents[first])}, position "
                    f"{int(positions[first])} holds NaN or infinity. Half-precision overflow is the usual cause: run "
                    "the model in bfloat16 or float32."
                )

    def _remember_widths(self, activations: dict[str, Tensor]) -> None:
        self._d_in.update({name: rows.shape[1] for name, rows in activations.items()})


def warn_of_dropout(model: torch.nn.Module) -> None:
    """Warn where a pass would not give what the last one gave."""
    if any(isinstance(m, torch.nn.Dropout) and m.training and m.p > 0 for m in model.modules()):
        warnings.warn(
            "The model is in training mode and has dropout, so its activations differ from pass to pass: call "
            "model.eval().",
            UserWarning,
            stacklevel=4,
        )


# --- the pass --------------------------------------------------------------------------------------------------------


def numbered_chunks(items: Iterable[Window], size: int, first: int) -> Iterator[tuple[int, list[Window]]]:
    """So many items at a time, from the first one asked for on, after the number of the first of each."""
    iterator = islice(items, first, None)
    while chunk := list(islice(iterator, size)):
        yield first, chunk
        first += len(chunk)


def up_to(left: float | int, batches: Iterable[ActivationBatch]) -> Iterator[ActivationBatch]:
    """Batches that hold activations, until there were ``left`` of them, exactly."""
    for batch in batches:
        if len(batch):
            batch = batch if len(batch) <= left else batch.first(int(left))
            left -= len(batch)
            yield batch
            if left == 0:
                return


def kept_rows(activation: Tensor, keep: Bool[Tensor, "b l"], name: str) -> Tensor:
    """The kept positions of an activation, heads joined; a copy, so nothing later in the pass can change it."""
    if activation.ndim < 3 or activation.shape[:2] != keep.shape:
        raise ValueError(
            f"The hook {name!r} gives a tensor of shape {tuple(activation.shape)} where (windows, positions, …) = "
            f"{tuple(keep.shape)} is needed: it does not hold one activation per token."
        )
    return activation.detach()[keep.to(activation.device)].flatten(start_dim=1)
