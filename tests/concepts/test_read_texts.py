"""Activations of whole texts, against a pass of each text alone."""

import pytest
import torch

from saelens_ext.concepts.token_activations import read_texts
from saelens_ext.host.models import resolve_hook
from saelens_ext.host.prompt_passes import prompt_ids
from tests import models_zoo

RESIDUAL, NEURONS = "blocks.1.hook_resid_post", "blocks.2.mlp.hook_post"
TEXTS = ["The cat sat.", "Numbers: 1, 22, 333 and more.", "An end</s> in the middle.", "def f(x): return x"]
CHAT = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}[assistant] Well,{% endif %}"
)


@pytest.fixture(params=["HookedSAETransformer", "SAETransformerBridge"], scope="module")
def model(request):
    made = models_zoo.make_model("llama", request.param)
    made.tokenizer.chat_template = CHAT
    return made


def alone(model, ids, hook):
    rows = []
    with model.hooks(fwd_hooks=[(resolve_hook(model, hook), lambda x, hook: rows.append(x[0].flatten(1).detach()))]):
        model(ids[None], return_type="logits")
    return rows[0]


def expected_ids(model, text, chat):
    if not chat:
        return model.to_tokens(text)[0]
    messages = [{"role": "user", "content": text}]
    written = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return prompt_ids(model, written, templated=True)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("positions", ["content", "all", "last"])
@torch.no_grad()
def test_every_text_is_read_as_if_it_were_alone(model, positions, chat):
    read = read_texts(model, [RESIDUAL, NEURONS], TEXTS, positions=positions, chat_template=chat, batch_size=3)
    assert read.document_ids.unique().tolist() == [0, 1, 2, 3]
    for number, text in enumerate(TEXTS):
        ids, rows = expected_ids(model, text, chat), read.document_ids == number
        places = {"all": range(len(ids)), "last": [len(ids) - 1]}
        places["content"] = [i for i, token in enumerate(ids.tolist()) if token > 2]
        chosen = list(places[positions])
        assert read.token_ids[rows].tolist() == ids[chosen].tolist() and read.positions[rows].tolist() == chosen
        assert torch.equal(read.context(rows)[0][: len(ids)], ids)
        for hook in (RESIDUAL, NEURONS):
            torch.testing.assert_close(
                read.activations[hook][rows], alone(model, ids, hook)[chosen], atol=1e-5, rtol=1e-4
            )


@torch.no_grad()
def test_the_last_token_is_that_of_run_with_cache(model):
    read = read_texts(model, "hook_embed", TEXTS, positions="last")
    name = resolve_hook(model, "hook_embed")
    for number, text in enumerate(TEXTS):
        _, cache = model.run_with_cache(model.to_tokens(text), names_filter=[name])
        assert torch.equal(read.activations["hook_embed"][number], cache[name][0, -1])
    ends = [*TEXTS[:2], "It ends here.</s>"]
    assert read_texts(model, RESIDUAL, ends, positions="last").token_ids[-1] == model.tokenizer.eos_token_id


def test_a_chat_is_read_where_the_answer_follows(model):
    (last,) = model.tokenizer("[assistant] Well,", add_special_tokens=False)["input_ids"][-1:]
    read = read_texts(model, RESIDUAL, TEXTS, positions="last", chat_template=True)
    assert read.token_ids.tolist() == [last] * len(TEXTS)
    assert (read.windows == model.tokenizer.bos_token_id).sum(dim=1).tolist() == [1] * len(TEXTS)


def test_all_hooks_are_read_in_one_pass(model):
    calls = []
    with model.hooks(fwd_hooks=[(resolve_hook(model, "hook_embed"), lambda x, hook: calls.append(len(x)))]):
        read_texts(model, [RESIDUAL, NEURONS, "blocks.0.hook_resid_post"], TEXTS, batch_size=4)
    assert calls == [4]


def test_a_text_beyond_the_models_limit_is_cut_unless_its_last_token_is_read(model):
    long = "one two three four five six seven eight nine ten " * 40
    limit = model.cfg.n_ctx
    assert len(model.tokenizer(long)["input_ids"]) > limit
    read = read_texts(model, RESIDUAL, [TEXTS[0], long], positions="all")
    assert len(read.windows) > 2 and read.windows.shape[1] == limit
    with pytest.raises(ValueError, match=f"Text 1 .'one two.* limit of {limit} tokens"):
        read_texts(model, RESIDUAL, [TEXTS[0], long], positions="last")


def test_what_cannot_be_read_is_named(model):
    with pytest.raises(ValueError, match="list of at least one prompt"):
        read_texts(model, RESIDUAL, [])
    with pytest.raises(ValueError, match="1 of 2 texts .*'x'"):
        read_texts(model, RESIDUAL, [TEXTS[0], "x"], positions="last")
    with pytest.raises(ValueError, match="1 of 2 texts .*'</s><pad>'"):
        read_texts(model, RESIDUAL, [TEXTS[0], "</s><pad>"])
    model.tokenizer.chat_template, kept = None, model.tokenizer.chat_template
    try:
        with pytest.raises(ValueError, match="no chat template"):
            read_texts(model, RESIDUAL, TEXTS, chat_template=True)
    finally:
        model.tokenizer.chat_template = kept
