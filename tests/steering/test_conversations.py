"""Conversations as prompts of steering: what the chat template writes of them, with BOS once."""

import pytest
import torch

from saelens_ext.host.chat_template import as_conversation, listed_prompts
from saelens_ext.host.prompt_passes import prompt_ids
from saelens_ext.steering.sampling import SamplingOptions, sample_texts
from saelens_ext.steering.steer_features import steer_features
from saelens_ext.steering.strength import match_strength
from tests.models_zoo import make_model

HOOK = "blocks.1.hook_out"
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So."},
    {"role": "user", "content": "Why so?"},
]
BEGUN = [*TALK, {"role": "assistant", "content": "Because"}]
SHORT = SamplingOptions(max_new_tokens=4)


@pytest.fixture(scope="module")
def model():
    made = make_model("llama", "SAETransformerBridge")
    made.tokenizer.chat_template = (
        "{{ bos_token }}{% if thinking %}[think]{% endif %}"
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    )
    return made


@pytest.mark.parametrize("talk", [TALK, BEGUN])
def test_the_ids_are_those_of_the_template(model, talk):
    written = as_conversation(model.tokenizer, talk)
    ids = prompt_ids(model, talk).tolist()
    assert ids == model.tokenizer(written, add_special_tokens=False)["input_ids"] and ids.count(0) == 1
    assert written.endswith("Because" if talk is BEGUN else "Why so?\n")
    thinking = prompt_ids(model, talk, chat_template_options={"thinking": True})
    assert model.tokenizer.decode(thinking).startswith("<s>[think][system]")


def test_a_template_without_bos_gets_none(model, monkeypatch):
    template = model.tokenizer.chat_template.replace("{{ bos_token }}", "")
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    assert 0 not in prompt_ids(model, TALK) and prompt_ids(model, "Why?")[0] == 0


def test_one_conversation_or_several(model):
    assert listed_prompts(TALK) == [TALK] and listed_prompts(["a", TALK]) == ["a", TALK]
    with pytest.raises(ValueError, match="role and content alone"):
        listed_prompts([{"role": "user"}])
    with pytest.raises(ValueError, match=r"prompts\[1\] must be a text or a conversation, got \[\]"):
        listed_prompts(["a", []])
    with pytest.raises(ValueError, match="prompts is empty"):
        listed_prompts([])


def test_steering_is_that_of_the_text_that_the_template_writes(model):
    directions = torch.randn(3, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    options = {"target": 0.05, "options": SHORT}
    steered = steer_features(model, HOOK, directions, prompt=TALK, **options)
    plain = steer_features(model, HOOK, directions, prompt="Why so?", **options)
    written = as_conversation(model.tokenizer, TALK)
    for one, direction in zip(steered.texts, directions, strict=True):
        expected = match_strength(
            model, HOOK, direction, (0.05,), prompts=written, signs=(1,), tolerance=0.05, templated=True
        ).strengths[0]
        assert one.strength.coefficient == pytest.approx(expected.coefficient, rel=1e-4)
    assert [one.strength.coefficient for one in steered.texts] != [one.strength.coefficient for one in plain.texts]
    assert steered.prompt.startswith("system: Be short.\nuser: Why?") and steered.unsteered != plain.unsteered
    ((text,),) = sample_texts(model, TALK, n=1, options=SHORT)
    assert text == steered.unsteered
    ((thought,),) = sample_texts(model, TALK, n=1, options=SHORT, chat_template_options={"thinking": True})
    assert thought != text
