"""The examples in the docstrings of the main entries run, on a tiny model, and show what they say."""

import doctest

import numpy as np
import pytest
import torch

import saelens_ext as sx

ENTRIES = [name for name in sx.__all__ if ">>> " in (getattr(sx, name).__doc__ or "")]
SLOW = {"audit_continuations", "evaluate_novelty"}


@pytest.fixture(scope="module")
def names(tiny_bridge, tiny_texts):
    """What every example may use."""
    texts = tiny_texts * 2
    stream = sx.ActivationStream(tiny_bridge, texts, "blocks.1.hook_out", context_size=16, max_tokens=300)
    neuron_stream = sx.ActivationStream(tiny_bridge, texts, "blocks.1.mlp.hook_post", context_size=16, max_tokens=300)
    partition = sx.fit_exemplar_partition(stream, percentile=20, calibration_activations=200).dictionary
    return {
        "sx": sx,
        "np": np,
        "torch": torch,
        "model": tiny_bridge,
        "texts": texts,
        "stream": stream,
        "neuron_stream": neuron_stream,
        "activations": next(iter(stream)).activations["blocks.1.hook_out"],
        "neurons": next(iter(neuron_stream)).activations["blocks.1.mlp.hook_post"],
        "partition": partition,
        "profile": sx.profile_dictionary(partition, stream),
    }


def test_the_main_entries_have_examples():
    assert len(ENTRIES) >= 20


@pytest.mark.parametrize(
    "entry", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in ENTRIES]
)
def test_the_example_shows_what_it_says(entry, names):
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(sx, entry), entry, globs=dict(names))
    failures = []
    doctest.DocTestRunner(verbose=False).run(example, out=failures.append)
    assert not failures, "".join(failures)
