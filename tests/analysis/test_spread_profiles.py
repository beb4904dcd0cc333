"""Profiles that are made in parts, here and on a local Ray cluster of two workers, against those of one process."""

import pickle

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata

from saelens_ext.activations.ray_stream import RayActivationStream
from saelens_ext.activations.stream import ActivationStream, up_to
from saelens_ext.analysis import profiler
from saelens_ext.analysis.labels import label_latents
from saelens_ext.analysis.profile import DictionaryProfile, profile_dictionaries, profile_dictionary
from saelens_ext.analysis.profiler import Profiled, gathered_there
from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from tests.activations.test_ray_stream import HOOKS, OPTIONS, kill, load
from tests.analysis.profiled import DICTIONARIES, CutStream, D, assert_same, integers
from tests.test_modes import leaves

ROUNDED = ("mean_activation", "coherence", "mean_distance")
SIZES = {"n_examples": 4, "n_boundary": 3, "n_random": 3, "n_background": 20, "context": 3, "seed": -5}


def assert_same_but_for_rounding(one, other):
    """Equal; where sums in float64 were divided and rounded to float32, up to the last bit of that."""
    for (path, mine), (where, theirs) in zip(leaves(one), leaves(other), strict=True):
        if str(where).endswith(ROUNDED):
            torch.testing.assert_close(mine, theirs, rtol=2**-23, atol=0, equal_nan=True)
        elif isinstance(mine, torch.Tensor):
            assert mine.dtype == theirs.dtype and torch.equal(mine.nan_to_num(-9), theirs.nan_to_num(-9)), path
        else:
            assert mine == theirs, path


def merged(sae, x, stretch, rows):
    """The profile of stretches of so many activations, each gathered by itself from batches of so many and sent."""
    stream = CutStream(x, rows)
    profiled, batches = Profiled.of(sae, stream, None, **SIZES), list(stream)
    found, margin = profiled.tallies(), 2 * profiled.rows
    for start in range(0, len(x), stretch):
        stop = start + stretch
        first = max(0, start - margin) // rows
        around = iter(batches[first : -(-(stop + margin) // rows)])
        part = gathered_there([profiled], around, first * rows, start, stop)[0]
        found.merge(pickle.loads(pickle.dumps(part)))
    return DictionaryProfile(**profiled.fields(found))


@pytest.mark.parametrize("name", DICTIONARIES)
@pytest.mark.parametrize(("stretch", "rows"), [(37, 5), (64, 64), (150, 30), (9, 7)])
def test_stretches_make_up_the_whole(name, stretch, rows, monkeypatch):
    monkeypatch.setattr(profiler, "_MAX_BLOCK", 16)
    sae, x = DICTIONARIES[name](), torch.cat([integers(100, D, seed=9), integers(100, D, seed=9)])  # all twice: ties
    assert_same_but_for_rounding(merged(sae, x, stretch, rows), profile_dictionary(sae, CutStream(x), **SIZES))


def test_latents_that_were_not_met_do_not_travel():
    units = torch.nn.functional.normalize(torch.randn(5000, D, generator=torch.Generator().manual_seed(1)), dim=1)
    partition = ExemplarPartition.from_regions(units, units, torch.zeros(D), 0.5, metadata={"hook_name": "rows"})
    codes = TopKSAE(TopKSAEConfig(d_in=D, d_sae=5000, k=2))
    stream = CutStream(integers(30, D), hook_name="rows")
    for sae in (partition, codes):
        profiled = Profiled.of(sae, stream, "rows", **SIZES)
        (found,) = gathered_there([profiled], iter(stream), 0, 0, 30)
        # Per latent three numbers of 8 bytes or less at most of each tally; of 60 at most, examples and directions.
        n_tables = 3 if sae is partition else 2
        assert len(pickle.dumps(found)) < 5000 * 2 * 3 * 8 + 60 * n_tables * 4 * (40 + 6 * 7) + 60 * D * 8 + 10_000


# --- on a cluster ---


def dictionaries(stream):
    x = torch.cat([batch.activations[HOOKS[0]] for batch in stream])
    units = torch.nn.functional.normalize(x[::40] - x.mean(dim=0), dim=1)
    regions = ExemplarPartition.from_regions(units, units, x.mean(dim=0), 0.5, metadata={"hook_name": HOOKS[0]})
    options = {"d_in": x.shape[1], "metadata": SAEMetadata(hook_name=HOOKS[1])}
    return [
        regions,
        StandardSAE(StandardSAEConfig(d_sae=40, **options)),
        TopKSAE(TopKSAEConfig(d_sae=24, k=3, **options)),
    ]


def small_stretches(monkeypatch):
    monkeypatch.setattr(profiler, "_MAX_BLOCK", 16)
    monkeypatch.setattr(profiler, "_BLOCKS_OF_STRETCH", 4)
    monkeypatch.setattr(profiler, "_ROWS_PER_LATENT", 1)


@pytest.mark.slow
def test_profiles_are_those_of_one_process(cluster, tiny_texts, monkeypatch):
    single = ActivationStream(load(), tiny_texts, HOOKS, **OPTIONS)
    saes = dictionaries(single)
    with RayActivationStream(load, tiny_texts, HOOKS, n_workers=2, **OPTIONS) as stream:
        # In one stretch they are the same to the bit.
        for one, other in zip(profile_dictionaries(saes, single), profile_dictionaries(saes, stream), strict=True):
            assert_same(one, other)
        small_stretches(monkeypatch)
        expected, found = profile_dictionaries(saes, single, **SIZES), profile_dictionaries(saes, stream, **SIZES)
        for one, other in zip(expected, found, strict=True):
            assert_same_but_for_rounding(one, other)
            labels = [label_latents(profile, single.tokenizer) for profile in (one, other)]
            assert [label.text for label in labels[0]] == [label.text for label in labels[1]]
        with torch.no_grad():
            saes[1].b_enc[3] = torch.inf
        for one in (single, stream):
            with pytest.raises(ValueError, match="The code that the dictionary gives .*non-finite"):
                profile_dictionary(saes[1], one)


@pytest.mark.slow
def test_a_worker_dies_on_the_way_of_profiles_that_are_made_elsewhere(cluster, tiny_texts, caplog, monkeypatch):
    single = ActivationStream(load(), tiny_texts, HOOKS, **OPTIONS)
    saes = dictionaries(single)
    small_stretches(monkeypatch)
    expected, n_parts = profile_dictionaries(saes, single, **SIZES), 0
    with RayActivationStream(load, tiny_texts, HOOKS, n_workers=2, restarts=1, **OPTIONS) as stream:
        in_turn = stream._in_turn

        def watched(tasks, work):
            nonlocal n_parts
            for answer in in_turn(tasks, work):
                n_parts += 1
                yield answer
                if n_parts == 1:
                    kill(stream._actors[0])

        def not_here(sae, x):
            raise AssertionError("codes are found in the actors")

        stream._in_turn = watched
        monkeypatch.setattr(profiler, "encode_flat", not_here)
        found = profile_dictionaries(saes, stream, **SIZES)
    assert n_parts == -(-500 // 64) and int(found[0].counts.sum()) + found[0].n_unassigned == 500
    for one, other in zip(expected, found, strict=True):
        assert_same_but_for_rounding(one, other)
    assert [record.message[:18] for record in caplog.records].count("A Ray actor died, ") == 1


@pytest.mark.parametrize(("rows", "margin"), [(50, 0), (7, 60), (64, 10), (600, 3), (1, 0)])
def test_stretches_hold_what_was_asked_for(tiny_texts, rows, margin):
    options = OPTIONS | {"last_token_only": rows == 1, "max_tokens": 205}
    single = ActivationStream(load(), tiny_texts, HOOKS, **options)
    places = [place for batch in single for place in zip(batch.sequence_ids.tolist(), batch.positions.tolist())]
    longest = max(map(len, single))
    stream, sizes = RayActivationStream(load, tiny_texts, HOOKS, **options), []

    def here(tasks, work):
        for task in tasks:
            sizes.append(task.n)
            yield work(up_to(task.limit, single._batches(iter(task.chunks))), *task.where), task.n
        stream._d_in.update(single.d_in)

    def work(batches, first, start, stop):
        read = [zip(batch.sequence_ids.tolist(), batch.positions.tolist(), strict=True) for batch in batches]
        return first, start, stop, [place for batch in read for place in batch]

    stream._in_turn = here
    found = list(stream.mapped_stretches(work, rows, margin))
    assert [start for _, start, _, _ in found] == list(range(0, len(places), rows))
    assert all(stop - start == rows for _, start, stop, _ in found) and sum(sizes) == len(places)
    for first, start, stop, read in found:
        assert read == places[first : first + len(read)]
        assert first <= max(0, start - margin) and first + len(read) >= min(len(places), stop + margin)
        assert len(read) <= rows + 2 * (margin + longest), "no more batches than hold them"
    with pytest.raises(ValueError, match="rows must be"):
        stream.mapped_stretches(work, 0, margin)
