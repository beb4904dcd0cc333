"""Devices by name."""

import pytest
import torch

from saelens_ext.host.devices import chosen_device


@pytest.mark.parametrize(
    ("cuda", "mps", "best"), [(2, True, "cuda"), (0, True, "mps"), (0, False, "cpu")], ids=["cuda", "mps", "cpu"]
)
def test_auto_takes_the_best_device_and_what_is_not_there_is_named(monkeypatch, cuda, mps, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert chosen_device("auto") == best
    with pytest.raises(ValueError, match="There is no device 'cuda:2' here, only cpu"):
        chosen_device("cuda:2")
    if mps:
        assert chosen_device("mps") == "mps"
