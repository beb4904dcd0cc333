"""Activations held in memory, for several fits, profiles and evaluations from one pass over the model."""

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch

from saelens_ext.activations.settings import checked_names
from saelens_ext.activations.stream import ActivationBatch, ActivationStream


class KeptStream(ActivationStream):
    """The activations of a stream, read once and kept.

    It is a stream like the one it was made from, with the same batches, but a pass over it does not run the model.
    Activations stay on the device and in the dtype of the model.

    Args:
        stream: what to read, once, now.
        memory_limit: bytes of activations that may be kept.

    Raises:
        ValueError: more activations than ``memory_limit`` allows, and whatever reading the stream raises.

    Examples:
        >>> kept = sx.KeptStream(stream)  # runs the model
        >>> fits = sx.fit_exemplar_partitions(kept, percentiles=(20, 40))  # does not
        >>> kept.only("blocks.1.hook_out").requested_hook_names
        ('blocks.1.hook_out',)
    """

    def __init__(self, stream: ActivationStream, *, memory_limit: int = 8 * 2**30):
        kept: list[ActivationBatch] = []
        size = 0
        for batch in stream:
            kept.append(batch)
            size += sum(rows.numel() * rows.element_size() for rows in batch.activations.values())
            if size > memory_limit:
                raise ValueError(f"The stream exceeds memory_limit={memory_limit} bytes: set max_tokens, or raise it.")
        self._take_over(stream, kept)

    @classmethod
    def holding(cls, stream: ActivationStream, batches: Sequence[ActivationBatch]) -> "KeptStream":
        """The stream of batches that were read off ``stream`` already."""
        kept = cls.__new__(cls)
        kept._take_over(stream, batches)
        return kept

    def _take_over(self, stream: ActivationStream, batches: Sequence[ActivationBatch]) -> None:
        """Take the settings of the stream, which stays as it is, and hold the batches."""
        vars(self).update(vars(stream))
        self.progress, self._source = False, stream
        self._kept = list(batches)

    def only(self, hook_name: str | Sequence[str]) -> "KeptStream":
        """The same activations at some of the hooks; nothing is copied.

        Args:
            hook_name: one or several of the names that the stream was given.

        Raises:
            ValueError: a hook that was not read.
        """
        names = checked_names(hook_name)
        unknown = [name for name in names if name not in self.requested_hook_names]
        if unknown:
            raise ValueError(f"{unknown[0]!r} was not read, only {', '.join(map(repr, self.requested_hook_names))}.")
        fewer = copy(self)
        fires = dict(zip(self.requested_hook_names, self.hook_names, strict=True))
        fewer.requested_hook_names, fewer.hook_names = names, tuple(fires[name] for name in names)
        parts = [{name: batch.activations[name] for name in names} for batch in self._kept]
        fewer._kept = [replace(batch, activations=part) for batch, part in zip(self._kept, parts, strict=True)]
        fewer._d_in = {name: self._d_in[name] for name in names}
        return fewer

    def batches(self, first_window: int = 0, n_read: int = 0) -> Iterator[ActivationBatch]:
        """The kept batches from a window on, as :meth:`ActivationStream.batches`."""
        return (batch for batch in self._kept if batch.first_sequence_id >= first_window)

    # What the windows, the device and the data are, the stream that was read knows, of whatever class it is.

    def token_windows(self) -> Iterator[tuple[int, list[int]]]:
        return self._source.token_windows()

    @property
    def device(self) -> torch.device:
        return self._source.device

    def _describe_model(self) -> dict[str, Any]:
        return self._source._describe_model()

    def _describe_data(self) -> dict[str, Any]:
        return self._source._describe_data()
