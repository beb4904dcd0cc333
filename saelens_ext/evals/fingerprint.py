"""What tells a method or a dictionary that is given as an object from others, so that a folder knows it again."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from sae_lens import SAE

from saelens_ext.host.weights_fingerprint import tensors_fingerprint, weights_fingerprint

# Of a dictionary's settings, what says where it is, or came from.
_NOT_OF_THE_CODES = ("metadata", "device")


def fingerprint(value: Any) -> str:
    """A hash of the tensors, weights, numbers and texts in an object, and in what its functions refer to.

    Code is known by its name alone, and of what is none of these the class counts.
    """
    return hashlib.sha256("\n".join(_told(value, ())).encode()).hexdigest()[:16]


def _told(value: Any, within: tuple[Any, ...]) -> Iterator[str]:
    """What is hashed of an object that is found within others; of itself nothing more."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        yield repr(value)
        return
    yield type(value).__qualname__
    if not any(value is outer for outer in within):
        for part in _parts(value):
            yield from _told(part, (*within, value))


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.nn.Module):
        yield weights_fingerprint(value)
        if isinstance(value, SAE):
            yield {name: part for name, part in value.cfg.to_dict().items() if name not in _NOT_OF_THE_CODES}
    elif isinstance(value, torch.Tensor | np.ndarray):
        yield tensors_fingerprint({"": torch.as_tensor(value)})
    elif isinstance(value, Mapping):
        yield from (part for item in value.items() for part in item)
    elif isinstance(value, list | tuple):
        yield from value
    elif isinstance(value, FunctionType):
        yield value.__qualname__
        yield from (cell.cell_contents for cell in value.__closure__ or ())
        yield value.__defaults__
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif is_dataclass(value):
        yield from (getattr(value, field.name) for field in fields(value))
    elif callable(value):
        yield getattr(value, "__dict__", None)
