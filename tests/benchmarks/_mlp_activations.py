"""Neuron activations of the demo model's middle MLP, read once and kept in a temporary file."""

import os
import tempfile
from pathlib import Path

import torch

HOOK = "blocks.15.mlp.out.hook_in"


def mlp_activations(n: int) -> torch.Tensor:
    """``(n, 1536)`` float32 activations of layer 15 of the demo model on Python's own documentation, in shuffled order.

    Shuffled, so that a smaller set is a sample of the larger. ``$SAELENS_EXT_BENCH_ACTIVATIONS`` names another file
    of one tensor to read instead.
    """
    given = os.environ.get("SAELENS_EXT_BENCH_ACTIVATIONS")
    path = Path(given) if given else Path(tempfile.gettempdir()) / "saelens_ext_bench_mlp15.pt"
    if not path.exists():
        from saelens_ext.activations.stream import ActivationStream
        from saelens_ext.demo.packaged import load_demo_corpus, load_demo_model

        stream = ActivationStream(load_demo_model(), load_demo_corpus(), HOOK)
        x = torch.cat([batch.activations[HOOK] for batch in stream])
        partial = path.with_suffix(f".{os.getpid()}")
        torch.save(x, partial)
        partial.replace(path)
    x = torch.load(path, weights_only=True)
    if len(x) < n:
        raise SystemExit(f"{path} holds {len(x)} activations; {n} were asked for.")
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:n]].float()
