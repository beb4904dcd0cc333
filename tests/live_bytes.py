"""Counts the bytes of the tensors that are alive, whatever the process keeps for itself."""

import weakref
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Of tensors made inside: the bytes alive now, and at most so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._tensors: Counter[int] = Counter()
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(value) for value in tree_leaves((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and id(value) not in given:
                self._take(value)
        return result

    def _take(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if not self._tensors[place]:
            self._sizes[place] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
        self._tensors[place] += 1
        weakref.finalize(tensor, self._drop, place)

    def _drop(self, place: int) -> None:
        self._tensors[place] -= 1
        if not self._tensors[place]:
            self.now -= self._sizes[place]
