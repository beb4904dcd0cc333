"""Activations that are held as a matrix, as a stream."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.activations.batch import NO_TOKEN, ActivationBatch
from saelens_ext.activations.stream import ActivationStream


class MatrixStream(ActivationStream):
    """The rows of a matrix as a stream over one hook; which token each belongs to is not known (-1).

    Args:
        x: activations ``(n, d)``, floating point and finite, n at least 1; not copied.
        hook_name: where they were read; may be empty.
        document_ids: the document of each row, integers ``(n,)``; None: each row is a document of its own.
        batch_size: rows in a batch; None: all.
    """

    def __init__(
        self, x: Tensor, hook_name: str = "", *, document_ids: Tensor | None = None, batch_size: int | None = None
    ):
        if x.ndim != 2 or not len(x) or not x.is_floating_point():
            kind = f"{x.dtype} of {tuple(x.shape)}"
            raise ValueError(f"A matrix of activations must be floating point and (n, d) with n >= 1, got {kind}.")
        documents = torch.arange(len(x)) if document_ids is None else document_ids
        if documents.shape != (len(x),) or documents.is_floating_point() or bool((documents < 0).any()):
            kind = f"{documents.dtype} of {tuple(documents.shape)}"
            raise ValueError(f"document_ids must be {len(x)} integers of at least 0, one per row, got {kind}.")
        self.model, self.tokenizer, self.progress, self.prepend_bos = None, None, False, None
        self._x, self._documents = _checks.finite(x.detach(), "activations"), documents.cpu().long()
        self._set_up(
            {hook_name: hook_name},
            context_size=1,
            batch_size=batch_size or len(x),
            max_tokens=None,
            exclude_special_tokens=False,
            seqpos_slice=(None,),
        )
        self._d_in = {hook_name: x.shape[1]}

    @property
    def device(self) -> torch.device:
        """Where the activations are."""
        return self._x.device

    def batches(self, first_window: int = 0, n_read: int = 0) -> Iterator[ActivationBatch]:
        """The batches of a pass from a row on, each row a window of one unknown token."""
        for first in range(first_window, len(self._x), self.batch_size):
            rows = torch.arange(first, min(first + self.batch_size, len(self._x)))
            unknown = torch.full_like(rows, NO_TOKEN)
            yield ActivationBatch(
                activations={self.hook_names[0]: self._x[first : first + self.batch_size]},
                token_ids=unknown,
                sequence_ids=rows,
                positions=torch.zeros_like(rows),
                document_ids=self._documents[rows],
                windows=unknown[:, None],
                first_sequence_id=first,
            )

    def token_windows(self) -> Iterator[tuple[int, list[int]]]:
        """Nothing: the tokens are not known."""
        return iter(())

    def describe(self) -> dict[str, Any]:
        """Nothing: what was read is not known."""
        return {}
