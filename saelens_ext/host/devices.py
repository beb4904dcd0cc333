"""Where to compute: a device by name, checked before anything is computed."""

import torch


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
