"""A continuation ends at every token that the model or its chat template ends a turn with."""

import pytest
import torch

from saelens_ext.continuations.sample import sample_continuations
from saelens_ext.host.models import load_model
from saelens_ext.host.turn_ends import end_ids
from tests.models_zoo import MODEL_CLASSES, make_hf_model, make_model, make_tokenizer

END = 300
CHAT_ML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NEXT_TURN_ENDS = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
LAST_TURN_ENDS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{{ '<|return|>' if loop.last and m['role'] == 'assistant' else '<|im_end|>' }}{% endfor %}"
)
SPACED_EOS = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {{ eos_token }}{% endfor %}"


def tokenizer_with(template, *tokens):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.chat_template = template
    return tokenizer


def hosted(model_class, generation_config=None, tokenizer=None):
    hf_model = make_hf_model("gpt2")
    if generation_config is not None:
        hf_model.generation_config.eos_token_id = generation_config
    return load_model("tiny", model_class=model_class, hf_model=hf_model, tokenizer=tokenizer or make_tokenizer())


class Says:
    """Makes the tokens of a continuation certain."""

    def __init__(self, *tokens):
        self.tokens, self.step = tokens, 0

    def __call__(self, x, hook):
        x = torch.full_like(x, -1e4)
        x[:, -1, self.tokens[self.step]] = 0
        self.step += 1
        return x


@pytest.mark.parametrize("named", [END, [1, END], [END]])
@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_every_end_of_the_generation_config_counts(model_class, named):
    model = hosted(model_class, named)
    assert end_ids(model) == {1, END}
    word = model.tokenizer(" and", add_special_tokens=False)["input_ids"][0]
    model.add_hook("unembed.hook_out", Says(word, word, END, word, word))
    found = sample_continuations(model, "So", 1, max_new_tokens=5)
    assert found.ids_of(0) == [word, word]
    assert found.metadata["sampling"]["ended_by"] == {"eos": 1}


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
@pytest.mark.parametrize(
    ("template", "tokens", "end"),
    [
        (CHAT_ML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
        (NEXT_TURN_ENDS, ("<|user|>", "<|assistant|>"), "<|user|>"),
        (LAST_TURN_ENDS, ("<|im_start|>", "<|im_end|>", "<|return|>"), "<|return|>"),
    ],
)
def test_the_mark_behind_an_answer_ends_it(model_class, template, tokens, end):
    tokenizer = tokenizer_with(template, *tokens)
    model = hosted(model_class, tokenizer=tokenizer)
    assert end_ids(model) == {1, tokenizer.convert_tokens_to_ids(end)}


@pytest.mark.parametrize(
    "template",
    [
        SPACED_EOS,
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}",
        "{{ raise_exception('no') }}",
        "{{ messages[9].content }}",
        None,
    ],
)
def test_a_template_without_a_mark_of_its_own_adds_none(template):
    assert end_ids(hosted("SAETransformerBridge", tokenizer=tokenizer_with(template))) == {1}


def test_a_model_in_a_folder_names_its_ends_there(tmp_path):
    hf_model, tokenizer = make_hf_model("gpt2"), make_tokenizer()
    hf_model.generation_config.eos_token_id = [1, END]
    hf_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = make_model("gpt2", "HookedSAETransformer")
    model.tokenizer.name_or_path, model.generation_config = str(tmp_path), None
    assert end_ids(model) == {1, END}
    assert end_ids(load_model(tmp_path, model_class="HookedSAETransformer")) == {1, END}
