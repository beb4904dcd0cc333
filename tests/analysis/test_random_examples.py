"""Random examples of latents: what is drawn, how evenly, and that it does not depend on the batches."""

from dataclasses import replace

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from saelens_ext.analysis.profile import DictionaryProfile, profile_dictionary
from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from tests.analysis.test_profile import HOOK, CutStream, D

N, DRAWN = 300, 6


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def standard():
    sae = StandardSAE(
        StandardSAEConfig(d_in=D, d_sae=5, metadata=SAEMetadata(hook_name=HOOK), apply_b_dec_to_input=False)
    )
    with torch.no_grad():
        sae.W_enc.copy_(normal(D, 5, seed=1))
    return sae


def partition():
    units = torch.nn.functional.normalize(normal(4, D, seed=2), dim=1)
    return ExemplarPartition.from_regions(units, units, center=torch.zeros(D), threshold=0.3)


@torch.no_grad()
@pytest.mark.parametrize("make", [standard, partition])
def test_they_are_examples_of_the_latent_with_their_values_and_no_two_alike(make, tmp_path):
    sae, x = make(), normal(N, D)
    profile = profile_dictionary(sae, CutStream(x), n_random=DRAWN, seed=1)
    codes = sae.encode(x) if make is standard else None
    columns = CutStream(x).columns
    where = {
        (int(d), int(p), int(t)): i
        for i, (d, p, t) in enumerate(zip(columns["sequence_ids"], columns["positions"], columns["token_ids"]))
    }
    for latent in range(profile.d_sae):
        rows = set()
        assert int((profile.random.token_ids[latent] >= 0).sum()) == min(DRAWN, int(profile.counts[latent]))
        for number in range(min(DRAWN, int(profile.counts[latent]))):
            key = (int(profile.random.positions[latent, number]), int(profile.random.token_ids[latent, number]))
            candidates = [
                i
                for (d, p, t), i in where.items()
                if (p, t) == key and d // 2 == int(profile.random.document_ids[latent, number])
            ]
            value = float(profile.random.values[latent, number])
            if make is standard:
                found = [i for i in candidates if abs(float(codes[i, latent]) - value) < 1e-6 and value != 0]
            else:
                regions, distances = sae.assign(x[candidates])
                found = [
                    i
                    for i, r, d in zip(candidates, regions, distances)
                    if int(r) == latent and abs(float(d) - value) < 1e-6
                ]
            assert found
            rows.add(found[0])
        assert len(rows) == min(DRAWN, int(profile.counts[latent]))
    profile.save(tmp_path)
    assert torch.equal(DictionaryProfile.load(tmp_path).random.token_ids, profile.random.token_ids)


def test_they_do_not_depend_on_the_batches_but_on_the_seed():
    sae, x = standard(), normal(N, D)
    first, again, other = (
        profile_dictionary(sae, CutStream(x, rows), n_random=DRAWN, seed=seed).random
        for rows, seed in ((1000, 0), (7, 0), (1000, 1))
    )
    assert torch.equal(first.document_ids, again.document_ids) and torch.equal(first.values, again.values)
    assert not torch.equal(first.document_ids, other.document_ids)
    assert profile_dictionary(sae, CutStream(x)).random is None
    with pytest.raises(ValueError, match="n_random"):
        profile_dictionary(sae, CutStream(x), n_random=-1)


def test_random_draws_come_from_the_whole_stream():
    """From each of four blocks as it is read about a quarter, and not from the same places of each."""
    block, window = 4096, 9
    stream = CutStream(normal(4 * block, D), rows=block, window=window)
    profile = profile_dictionary(standard(), stream, n_examples=1, n_random=100, n_background=400)
    draws = [profile.background, *(replace(profile.random, **_of(profile.random, j)) for j in range(profile.d_sae))]
    for drawn in draws:
        rows = drawn.sequence_ids * window + drawn.positions - 1
        share = (rows // block).bincount(minlength=4) / len(rows)
        assert share.min() > 0.1
        assert len(set((rows % block).tolist())) > 0.9 * len(rows)


def _of(examples, latent):
    return {name: getattr(examples, name)[latent] for name in ("sequence_ids", "positions")}


@pytest.mark.slow
@torch.no_grad()
def test_every_active_token_is_equally_likely():
    """Over many seeds, each of the active tokens of a latent is drawn about equally often (chi-squared, six sigma)."""
    sae, x = standard(), normal(60, D)
    active = (sae.encode(x)[:, 0] != 0).nonzero().squeeze(1)
    drawn = torch.zeros(60)
    seeds = 200
    for seed in range(seeds):
        profile = profile_dictionary(sae, CutStream(x), n_random=3, seed=seed)
        for value in profile.random.values[0]:
            drawn[(sae.encode(x)[:, 0] - value).abs().argmin()] += 1
    expected = 3 * seeds / len(active)
    assert drawn[active].sum() == drawn.sum() == 3 * seeds
    statistic = float(((drawn[active] - expected) ** 2 / expected).sum())
    freedom = len(active) - 1
    assert abs(statistic - freedom) < 6 * (2 * freedom) ** 0.5
