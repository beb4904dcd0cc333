"""An accelerator for machines that have none: a device of its own, whose numbers are those of the CPU.

It is as strict as real ones are together. It has no float64, as Apple's MPS; tensors of the CPU and of the device
cannot be mixed, but for numbers and for indices on the CPU; and every wait of the host for the device is counted.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from saelens_ext.ops import precision

NAME, KEY = "fakegpu", "PrivateUse1"
WAITS: Counter[str] = Counter()
"""How often the host waited for the device, by what it waited for."""

# Their results, or the sizes of these, must be known on the host.
_WAITING = {"_local_scalar_dense", "nonzero", "equal", "unique_dim", "_unique2", "masked_select", "bincount", "index"}
# These take tensors of both sides.
_INDEXING = {"index", "index_put_", "_index_put_impl_"}
_MIXING = {"copy_", "_to_copy", *_INDEXING}


class FakeTensor(torch.Tensor):
    """A tensor on the device; ``held`` is the tensor of the CPU that has its numbers."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "FakeTensor":
        if held.dtype in (torch.float64, torch.complex128) and NAME in precision.WITHOUT_FLOAT64:
            raise TypeError(f"The device {NAME!r} has no {held.dtype}.")
        options = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, device=torch.device(NAME, 0), **options)  # type: ignore[attr-defined]
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"FakeTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Makes the tensors of functions that are given the device alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _FromData(TorchFunctionMode):
    """Makes tensors from Python's numbers, and numbers from tensors, on the CPU: there torch passes no other mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.tolist and isinstance(args[0], FakeTensor):
            WAITS["tolist"] += 1
            return args[0].held.tolist()
        if func is torch.Tensor.numpy and isinstance(args[0], FakeTensor):
            if not kwargs.get("force"):
                raise TypeError(f"numpy() of a tensor on {NAME!r}.")
            WAITS["numpy"] += 1
            return args[0].held.numpy(force=True)
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


class _Backend(_DummyBackendModule):
    """What torch asks of a device's own module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)  # random numbers are drawn on the CPU

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        pass


# Before anything is differentiated: autograd counts the devices once.
_setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
# torch makes tensors from lists of indices below all modes.
_KERNELS = torch.library.Library("aten", "IMPL")
_KERNELS.impl(
    "empty_strided",
    lambda size, stride, dtype=None, **_: FakeTensor(torch.empty_strided(size, stride, dtype=dtype)),
    KEY,
)
_KERNELS.impl("_copy_from", lambda source, to, non_blocking=False: (to.held.copy_(_held(source)), to)[1], KEY)


@contextmanager
def fake_accelerator(*, float64: bool = False) -> Iterator[str]:
    """The device's name, for as long as it is there; with ``float64`` it has that, as CUDA."""
    precision.WITHOUT_FLOAT64.update(() if float64 else [NAME])
    try:
        with _FromData(), _Mode():
            yield NAME
    finally:
        precision.WITHOUT_FLOAT64.discard(NAME)


@contextmanager
def counted_waits() -> Iterator[Counter[str]]:
    """What the host waits for meanwhile."""
    WAITS.clear()
    yield WAITS


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.removeprefix("aten::")
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    own = [value for value in tensors if isinstance(value, FakeTensor)]
    others = [value for value in tensors if not isinstance(value, FakeTensor) and value.ndim]
    if own and others and (name not in _MIXING or (name in _INDEXING and not isinstance(args[0], FakeTensor))):
        raise RuntimeError(f"{name}: tensors of the CPU and of {NAME!r}.")
    on_device = bool(own)
    if name == "copy_":
        on_device = isinstance(args[0], FakeTensor)
        if own and not isinstance(args[0], FakeTensor):
            WAITS["copy to the CPU"] += 1
    elif kwargs.get("device") is not None:
        on_device = torch.device(kwargs["device"]).type == NAME
        if on_device:
            kwargs = kwargs | {"device": "cpu"}
        elif own:
            WAITS["copy to the CPU"] += 1
    masked = name != "index" or any(t is not None and t.dtype == torch.bool for t in args[1])
    if own and name in _WAITING and masked:
        WAITS[name] += 1
    result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    known = {id(value.held): value for value in own}
    return tree_map(lambda value: known[id(value)] if id(value) in known else _placed(value, on_device), result)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, FakeTensor) else value


def _placed(value: Any, on_device: bool) -> Any:
    return FakeTensor(value) if on_device and isinstance(value, torch.Tensor) else value
