"""One continuation per feature at one divergence: against the search for single directions, and against steering by
hand.
"""

import json

import pytest
import torch
from sae_lens import Transcoder, TranscoderConfig
from sae_lens.saes.sae import SAEMetadata

from saelens_ext.dictionaries.snmf import SNMFDictionary
from saelens_ext.steering import divergence_search
from saelens_ext.steering.divergence_search import DivergenceSearch
from saelens_ext.steering.interventions import latent_directions
from saelens_ext.steering.sampling import SamplingOptions, sample_texts
from saelens_ext.steering.steer_features import steer_features
from saelens_ext.steering.strength import match_strength
from tests.steering.steered import sample_steered

HOOK = "blocks.1.mlp.hook_post"
OPTIONS = SamplingOptions(max_new_tokens=6, seed=3)


@pytest.fixture(params=["tiny_bridge", "tiny_gpt2_hooked"])
def model(request):
    return request.getfixturevalue(request.param)


def make_dictionary(model, k=5, **metadata):
    features = torch.randn(k, model.cfg.d_mlp, generator=torch.Generator().manual_seed(0))
    features[2] = 0
    return SNMFDictionary.from_features(features, metadata={"hook_name": HOOK} | metadata)


def steer_latents(model, dictionary, **options):
    hook, directions, norm = latent_directions(model, dictionary)
    return steer_features(model, hook, directions, **{"typical_norm": norm} | options)


def test_strengths_are_those_of_single_searches(model):
    dictionary = make_dictionary(model)
    steered = steer_latents(
        model, dictionary, target=0.02, signs=(1, -1), tolerance=0.001, options=OPTIONS, batch_size=3
    )
    assert [(text.feature, text.strength.sign) for text in steered.texts] == [
        (f, s) for f in (0, 1, 3, 4) for s in (1, -1)
    ]
    for text in steered.texts:
        row = dictionary.W_dec[text.feature].detach()
        (alone,) = match_strength(model, HOOK, row, [0.02], signs=(text.strength.sign,), tolerance=0.001).strengths
        assert text.strength.status == alone.status == "reached"
        assert text.strength.coefficient == pytest.approx(alone.coefficient, rel=0.01)
        assert text.strength.kl == pytest.approx(0.02, rel=0.001)


def test_continuations_are_those_of_steering_one_by_one(model):
    dictionary = make_dictionary(model)
    steered = steer_latents(model, dictionary, target=0.5, options=OPTIONS, batch_size=3)
    same = {"n": 1, "max_new_tokens": OPTIONS.max_new_tokens, "seed": OPTIONS.seed}
    assert [steered.unsteered] == sample_texts(model, "I think that", n=1, options=OPTIONS)[0]
    for text in steered.texts:
        row = dictionary.W_dec[text.feature].detach()
        assert [text.text] == sample_steered(model, "I think that", HOOK, row, text.strength.coefficient, **same)[0]
    assert any(text.text != steered.unsteered for text in steered.texts)


def test_a_target_out_of_reach_has_no_text(model):
    steered = steer_latents(
        model, make_dictionary(model), target=0.5, features=[1, 3], max_strength=1e-4, options=OPTIONS
    )
    assert [text.feature for text in steered.texts] == [1, 3]
    for text in steered.texts:
        assert text.text is None and text.strength.status == "saturated" and 0 <= text.strength.kl < 0.5


def test_the_unit_is_what_the_dictionary_records(tiny_bridge):
    dictionary = make_dictionary(tiny_bridge, typical_norm=1e-6)
    lost = steer_latents(tiny_bridge, dictionary, features=[0], max_strength=1, options=OPTIONS).texts[0]
    assert not lost.strength.reached and abs(lost.strength.coefficient) <= 1e-6
    given = steer_latents(tiny_bridge, dictionary, features=[0], target=0.01, typical_norm=5, options=OPTIONS).texts[0]
    assert given.strength.reached


def test_a_transcoder_steers_where_it_writes(model):
    """Its rows are directions at its output, of the same width as its input."""
    torch.manual_seed(0)
    read, write = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"
    metadata = SAEMetadata(hook_name=read, hook_name_out=write, typical_norm=1e-6)
    made = Transcoder(TranscoderConfig(d_in=32, d_out=32, d_sae=4, apply_b_dec_to_input=False, metadata=metadata))
    steered = steer_latents(model, made, target=0.05, tolerance=0.001, options=OPTIONS, max_strength=20)
    assert steered.hook_name == write
    for text in steered.texts:
        row = made.W_dec[text.feature].detach()
        (alone,) = match_strength(model, write, row, [0.05], signs=(1,), tolerance=0.001).strengths
        # The typical norm that is recorded is of what it reads.
        assert text.strength.reached and text.strength.coefficient == pytest.approx(alone.coefficient, rel=0.01)
    made.cfg.metadata.hook_name_out = None
    with pytest.raises(ValueError, match="is a transcoder without sae.cfg.metadata.hook_name_out"):
        steer_latents(model, made)


def test_the_first_crossing_counts():
    """Of a divergence that rises, falls below the target and rises again."""

    def divergences(points):
        return [a**2 if a < 1 else max(0.1, 1 - 2 * (a - 1)) if a < 8 else float("inf") for _, a in points]

    (strength,) = DivergenceSearch(divergences, [1]).run([0.5], 0.01, norm=8, limit=800, batch_size=1)
    assert strength.coefficient == pytest.approx(0.5**0.5, rel=0.01) and strength.reached


def test_features_that_point_nowhere_are_left_out_or_refused(model):
    directions = make_dictionary(model).W_dec.detach()
    steered = steer_features(model, HOOK, directions, features=[2, 3], target=0.02, options=OPTIONS)
    assert [text.feature for text in steered.texts] == [3]
    with pytest.raises(ValueError, match="Every direction of the features"):
        steer_features(model, HOOK, directions, features=[2], options=OPTIONS)
    with pytest.raises(ValueError, match=r"must be a tensor of shape \(m, d\)"):
        steer_features(model, HOOK, directions[0], options=OPTIONS)


def test_saving_keeps_everything(tiny_bridge, tmp_path):
    steered = steer_latents(tiny_bridge, make_dictionary(tiny_bridge), target=0.1, features=[0], options=OPTIONS)
    content = json.loads(steered.save(tmp_path / "s.json").read_text())
    assert (
        content["unsteered"] == steered.unsteered
        and content["texts"][0]["strength"]["kl"] == steered.texts[0].strength.kl
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": [5]}, "0 to 4"),
        ({"features": []}, "one or several"),
        ({"signs": (2,)}, "1 and -1"),
        ({"signs": ()}, "1 and -1"),
        ({"target": 0}, "target"),
        ({"tolerance": 1.5}, "tolerance"),
        ({"max_strength": 0}, "max_strength"),
        ({"typical_norm": 0}, "typical_norm"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_options_out_of_range_are_refused(tiny_bridge, options, message):
    with pytest.raises(ValueError, match=message):
        steer_latents(tiny_bridge, make_dictionary(tiny_bridge), **options)


def test_a_dictionary_without_a_hook_is_refused(tiny_bridge):
    with pytest.raises(ValueError, match="names no hook"):
        steer_latents(tiny_bridge, make_dictionary(tiny_bridge, hook_name=None))


def test_the_grid_starts_low_enough(model):
    """A target met far below the first point of the grid is bracketed by zero."""
    steered = steer_latents(
        model, make_dictionary(model), target=1e-6, typical_norm=1000, features=[0], options=OPTIONS
    )
    strength = steered.texts[0].strength
    assert strength.reached and strength.coefficient < divergence_search._GRID_START * 1000
