"""Runs on a tiny model that the tests of the runner share."""

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from saelens_ext.runner import DictionaryRunnerConfig, ExemplarBuildConfig, SNMFBuildConfig

HOOK, NEURONS = "blocks.1.hook_out", "blocks.1.mlp.out.hook_in"
TEXTS = [p for p in topics["assert"].split("\n\n") + topics["booleans"].split("\n\n") if len(p) > 20][:14]
PARTITIONS = ExemplarBuildConfig(percentile=[5, 20], calibration_activations=200)
FACTORS = SNMFBuildConfig(n_components=[3, 4], sparsity=0.2, held_out=0.2, max_iter=4, hook_name=NEURONS)


def config(folder: Path, **changes: Any) -> DictionaryRunnerConfig:
    """Two partitions of one hook, nothing else done with them, everything below ``folder``."""
    options = {
        "hook_name": HOOK,
        "dictionary": PARTITIONS,
        "context_size": 16,
        "training_tokens": 600,
        "store_batch_size_prompts": 4,
        "n_eval_batches": 0,
        "profile": False,
        "checkpoint_path": str(folder / "checkpoints"),
        "output_path": str(folder / "output"),
    }
    return DictionaryRunnerConfig(**options | changes)


def assert_same_partition(one: Any, other: Any) -> None:
    """Bit for bit, with all statistics."""
    for name in ("counts", "coherence", "exemplar_indices"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.equal(one.dictionary.exemplars, other.dictionary.exemplars)
    assert torch.equal(one.dictionary.means, other.dictionary.means)
    assert torch.equal(one.dictionary.center, other.dictionary.center)
    assert torch.equal(one.provenance.windows, other.provenance.windows)
    assert torch.equal(one.provenance.sequence_ids, other.provenance.sequence_ids)
    assert (one.threshold, one.typical_norm, one.stopped_because) == (
        other.threshold,
        other.typical_norm,
        other.stopped_because,
    )
    assert (one.n_seen, one.unseen_mass_upper) == (other.n_seen, other.unseen_mass_upper)
