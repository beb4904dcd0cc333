"""Memory does not grow with the number of tokens, by the bytes of the tensors that are alive."""

import datasets
import pytest
import torch

import saelens_ext as ext
from saelens_ext.analysis import profiler
from saelens_ext.ops.semi_nmf.updates import sum_of_squares
from tests import models_zoo
from tests.live_bytes import LiveBytes

HOOK = "blocks.1.hook_out"
OPTIONS = {"context_size": 16, "batch_size": 4}


@pytest.fixture(scope="module")
def model():
    return models_zoo.make_model("llama", "SAETransformerBridge")


def test_live_bytes_are_those_of_the_tensors_that_are_held():
    with LiveBytes() as live:
        held = torch.zeros(1000)
        view, other = held[:10], torch.ones(500) + 1
        assert (live.now, live.most) == (6000, 8000)  # the sum beside its first term
        del held, other
        assert live.now == 4000
        del view
        assert live.now == 0


def _most(work, streams):
    work(streams[0])  # what torch and the model keep from their first use
    most = []
    for stream in streams:
        with LiveBytes() as live:
            kept = work(stream)
        most.append(live.most)
        del kept
    return most


def _streams(model, texts):
    return [ext.ActivationStream(model, texts * n, HOOK, **OPTIONS) for n in (2, 8)]


@pytest.mark.slow
def test_the_peak_of_a_build_does_not_depend_on_the_number_of_tokens(model, tiny_texts):
    options = {"threshold": 1.5, "calibration_activations": 200}  # one region or two, however many tokens
    build = lambda stream: ext.fit_exemplar_partition(stream, **options)  # noqa: E731
    short, long = _most(build, _streams(model, tiny_texts))
    assert long < 1.05 * short


@pytest.mark.slow
def test_the_peak_of_a_profile_does_not_depend_on_the_number_of_tokens(model, tiny_texts, monkeypatch):
    monkeypatch.setattr(profiler, "_MAX_BLOCK", 256)  # of the short stream there are several blocks, too
    streams = _streams(model, tiny_texts)
    dictionary = ext.fit_exemplar_partition(streams[0], percentile=20).dictionary
    profile = lambda stream: ext.profile_dictionary(dictionary, stream, n_background=8)  # noqa: E731
    short, long = _most(profile, streams)
    assert long < 1.05 * short


@pytest.mark.parametrize("on_disk", [True, False], ids=["disk", "streamed"])
def test_a_stream_holds_one_batch_and_reads_no_further(model, tiny_texts, tmp_path, on_disk):
    read = []

    def documents():
        for number, text in enumerate(tiny_texts * 4):
            read.append(number)
            yield {"text": text[:40]}  # less than a window, so that every document is one

    if on_disk:
        datasets.Dataset.from_list(list(documents())).save_to_disk(tmp_path / "texts")
        dataset = datasets.load_from_disk(tmp_path / "texts")
    else:
        dataset = datasets.IterableDataset.from_generator(documents)
    stream = ext.ActivationStream(model, dataset, HOOK, context_size=64, batch_size=4)
    sizes = []
    read.clear()
    with LiveBytes() as live:
        for number, batch in enumerate(stream):
            assert on_disk or len(read) <= 4 * (number + 1) + 1
            del batch
            sizes.append(live.now)
    assert len(sizes) == 12 and max(sizes[2:]) <= 1.05 * sizes[1]


def test_a_sum_of_squares_needs_no_whole_copy():
    x = torch.randn(10_000, 3, generator=torch.Generator().manual_seed(0))
    expected = float(x.double().square().sum())
    with LiveBytes() as live:
        assert sum_of_squares(x) == pytest.approx(expected, rel=1e-12)
    # A block of at most 4,096 rows in double precision, and single numbers; views of the activations count as these.
    assert x.nbytes < live.most <= x.nbytes + 4096 * 3 * 8 + 100
