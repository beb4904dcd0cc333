"""Float64 on the device of a tensor, or on the CPU where the device has none.

What must be exact or sums many terms is computed in float64. Apple's MPS has no such numbers: there the model runs on
the GPU and these parts on the CPU, on whose memory they already are; results come back to the device of the input.
"""

from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

WITHOUT_FLOAT64 = {"mps"}
"""Types of devices."""


def float64_device(device: torch.device) -> torch.device:
    """The device, or the CPU in place of one without float64."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def where_float64_is(x: Tensor) -> Tensor:
    """The tensor itself, or its copy on the CPU where its device has no float64."""
    return x.to(float64_device(x.device))


def wide(x: Tensor) -> Tensor:
    """The tensor in float64, on :func:`float64_device`."""
    # In two steps: a device without float64 cannot cast on the way out.
    return where_float64_is(x).double()


def from_float64(module: M, device: torch.device) -> M:
    """A module that was made where float64 is, on the device that its activations came from."""
    return module.to(device) if device.type in WITHOUT_FLOAT64 else module
