"""Where to compute, and in which numbers: devices and dtypes by name, checked before anything is computed."""

from collections.abc import Mapping
from typing import Any

import torch

from saelens_ext import _checks

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""What accelerate works out a map from."""
_STORED = ("disk", "meta")
"""No devices, though a map may name them; whether they are taken is the host's to say."""


def chosen_device(device: str | torch.device) -> str:
    """The name of a device that is there.

    Args:
        device: "auto", which is CUDA where there is one, else Apple's MPS, else the CPU; or any device of torch.

    Raises:
        ValueError: no name of a device, or a device that is not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f'device must be "auto", "cpu" or another device of torch, got {device!r}.') from error
    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "xpu": torch.xpu.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    n = counts.get(wanted.type, 0)
    if (wanted.index or 0) >= n:
        there = ", ".join(kind if k == 1 else f"{k} x {kind}" for kind, k in counts.items() if k)
        raise ValueError(f'There is no device {str(device)!r} here, only {there}; device="auto" takes the best.')
    return str(device)


def chosen_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype of floating point, by its name or itself; ValueError for another."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(
            "dtype must be a torch dtype of floating point or its name ('float32', 'bfloat16', 'float16'), got "
            f"{dtype!r}."
        )
    return found


def check_spread(
    device_map: str | Mapping[str, Any] | None = None,
    n_devices: int | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
) -> None:
    """Raise ValueError for a way to spread a model that names a device that is not there, or that does nothing."""
    if device_map is not None and n_devices is not None:
        raise ValueError(f"device_map and n_devices={n_devices!r} each say how the model is spread; give one.")
    if n_devices is not None and _checks.positive(n_devices, "n_devices") > torch.cuda.device_count() and n_devices > 1:
        raise ValueError(f"n_devices={n_devices} are more CUDA devices than the {torch.cuda.device_count()} here.")
    if max_memory is not None and device_map is None and (n_devices or 1) == 1:
        raise ValueError('max_memory bounds what each device takes of a spread model; give device_map="auto" with it.')
    if isinstance(device_map, str):
        if device_map not in _STRATEGIES:
            _check_there(device_map, f"device_map, if not {', '.join(map(repr, _STRATEGIES))},")
    elif device_map is not None:
        for part, place in device_map.items():
            _check_there(place, f"device_map[{part!r}]")
    for place in max_memory or ():
        _check_there(place, "A key of max_memory")


def _check_there(place: Any, name: str) -> None:
    """ValueError for a place in a map of devices, a number or a name, that is not there."""
    if place in _STORED:
        return
    kind = chosen_device("auto")
    named = f"{'cuda' if kind == 'cpu' else kind}:{place}" if isinstance(place, int) else place
    if not isinstance(named, str | torch.device):
        raise ValueError(f"{name} must be the number or the name of a device, got {place!r}.")
    try:
        chosen_device(named)
    except ValueError as error:
        raise ValueError(f"{name} is no device that is there: {error}") from error
