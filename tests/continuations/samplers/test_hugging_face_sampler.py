"""Continuations from the generate of a Hugging Face model."""

import pytest
import torch

from saelens_ext.continuations.sample import sample_continuations, score_continuations
from saelens_ext.continuations.samplers.hugging_face_sampler import HuggingFaceSampler
from saelens_ext.continuations.samplers.sampler import Sampler
from saelens_ext.steering.sampling import SamplingOptions
from tests.models_zoo import make_hf_model, make_model, make_tokenizer

PREFIX = "The assert statement"
TALK = [{"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def bridge():
    return make_model("llama", "SAETransformerBridge")


def sampler_of(seed=0, **options):
    return HuggingFaceSampler(make_hf_model("llama", seed), make_tokenizer(), **options)


@pytest.mark.parametrize("prefix", [PREFIX, TALK])
@pytest.mark.parametrize("host", ["SAETransformerBridge", "HookedSAETransformer"])
def test_the_likeliest_tokens_are_those_of_the_model(host, prefix):
    model = make_model("llama", host)
    own, theirs = (
        sample_continuations(model, prefix, 1, temperature=0, max_new_tokens=6, max_draws=1, sampler=sampler)
        for sampler in (None, sampler_of())
    )
    assert torch.equal(own.token_ids, theirs.token_ids) and own.texts == theirs.texts
    assert torch.allclose(own.log_probs, theirs.log_probs, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "top_p": 0.7}])
def test_its_log_probabilities_are_those_before_temperature_and_top_p(bridge, options):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = sample_continuations(bridge, PREFIX, 12, max_new_tokens=5, sampler=sampler_of(), **options)
    assert torch.equal(before, torch.get_rng_state())
    about = found.metadata["sampling"]["log_prob_difference"]
    assert about["n_tokens"] == int(found.lengths.sum()) and abs(about["largest"]) < 1e-4
    again = sample_continuations(bridge, PREFIX, 12, max_new_tokens=5, sampler=sampler_of(), **options)
    other = sample_continuations(bridge, PREFIX, 12, max_new_tokens=5, sampler=sampler_of(), seed=1, **options)
    assert again.texts == found.texts != other.texts and isinstance(sampler_of(), Sampler)


def test_top_p_is_kept_and_draws_follow_the_distribution(bridge):
    found = sample_continuations(
        bridge, PREFIX, 400, top_p=0.3, max_new_tokens=1, deduplicate=False, batch_size=400, sampler=sampler_of()
    )
    with torch.no_grad():
        likely = bridge(torch.tensor([found.prefix_ids]))[0, -1].softmax(dim=-1).sort(descending=True)
    kept = int((likely.values.cumsum(0) < 0.3).sum()) + 1
    share = likely.values[:kept] / likely.values[:kept].sum()
    assert set(found.token_ids[:, 0].tolist()) <= set(likely.indices[:kept].tolist())
    seen = (found.token_ids == likely.indices[:1]).float().mean()
    assert abs(float(seen - share[0])) < 4 * float((share[0] * (1 - share[0]) / 400).sqrt())


def test_another_model_is_measured(bridge, caplog):
    found = sample_continuations(bridge, PREFIX, 6, max_new_tokens=5, sampler=sampler_of(seed=1))
    ids = [found.ids_of(row) for row in range(len(found))]
    theirs = score_continuations(make_model("llama", "SAETransformerBridge", seed=1), PREFIX, ids)
    mean = float((theirs.log_probs - found.log_probs)[found.mask].mean())
    assert found.metadata["sampling"]["log_prob_difference"]["mean"] == pytest.approx(mean, abs=1e-5)
    assert "nats per token on average" in caplog.text


def test_another_tokenizer_goes_by_texts(bridge, caplog):
    sampler = HuggingFaceSampler(make_hf_model("llama"), make_tokenizer(family="sentence_piece"))
    found = sample_continuations(bridge, PREFIX, 6, max_new_tokens=5, deduplicate=False, sampler=sampler)
    assert "are not the model's" in caplog.text
    given = score_continuations(bridge, PREFIX, list(found.texts))
    assert torch.equal(given.token_ids, found.token_ids) and torch.allclose(given.log_probs, found.log_probs, atol=1e-5)


def test_ends_and_stop_texts(bridge):
    sampler = sampler_of()
    head = sampler.model.lm_head
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    options = SamplingOptions(max_new_tokens=6, top_p=1.0, top_k=None)
    with torch.no_grad():
        head.bias[1] = 5.0  # EOS
        drawn = sampler.draw(PREFIX, [], range(12), options, [])
        assert {one.ended_by for one in drawn} == {"eos", "length"}
        for one in drawn:
            assert 1 not in one.token_ids and (len(one.token_ids) == 6) == (one.ended_by == "length")
            assert len(one.log_probs or []) == len(one.token_ids)
        head.bias[1] = 0.0
        drawn = sampler.draw(PREFIX, [], range(12), options, ["e"])
        assert {one.ended_by for one in drawn} >= {"stop"}
        assert all(("e" in one.text) == (one.ended_by == "stop") for one in drawn)


def test_what_it_is():
    about = sampler_of(generate_options={"repetition_penalty": 1.2}).describe()
    assert about["kind"] == "generate" and about["generate_options"] == {"repetition_penalty": 1.2}
    assert about["model"]["weights"] != sampler_of(seed=1).describe()["model"]["weights"]
    with pytest.raises(ValueError, match="temperature, which the arguments"):
        sampler_of(generate_options={"temperature": 2.0})
    with pytest.raises(ValueError, match="with generate, got a Linear"):
        HuggingFaceSampler(torch.nn.Linear(1, 1), make_tokenizer())
