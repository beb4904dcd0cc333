"""Where memory does not suffice, one sentence says what was needed, for what, and what helps."""

import resource
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import saelens_ext as ext
from saelens_ext.analysis.examples import ExampleTable
from saelens_ext.cli.errors import one_line
from saelens_ext.host.prompt_passes import KVCache
from saelens_ext.ops.memory import NotEnoughMemory, lacks_memory, memory_for, written
from tests.continuations._dictionaries import own
from tests.models_zoo import MODEL_CLASSES, make_model, make_tokenizer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits the address space of the process")
MB = 10**6


@contextmanager
def no_more_than(n_bytes):
    """So many bytes can be allocated inside the context and no more."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def rows(n, d):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**50), lambda: np.empty(2**50), lambda: bytearray(2**50)])
def test_every_allocators_error_is_known(allocate):
    with pytest.raises(
        NotEnoughMemory, match=r"Things of size 3 need at least 9,007,199 GB of memory, .* Ask for less"
    ):
        with memory_for("Things of size 3", 2**53, "Ask for less."):
            allocate()


def test_other_errors_pass_and_the_inner_sentence_stays():
    for error in (RuntimeError("shapes cannot be multiplied"), ValueError("out of memory")):
        with pytest.raises(type(error), match=str(error)):
            with memory_for("It", 1, "No."):
                raise error
    with pytest.raises(NotEnoughMemory, match="^Inner things need more memory than there is"):
        with memory_for("Outer things", 1, "No."), memory_for("Inner things", None, "Yes."):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert lacks_memory(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"))
    assert [written(n) for n in (3, 1500, 25 * MB, 1_230 * MB)] == ["3 bytes", "1.5 kB", "25 MB", "1.2 GB"]


@pytest.mark.slow
def test_regions_that_grow_beyond_memory():
    # Buffers of tens of megabytes are memory of their own; smaller ones may be what the process has left over.
    x = rows(6000, 4000)
    clustering = ext.LeaderClustering(torch.zeros(4000), 0.1)
    clustering.partial_fit(x[:10])  # what torch keeps from its first use
    said = r"Buffers for [\d,]+ regions of width 4000 on cpu need at least \d+ MB"
    with no_more_than(60 * MB), pytest.raises(NotEnoughMemory, match=said):
        for block in x.split(200):
            clustering.partial_fit(block)
    assert 10 < len(clustering.exemplars) < 6000, "what was found before is still there"


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda regions, x: regions.encode(x), r"Codes of 10,000,000 activations over 12 regions .* Give fewer"),
        (lambda regions, x: regions.assign(x), r"Regions and distances of 10,000,000 activations, .* Give fewer"),
    ],
    ids=["encode", "assign"],
)
def test_too_many_activations_for_a_partition(work, said):
    regions, x = own(32)[0], rows(1, 32).expand(10_000_000, 32)
    work(regions, x[:10])
    with torch.no_grad(), no_more_than(50 * MB), pytest.raises(NotEnoughMemory, match=said):
        work(regions, x)


def test_too_many_activations_for_neuron_groups():
    features, x = own(32)[1], rows(1, 32).expand(10_000_000, 32)
    features.encode(x[:10])
    said = r"Codes of 10,000,000 activations over 9 features need at least 360 MB .* Give fewer"
    with torch.no_grad(), no_more_than(200 * MB), pytest.raises(NotEnoughMemory, match=said):
        features.encode(x)


@pytest.mark.slow
def test_too_many_activations_for_a_fit():
    x = rows(500_000, 32)
    ext.fit_snmf(x[:100], 4, max_iter=2)
    said = (
        r"500,000 activations of width 32, and their codes over 24 features, need at least 112 MB .* Lower memory_lim"
    )
    with no_more_than(40 * MB), pytest.raises(NotEnoughMemory, match=said):
        ext.fit_snmf(x, 24, max_iter=2)


def test_examples_of_too_many_latents_and_the_commands_line():
    said = (
        r"^9 examples of each of 1,000,000,000,000 latents, with 30 tokens on either side, need at least 3,\d+,\d+ GB"
    )
    with pytest.raises(NotEnoughMemory, match=said) as caught:
        ExampleTable(10**12, 9, 30, torch.device("meta"))
    assert one_line(caught.value) == " ".join(str(caught.value).split()) and "--debug" not in one_line(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_a_model_that_does_not_fit(model_class):
    sizes = {"hidden_size": 32, "intermediate_size": 400_000, "num_hidden_layers": 1, "num_attention_heads": 4}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    tokenizer = make_tokenizer()
    model.model.layers[0].mlp.up_proj.weight.float()  # what torch keeps from its first use
    said = r"^The weights of 'big' in float32 need at least 154 MB of memory, .* Give fewer bits \(dtype='bfloat16'\)"
    with no_more_than(80 * MB), pytest.raises(NotEnoughMemory, match=said):
        ext.load_model("big", model_class=model_class, hf_model=model, tokenizer=tokenizer, dtype="float32")


def test_a_batch_of_draws_that_does_not_fit(monkeypatch):
    model = make_model("llama", "SAETransformerBridge")

    def out_of_memory(cache, ids):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(KVCache, "run", out_of_memory)
    said = r"^Passes that sample 32 continuations behind \d+ tokens of prefix need more memory .* Lower batch_size"
    with pytest.raises(NotEnoughMemory, match=said):
        ext.sample_continuations(model, "The assert", 40)
