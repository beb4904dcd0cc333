"""What a profile keeps beside its examples: the codes around them, and random activations."""

from dataclasses import replace

import pytest
import torch

from saelens_ext.analysis import profiler as profile_module
from saelens_ext.analysis.profile import DictionaryProfile, profile_dictionary
from saelens_ext.host.flat_sae import encode_flat
from tests.analysis.profiled import DICTIONARIES, CutStream, D, K, assert_same, integers


def stream_with_gaps(n=200, rows=1000):
    """A stream in which every fifth token is not read."""
    stream = CutStream(integers(n, D), rows)
    read = torch.arange(n) % 5 != 2
    stream.x = stream.x[read]
    stream.columns = {name: column[read] for name, column in stream.columns.items()}
    return stream


@pytest.mark.parametrize("name", sorted(DICTIONARIES))
@pytest.mark.parametrize("rows_of_a_block", [1, 7, 4096])
def test_examples_hold_the_code_of_every_token_around(name, rows_of_a_block, monkeypatch):
    monkeypatch.setattr(profile_module, "_MAX_BLOCK", rows_of_a_block)
    sae, stream, context = DICTIONARIES[name](), stream_with_gaps(), 4
    profile = profile_dictionary(sae, stream, context=context, n_examples=6, n_random=3)
    codes = encode_flat(sae, stream.x).detach()
    where = {
        place: row
        for row, place in enumerate(
            zip(stream.columns["sequence_ids"].tolist(), stream.columns["positions"].tolist(), strict=True)
        )
    }
    checked = 0
    for table in (profile.top, profile.random, profile.boundary):
        for latent, place in [] if table is None else (table.token_ids >= 0).nonzero().tolist():
            sequence, position = int(table.sequence_ids[latent, place]), int(table.positions[latent, place])
            at = [where.get((sequence, position + step)) for step in range(-context, context + 1)]
            expected = torch.tensor([torch.nan if row is None else float(codes[row, latent]) for row in at]).half()
            assert torch.equal(table.token_values[latent, place].nan_to_num(-9), expected.nan_to_num(-9))
            checked += 1
    assert checked > 20
    assert bool(profile.top.token_values[profile.top.token_ids < 0].isnan().all())


def test_codes_beyond_float16_are_its_largest():
    sae = DICTIONARIES["standard"]()
    with torch.no_grad():
        sae.W_enc *= 1e6
    profile = profile_dictionary(sae, CutStream(integers(60, D)), context=1)
    known = profile.top.token_values[~profile.top.token_values.isnan()]
    assert float(known.max()) == torch.finfo(torch.float16).max and bool(known.isfinite().all())


@pytest.mark.parametrize("name", ["standard", "partition", "regions"])
def test_the_background_is_drawn_from_all_and_knows_whose_members_it_has(name, monkeypatch):
    monkeypatch.setattr(profile_module, "_MAX_BLOCK", 50)
    sae, stream = DICTIONARIES[name](), CutStream(integers(400, D))
    whole = profile_dictionary(sae, stream, n_background=64)
    background = whole.background
    rows = background.sequence_ids * 9 + background.positions - 1
    assert len(set(rows.tolist())) == 64 and 120 < rows.double().mean() < 280
    assert torch.equal(background.contexts[:, whole.context].long(), stream.columns["token_ids"][rows])
    active = torch.zeros(64, K, dtype=torch.bool)
    active[background.active[:, 0], background.active[:, 1]] = True
    if hasattr(sae, "assign"):
        regions = list(sae.assign(stream.x[rows]).regions if name == "partition" else sae.assign(stream.x[rows]))
        regions = torch.stack(regions) if name == "partition" else regions[0]
        expected = regions[:, None] == torch.arange(K)
    else:
        expected = encode_flat(sae, stream.x[rows]).detach() != 0
    assert torch.equal(active, expected)
    assert_same(profile_dictionary(sae, CutStream(stream.x, 33), n_background=64), whole)
    assert profile_dictionary(sae, stream, n_background=0).background is None
    assert len(profile_dictionary(sae, CutStream(integers(30, D))).background.positions) == 30
    with pytest.raises(ValueError, match="n_background"):
        profile_dictionary(sae, stream, n_background=-1)


def test_profiles_from_before_they_were_kept_are_read(tmp_path):
    profile = profile_dictionary(DICTIONARIES["partition"](), CutStream(integers(60, D)))
    older = {
        name: replace(getattr(profile, name), token_values=None, sequence_ids=None) for name in ("top", "boundary")
    }
    older = replace(profile, background=None, **older)
    loaded = DictionaryProfile.load(older.save(tmp_path))
    assert_same(loaded, older)
    assert loaded.top.token_values is None and loaded.background is None
