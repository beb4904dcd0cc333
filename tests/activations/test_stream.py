"""Each activation is the model's own at its token, whatever the batch, and reading leaves no trace on the model."""

import json
from itertools import islice
from unittest.mock import patch

import datasets
import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from saelens_ext.activations.stream import ActivationBatch, ActivationStream
from saelens_ext.host.models import describe_model, resolve_hook, retarget
from tests.models_zoo import (
    ARCHITECTURES,
    D_MODEL,
    MODEL_CLASSES,
    N_CTX,
    VOCABULARY,
    make_hf_model,
    make_model,
    make_tokenizer,
)

HOOK = "blocks.1.hook_resid_post"
BOS, EOS, PAD = 0, 1, 2
COLUMNS = ("token_ids", "sequence_ids", "positions", "document_ids")


@pytest.fixture
def tiny_texts(tiny_texts):
    """The shared texts without the long ones: a few hundred tokens show what thousands would."""
    return tiny_texts[:6]


@pytest.fixture(params=[(a, c) for a in ARCHITECTURES for c in MODEL_CLASSES], ids=lambda p: f"{p[0]}-{p[1]}")
def model(request, tiny_hooked, tiny_bridge, tiny_gpt2_hooked, tiny_gpt2_bridge):
    """Every tiny model in turn. They are shared: a test that leaves a trace on one breaks others."""
    models = ((tiny_hooked, tiny_bridge), (tiny_gpt2_hooked, tiny_gpt2_bridge))
    return models[ARCHITECTURES.index(request.param[0])][MODEL_CLASSES.index(request.param[1])]


@pytest.fixture(params=["tiny_hooked", "tiny_bridge"])
def llama(request):
    """Both hosts of one architecture, for what does not depend on the architecture."""
    return request.getfixturevalue(request.param)


def collect(stream, hook=None):
    """All activations of one hook, and all columns, of one pass."""
    batches = list(stream)
    hook = hook or stream.requested_hook_names[0]
    columns = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in COLUMNS}
    return torch.cat([batch.activations[hook] for batch in batches]), columns


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)


def hook_counts(model):
    return {name: (len(hook.fwd_hooks), len(hook._forward_hooks)) for name, hook in model.hook_dict.items()}


# --- the right activation at the right token -------------------------------------------------------------------------


def one_window_at_a_time(architecture, texts, layer, context_size):
    """The slow, obvious way: every window alone, unpadded, through the Hugging Face model."""
    tokenizer, hf_model, rows = make_tokenizer(), make_hf_model(architecture), []
    for text in texts:
        content = tokenizer(text, add_special_tokens=False)["input_ids"]
        for start in range(0, len(content), context_size - 1):
            ids = [BOS, *content[start : start + context_size - 1]]
            with torch.no_grad():
                states = hf_model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]
            rows += [(token, state) for token, state in zip(ids, states, strict=True) if token not in (BOS, EOS, PAD)]
    return torch.tensor([token for token, _ in rows]), torch.stack([state for _, state in rows])


@pytest.mark.parametrize("pad", ["<pad>", "<s>", "</s>"])
@pytest.mark.parametrize("model_class", MODEL_CLASSES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_activations_are_those_of_each_window_alone(architecture, model_class, pad, tiny_texts):
    """Windows of many lengths in a batch, padded with a token of its own, with BOS or with EOS: nothing shifts or
    leaks.
    """
    texts = [*tiny_texts[:5], "</s>" + tiny_texts[5]]
    tokens, expected = one_window_at_a_time(architecture, texts, layer=1, context_size=20)
    model = make_model(architecture, model_class, make_tokenizer(pad=pad))
    stream = ActivationStream(model, texts, HOOK, context_size=20, batch_size=4)
    assert any((batch.windows == -1).any() for batch in stream)  # there is padding to get wrong
    found, columns = collect(stream)
    assert torch.equal(columns["token_ids"], tokens)
    close(found, expected)


@pytest.mark.parametrize("pad", ["<pad>", "<s>"])
@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_the_tokenizers_padding_side_does_not_matter(model_class, pad, tiny_texts):
    tokenizer = make_tokenizer(pad=pad)
    tokenizer.padding_side = "left"
    found, _ = collect(
        ActivationStream(make_model("gpt2", model_class, tokenizer), tiny_texts[:5], HOOK, context_size=20)
    )
    close(found, one_window_at_a_time("gpt2", tiny_texts[:5], layer=1, context_size=20)[1])


def test_the_model_is_told_what_is_padding(llama, tiny_texts):
    """Behind causal attention the right answer could be luck; an attention that sees ahead would need the mask."""
    masks, forward = [], type(llama).forward

    def spy(*args, **kwargs):
        masks.append(kwargs["attention_mask"])
        return forward(llama, *args, **kwargs)

    with patch.object(llama, "forward", spy):
        for batch in ActivationStream(llama, tiny_texts, HOOK, context_size=20, batch_size=4):
            real = batch.windows != -1
            assert torch.equal(masks[-1], real[:, : masks[-1].shape[1]].long())
            assert not real[:, masks[-1].shape[1] :].any()
    assert "forward" not in vars(llama)


def test_the_batch_size_does_not_matter(model, tiny_texts):
    one, one_columns = collect(ActivationStream(model, tiny_texts, HOOK, context_size=16, batch_size=1))
    for batch_size in (3, 50):
        many, columns = collect(ActivationStream(model, tiny_texts, HOOK, context_size=16, batch_size=batch_size))
        assert all(torch.equal(columns[name], one_columns[name]) for name in COLUMNS)
        close(many, one)


def test_rows_know_where_they_come_from(llama, tiny_texts):
    stream = ActivationStream(llama, tiny_texts, HOOK, context_size=16, batch_size=3)
    next_sequence = 0
    for batch in stream:
        assert len(batch) == len(batch.activations[HOOK]) == len(batch.token_ids)
        assert batch.first_sequence_id == next_sequence
        assert batch.windows.shape[1] == 16 and batch.windows.shape[0] <= 3
        next_sequence += len(batch.windows)
        context = batch.context(torch.arange(len(batch)))
        assert torch.equal(context[torch.arange(len(batch)), batch.positions], batch.token_ids)
        assert (context[:, 0] == BOS).all()
        assert all(
            column.device.type == "cpu" and column.dtype == torch.int64 for column in (batch.windows, batch.positions)
        )
    _, columns = collect(stream)
    assert columns["sequence_ids"].unique().tolist() == list(range(next_sequence))
    assert columns["document_ids"].unique().tolist() == list(range(len(tiny_texts)))
    for document_id, text in enumerate(tiny_texts):
        content = llama.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert columns["token_ids"][columns["document_ids"] == document_id].tolist() == content


def test_context_takes_any_index(tiny_bridge, tiny_texts):
    batch = next(iter(ActivationStream(tiny_bridge, tiny_texts, HOOK, context_size=16)))
    rows = [5, 0, -1]
    assert torch.equal(batch.context(rows), batch.context(torch.tensor([5, 0, len(batch) - 1])))
    assert batch.context(3).shape == (1, 16)
    mask = batch.positions == 2
    assert torch.equal(batch.context(mask), batch.windows[(batch.windows[:, 2] != -1)])
    assert batch.context([]).shape == (0, 16)


def test_document_ids_count_skipped_documents(tiny_bridge, tiny_texts):
    _, columns = collect(ActivationStream(tiny_bridge, ["", tiny_texts[0], "a", tiny_texts[1]], HOOK, context_size=16))
    assert columns["document_ids"].unique().tolist() == [1, 3]
    assert columns["sequence_ids"][0] == 0


# --- hooks -----------------------------------------------------------------------------------------------------------


def test_any_spelling_reads_the_same(model, tiny_texts):
    path = "model.layers.1" if model.cfg.normalization_type == "RMS" else "transformer.h.1"
    names = [HOOK, "blocks.1.hook_out", path]
    stream = ActivationStream(model, tiny_texts, names, context_size=16)
    assert stream.requested_hook_names == tuple(names)
    assert stream.hook_names == (resolve_hook(model, HOOK),) * 3
    for batch in islice(stream, 2):
        assert list(batch.activations) == names
        assert all(torch.equal(batch.activations[name], batch.activations[HOOK]) for name in names)


def test_several_hooks_in_one_pass_equal_separate_passes(model, tiny_texts):
    names = ["blocks.0.hook_mlp_out", "hook_embed", HOOK, "blocks.1.attn.hook_z", "blocks.0.ln1.hook_normalized"]
    together = ActivationStream(model, tiny_texts, names, context_size=16, batch_size=5)
    for name in names:
        alone, _ = collect(ActivationStream(model, tiny_texts, name, context_size=16, batch_size=5))
        assert torch.equal(collect(together, name)[0], alone)


def test_heads_are_joined(model, tiny_texts):
    stream = ActivationStream(model, tiny_texts, ["blocks.1.attn.hook_z", "blocks.1.attn.hook_k"], context_size=16)
    keys = D_MODEL if model.cfg.normalization_type == "LN" else D_MODEL // 2  # the Llama groups its queries
    assert stream.d_in == {"blocks.1.attn.hook_z": D_MODEL, "blocks.1.attn.hook_k": keys}
    z, _ = collect(stream, "blocks.1.attn.hook_z")
    output, _ = collect(ActivationStream(model, tiny_texts, "blocks.1.hook_attn_out", context_size=16))
    close(z @ model.W_O[1].flatten(0, 1) + (model.b_O[1] if model.cfg.normalization_type == "LN" else 0), output)


def test_every_place_up_to_the_logits_can_be_read(model, tiny_texts):
    last = ["blocks.2.hook_resid_post", "ln_final.hook_normalized", "unembed.hook_in"]
    stream = ActivationStream(model, tiny_texts[:3], [*last, "unembed.hook_out"], context_size=16)
    found = {name: collect(stream, name)[0] for name in stream.requested_hook_names}
    assert found["unembed.hook_out"].shape[1] == VOCABULARY
    for name in last:  # apart from the logits, the pass ends earlier
        assert torch.equal(collect(ActivationStream(model, tiny_texts[:3], name, context_size=16))[0], found[name])


def test_the_pass_stops_at_the_last_hook(model, tiny_texts):
    fired = []
    later = ["blocks.2.hook_resid_pre", "blocks.2.hook_mlp_out", "ln_final.hook_normalized", "unembed.hook_out"]
    names = [resolve_hook(model, name) for name in ("blocks.1.hook_resid_post", *later)]
    with model.hooks(fwd_hooks=[(name, lambda x, hook: fired.append(hook.name)) for name in names]):
        list(ActivationStream(model, tiny_texts[:3], ["blocks.0.hook_mlp_out", "hook_embed"], context_size=16))
        assert fired == []
        list(ActivationStream(model, tiny_texts[:3], HOOK, context_size=16, batch_size=50))
        assert set(fired) <= {
            names[0],
            names[1],
        }  # a block's output is the input of the next, which then runs no further
        fired.clear()
        list(ActivationStream(model, tiny_texts[:3], "blocks.2.hook_resid_post", context_size=16))
        assert resolve_hook(model, "unembed.hook_out") not in fired
        assert resolve_hook(model, "blocks.2.hook_mlp_out") in fired


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_in_compatibility_mode_the_right_tensor_is_read(model_class, tiny_texts):
    model = make_model("gpt2", model_class)
    if model_class == "SAETransformerBridge":
        model.enable_compatibility_mode(disable_warnings=True)
    else:
        model.process_weights_()
    # Centring removes the mean over the width and nothing else.
    expected = one_window_at_a_time("gpt2", tiny_texts[:4], layer=1, context_size=20)[1]
    found, _ = collect(ActivationStream(model, tiny_texts[:4], HOOK, context_size=20))
    close(found, expected - expected.mean(dim=1, keepdim=True))


def test_activations_keep_the_models_dtype_and_carry_no_graph(tiny_texts):
    model = make_model("llama", "SAETransformerBridge")
    found, _ = collect(ActivationStream(model.to(torch.bfloat16), tiny_texts[:2], HOOK, context_size=16))
    assert found.dtype == torch.bfloat16 and not found.requires_grad
    # Not inference tensors, which no one could train on.
    assert torch.nn.Linear(D_MODEL, 1, dtype=torch.bfloat16)(found).requires_grad


# --- passes ----------------------------------------------------------------------------------------------------------


def test_passes_are_bit_identical(model, tiny_texts):
    stream = ActivationStream(model, tiny_texts, HOOK, context_size=16, batch_size=4, max_tokens=150)
    first, second = list(stream), list(stream)
    assert len(first) == len(second) > 1
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.activations[HOOK], b.activations[HOOK])
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in (*COLUMNS, "windows"))
        assert a.first_sequence_id == b.first_sequence_id


def test_two_passes_may_run_at_once(llama, tiny_texts):
    stream = ActivationStream(llama, tiny_texts, HOOK, context_size=16, batch_size=4)
    for a, b in zip(stream, stream, strict=True):
        assert torch.equal(a.activations[HOOK], b.activations[HOOK])


def test_max_tokens_is_exact(llama, tiny_texts):
    everything, columns = collect(ActivationStream(llama, tiny_texts, HOOK, context_size=16, batch_size=4))
    total = len(everything)
    first_batch = len(next(iter(ActivationStream(llama, tiny_texts, HOOK, context_size=16, batch_size=4))))
    for max_tokens in (1, first_batch, first_batch + 1, total, total + 7):
        stream = ActivationStream(llama, tiny_texts, HOOK, context_size=16, batch_size=4, max_tokens=max_tokens)
        found, found_columns = collect(stream)
        assert len(found) == min(max_tokens, total)
        assert torch.equal(found, everything[:max_tokens])
        assert all(torch.equal(found_columns[name], columns[name][:max_tokens]) for name in COLUMNS)
        assert all(len(batch) > 0 for batch in stream)


@pytest.mark.parametrize("kind", ["Dataset", "IterableDataset", "rows"])
def test_kinds_of_dataset(kind, tiny_bridge, tiny_texts):
    table = datasets.Dataset.from_dict({"text": tiny_texts})
    dataset = {"Dataset": table, "IterableDataset": table.to_iterable_dataset(), "rows": list(table)}[kind]
    found, columns = collect(ActivationStream(tiny_bridge, dataset, HOOK, context_size=16))
    expected, expected_columns = collect(ActivationStream(tiny_bridge, tiny_texts, HOOK, context_size=16))
    assert torch.equal(found, expected)
    assert all(torch.equal(columns[name], expected_columns[name]) for name in COLUMNS)


# --- which tokens ----------------------------------------------------------------------------------------------------


def test_special_tokens(llama):
    texts = ["one two</s>three four"]
    content = llama.tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    assert EOS in content

    def tokens(**options):
        return collect(ActivationStream(llama, texts, HOOK, context_size=32, **options))[1]["token_ids"].tolist()

    assert tokens() == [i for i in content if i != EOS]
    assert tokens(exclude_special_tokens=False) == [BOS, *content]
    assert tokens(exclude_special_tokens=[BOS, content[0]]) == [i for i in content if i != content[0]]
    assert tokens(exclude_special_tokens=[]) == [BOS, *content]


def test_prepend_bos(llama):
    def read(**options):
        stream = ActivationStream(llama, ["one two"], HOOK, context_size=32, exclude_special_tokens=False, **options)
        return stream.prepend_bos, collect(stream)[1]["token_ids"].tolist()

    content = llama.tokenizer("one two", add_special_tokens=False)["input_ids"]
    assert read() == read(prepend_bos=True) == (True, [BOS, *content])
    assert read(prepend_bos=False) == (False, content)


def test_prepend_bos_follows_the_model(tiny_texts):
    model = make_model("llama", "HookedSAETransformer")
    model.cfg.default_prepend_bos = False
    assert not ActivationStream(model, tiny_texts, HOOK, context_size=16).prepend_bos
    assert ActivationStream(model, tiny_texts, HOOK, context_size=16, prepend_bos=True).prepend_bos


def test_a_chat_has_one_bos(llama):
    chat = [{"messages": [{"role": "user", "content": "So?"}]}]
    batch = next(iter(ActivationStream(llama, chat, HOOK, context_size=32, exclude_special_tokens=False)))
    assert (batch.token_ids == BOS).sum() == 1 and batch.token_ids[0] == BOS


@pytest.mark.parametrize(
    ("seqpos_slice", "positions"),
    [
        ((None,), range(1, 10)),
        ((4,), range(1, 4)),
        ((2, 5), [2, 3, 4]),
        ((1, None, 3), [1, 4, 7]),
        ((-2, None), [8, 9]),
    ],
)
def test_seqpos_slice(tiny_bridge, tiny_texts, seqpos_slice, positions):
    stream = ActivationStream(tiny_bridge, tiny_texts, HOOK, context_size=10, seqpos_slice=seqpos_slice)
    assert collect(stream)[1]["positions"].unique().tolist() == list(positions)


def test_only_the_last_token_of_each_document_is_read(llama, tiny_texts):
    texts = [*tiny_texts, "It ends.</s>"]
    every = ActivationStream(llama, texts, HOOK, context_size=16, batch_size=3, exclude_special_tokens=False)
    rows, columns = collect(every)
    last = [int((columns["document_ids"] == number).nonzero()[-1]) for number in range(len(texts))]
    stream = ActivationStream(llama, texts, HOOK, context_size=16, batch_size=3, last_token_only=True)
    found, places = collect(stream)
    assert places["document_ids"].tolist() == list(range(len(texts))) and places["token_ids"][-1] == EOS
    assert all(torch.equal(places[name], columns[name][last]) for name in COLUMNS)
    close(found, rows[last])
    assert stream.describe()["last_token_only"] and not every.describe()["last_token_only"]


def test_a_shuffled_stream_is_resumed_where_it_was(llama, tiny_texts):
    stream = ActivationStream(llama, tiny_texts, HOOK, context_size=16, batch_size=3, shuffle_seed=2)
    whole = list(stream)
    assert (documents := torch.cat([b.document_ids for b in whole])).tolist() != documents.sort().values.tolist()
    rest = list(stream.batches(first_window=6, n_read=len(whole[0]) + len(whole[1])))
    assert all(torch.equal(a.token_ids, b.token_ids) for a, b in zip(whole[2:], rest, strict=True))
    assert all(torch.equal(a.activations[HOOK], b.activations[HOOK]) for a, b in zip(whole[2:], rest, strict=True))
    assert stream.describe()["shuffle_seed"] == 2


def test_batches_are_joined_to_one(llama, tiny_texts):
    stream = ActivationStream(llama, tiny_texts, HOOK, context_size=16, batch_size=3)
    batches = list(stream)[1:4]
    joined = ActivationBatch.join(batches)
    assert len(joined) == sum(map(len, batches)) and joined.first_sequence_id == 3
    assert torch.equal(joined.context(slice(None)), torch.cat([batch.context(slice(None)) for batch in batches]))
    assert torch.equal(joined.activations[HOOK], torch.cat([batch.activations[HOOK] for batch in batches]))


# --- no trace --------------------------------------------------------------------------------------------------------


class UserError(Exception):
    pass


def fail(x, hook):
    raise UserError


def test_the_users_hooks_stay(model, tiny_texts):
    name = resolve_hook(model, "blocks.0.hook_mlp_out")
    calls = []
    model.hook_dict[name].add_hook(lambda x, hook: calls.append(1))
    try:
        before = hook_counts(model)
        stream = ActivationStream(model, tiny_texts, ["blocks.0.hook_mlp_out", HOOK], context_size=16, batch_size=4)
        n_passes = len(list(stream))
        assert len(calls) == n_passes
        assert hook_counts(model) == before
        next(iter(stream))  # an iterator that is left behind
        for _ in stream:
            break
        assert hook_counts(model) == before
        with model.hooks(fwd_hooks=[(resolve_hook(model, HOOK), fail)]), pytest.raises(UserError):
            next(iter(stream))
        assert hook_counts(model) == before
        assert len(list(stream)) == n_passes  # and the model still works as it did
    finally:
        model.hook_dict[name].remove_hooks()


def test_what_the_users_hooks_change_is_what_is_read(model, tiny_texts):
    name = resolve_hook(model, "blocks.0.hook_resid_post")
    stream = ActivationStream(model, tiny_texts, ["blocks.0.hook_resid_post", HOOK], context_size=16)
    plain = next(iter(stream))
    with model.hooks(fwd_hooks=[(name, lambda x, hook: x + 1)]):
        changed = next(iter(stream))
    assert torch.equal(
        changed.activations["blocks.0.hook_resid_post"], plain.activations["blocks.0.hook_resid_post"] + 1
    )
    assert not torch.allclose(changed.activations[HOOK], plain.activations[HOOK])
    assert torch.equal(next(iter(stream)).activations[HOOK], plain.activations[HOOK])


def test_a_later_change_in_place_does_not_reach_what_was_read(llama, tiny_texts):
    stream = ActivationStream(llama, tiny_texts, ["blocks.0.hook_resid_post", HOOK], context_size=16)
    plain = next(iter(stream)).activations["blocks.0.hook_resid_post"]
    with llama.hooks(fwd_hooks=[(resolve_hook(llama, "blocks.1.hook_resid_pre"), lambda x, hook: x.zero_())]):
        assert torch.equal(next(iter(stream)).activations["blocks.0.hook_resid_post"], plain)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("ending", ["complete", "abandoned", "failed"])
def test_grad_mode_stays(llama, tiny_texts, grad, ending):
    hooks = [(resolve_hook(llama, "blocks.0.hook_mlp_out"), fail)] if ending == "failed" else []
    with torch.set_grad_enabled(grad), llama.hooks(fwd_hooks=hooks):
        try:
            for batch in ActivationStream(llama, tiny_texts, HOOK, context_size=16, batch_size=4):
                assert torch.is_grad_enabled() is grad  # in the loop's body too
                assert not batch.activations[HOOK].requires_grad
                if ending == "abandoned":
                    break
        except UserError:
            assert ending == "failed"
        assert torch.is_grad_enabled() is grad


def test_passes_keep_no_graph(llama, tiny_texts):
    """Without which every pass would hold on to all its intermediate values."""
    seen = []
    name = resolve_hook(llama, HOOK)
    with torch.enable_grad(), llama.hooks(fwd_hooks=[(name, lambda x, hook: seen.append(x.requires_grad))]):
        list(ActivationStream(llama, tiny_texts, HOOK, context_size=16))
    assert seen and not any(seen)


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_stays(training, tiny_texts):
    model = make_model("llama", "SAETransformerBridge").train(training)
    before = [module.training for module in model.modules()]
    list(ActivationStream(model, tiny_texts[:2], HOOK, context_size=16))
    assert [module.training for module in model.modules()] == before


def test_dropout_is_pointed_out(tiny_texts):
    model = make_model("gpt2", "SAETransformerBridge").train()
    with pytest.warns(UserWarning, match="call model.eval"):
        next(iter(ActivationStream(model, tiny_texts, HOOK, context_size=16)))


def test_the_models_own_passes_are_unchanged(model, tiny_texts):
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = model(tokens)
        list(ActivationStream(model, tiny_texts[:3], HOOK, context_size=16))
        assert torch.equal(model(tokens), before)


# --- attached SAEs ---------------------------------------------------------------------------------------------------


def make_sae(hook_name):
    sae = StandardSAE(StandardSAEConfig(d_in=D_MODEL, d_sae=8, metadata=SAEMetadata(hook_name=hook_name)))
    with torch.no_grad():
        sae.W_dec.normal_()
    return sae


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_attached_saes_stay_in_force(model_class, tiny_texts):
    model = make_model("llama", model_class)
    later = ActivationStream(model, tiny_texts, "blocks.2.hook_resid_post", context_size=16)
    here = ActivationStream(model, tiny_texts, HOOK, context_size=16)
    plain, plain_later = collect(here)[0], collect(later)[0]
    sae = retarget(make_sae(HOOK), model)
    model.add_sae(sae)
    assert not torch.allclose(collect(later)[0], plain_later, atol=1e-2)
    with pytest.raises(ValueError, match="An SAE is attached"):
        next(iter(here))
    with pytest.raises(ValueError, match="An SAE is attached"):
        ActivationStream(model, tiny_texts, HOOK, context_size=16)
    around = ActivationStream(model, tiny_texts, [f"{HOOK}.hook_sae_input", f"{HOOK}.hook_sae_output"], context_size=16)
    assert torch.equal(collect(around)[0], plain)
    with torch.no_grad():
        close(collect(around, f"{HOOK}.hook_sae_output")[0], sae(plain))
    assert list(model.acts_to_saes.values()) == [sae]
    model.reset_saes()
    assert torch.equal(collect(here)[0], plain) and torch.equal(collect(later)[0], plain_later)


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_a_pass_survives_an_sae_that_comes_and_goes(model_class, tiny_texts):
    """As when each batch is also run through the model with an SAE attached."""
    model = make_model("llama", model_class)
    sae = retarget(make_sae(HOOK), model)
    stream = ActivationStream(model, tiny_texts, HOOK, context_size=16, batch_size=4)
    expected = [batch.activations[HOOK] for batch in stream]
    for batch, x in zip(stream, expected, strict=True):
        assert torch.equal(batch.activations[HOOK], x)
        model.run_with_saes(batch.windows[:1].clamp(min=0), saes=[sae])


# --- description -----------------------------------------------------------------------------------------------------


def test_widths_are_known_before_any_pass(model, tiny_texts):
    stream = ActivationStream(model, ["", *tiny_texts], [HOOK, "blocks.1.mlp.hook_post"], context_size=16)
    widths = {HOOK: D_MODEL, "blocks.1.mlp.hook_post": model.cfg.d_mlp}
    assert stream.d_in == widths
    next(iter(stream))
    assert stream.d_in == widths


def test_description(llama, tiny_texts):
    stream = ActivationStream(llama, tiny_texts, HOOK, context_size=16, exclude_special_tokens=(0, 7), max_tokens=90)
    described = stream.describe()
    assert json.loads(json.dumps(described)) == described
    assert described.items() >= describe_model(llama).items()
    assert described["hook_names"] == [resolve_hook(llama, HOOK)]
    assert (described["context_size"], described["prepend_bos"], described["max_tokens"]) == (16, True, 90)
    assert described["exclude_special_tokens"] == [0, 7] and described["seqpos_slice"] == [None]
    assert described["dataset_fingerprint"]


def test_progress(tiny_bridge, tiny_texts, capsys):
    list(ActivationStream(tiny_bridge, tiny_texts, HOOK, context_size=16, max_tokens=40))
    assert capsys.readouterr() == ("", "")
    list(ActivationStream(tiny_bridge, tiny_texts, HOOK, context_size=16, max_tokens=40, progress=True))
    assert "40/40" in capsys.readouterr().err


# --- the real model --------------------------------------------------------------------------------------------------


def test_a_real_model_and_its_chat_template(smol):
    chat = [{"role": "user", "content": "Name a city."}, {"role": "assistant", "content": "Paris."}]
    texts = ["The capital of France is Paris.", smol.tokenizer.apply_chat_template(chat, tokenize=False)]
    stream = ActivationStream(smol, texts, "blocks.4.hook_resid_post", exclude_special_tokens=False, batch_size=2)
    (batch,) = list(stream)
    for document_id, text in enumerate(texts):
        tokens = smol.to_tokens(text, prepend_bos=document_id == 0)
        with torch.no_grad():
            _, cache = smol.run_with_cache(tokens, names_filter=["blocks.4.hook_out"], stop_at_layer=5)
        rows = batch.document_ids == document_id
        assert torch.equal(batch.token_ids[rows], tokens[0])
        torch.testing.assert_close(
            batch.activations["blocks.4.hook_resid_post"][rows], cache["blocks.4.hook_out"][0], rtol=1e-3, atol=1e-3
        )


# --- errors ----------------------------------------------------------------------------------------------------------


def test_settings_out_of_range(llama, tiny_texts):
    for context_size in (0, 1, N_CTX + 1):
        with pytest.raises(ValueError, match="context_size"):
            ActivationStream(llama, tiny_texts, HOOK, context_size=context_size)
    ActivationStream(llama, tiny_texts, HOOK, context_size=N_CTX)
    for setting in ("batch_size", "max_tokens"):
        with pytest.raises(ValueError, match=setting):
            ActivationStream(llama, tiny_texts, HOOK, context_size=16, **{setting: 0})
    with pytest.raises(ValueError, match="selects no position"):
        ActivationStream(llama, tiny_texts, HOOK, context_size=16, seqpos_slice=(20, 30))
    with pytest.raises(ValueError, match="hook_name is an empty list"):
        ActivationStream(llama, tiny_texts, [], context_size=16)


def test_hooks_that_cannot_be_read(llama, tiny_texts):
    with pytest.raises(ValueError, match="Did you mean 'blocks.1.hook_resid_post'"):
        ActivationStream(llama, tiny_texts, "blocks.1.hook_resid_pots", context_size=16)
    for name in ("blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"):
        with pytest.raises(ValueError, match="pair of positions"):
            ActivationStream(llama, tiny_texts, name, context_size=16)


def test_a_hook_that_does_not_fire(tiny_bridge, tiny_texts):
    with pytest.raises(ValueError, match="'blocks.1.attn.hook_hidden_states' does not fire on this "):
        next(iter(ActivationStream(tiny_bridge, tiny_texts, "blocks.1.attn.hook_hidden_states", context_size=16)))


def test_a_hook_without_one_activation_per_token(tiny_bridge, tiny_texts):
    with pytest.raises(ValueError, match="does not hold one activation per token"):
        next(iter(ActivationStream(tiny_bridge, tiny_texts, "blocks.1.attn.hook_cos", context_size=16)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite(llama, tiny_texts, value):
    def spoil(x, hook):
        x = x.clone()
        x[2, 5, 7] = value
        return x

    stream = ActivationStream(llama, ["", *tiny_texts], HOOK, context_size=40, batch_size=4)
    windows = next(iter(stream)).windows
    document = next(iter(stream)).document_ids[next(iter(stream)).sequence_ids == 2][0]
    assert windows[2, 5] != -1
    with (
        llama.hooks(fwd_hooks=[(resolve_hook(llama, HOOK), spoil)]),
        pytest.raises(ValueError, match=f"hook '{HOOK}', document {document}, position 5 holds NaN or infinity"),
    ):
        next(iter(stream))


def test_what_padding_holds_does_not_matter(llama, tiny_texts):
    def spoil(x, hook):
        return x.masked_fill(padding[..., None], float("nan"))

    stream = ActivationStream(llama, tiny_texts, HOOK, context_size=40, batch_size=4)
    batch = next(iter(stream))
    padding = (batch.windows == -1)[:, : int((batch.windows != -1).sum(1).max())]
    assert padding.any()
    with llama.hooks(fwd_hooks=[(resolve_hook(llama, HOOK), spoil)]):
        assert torch.equal(next(iter(stream)).activations[HOOK], batch.activations[HOOK])


def test_activations_of_no_width(tiny_hooked, tiny_texts):
    stream = ActivationStream(tiny_hooked, tiny_texts, "unembed.hook_out", context_size=16)
    with (
        tiny_hooked.hooks(fwd_hooks=[("unembed.hook_out", lambda x, hook: x[..., :0])]),
        pytest.raises(ValueError, match="width 0"),
    ):
        next(iter(stream))


def test_when_everything_is_left_out(llama):
    content = llama.tokenizer("one two", add_special_tokens=False)["input_ids"]
    stream = ActivationStream(llama, ["one two"], HOOK, context_size=16, exclude_special_tokens=[BOS, *content])
    with pytest.raises(ValueError, match="No activation to read"):
        list(stream)


def test_datasets_that_cannot_be_read(llama, tiny_texts):
    with pytest.raises(ValueError, match="dataset is empty"):
        ActivationStream(llama, [], HOOK, context_size=16)
    with pytest.raises(ValueError, match="No usable document"):
        list(ActivationStream(llama, ["a", ""], HOOK, context_size=16))
    with pytest.raises(ValueError, match="its columns are 'content'"):
        ActivationStream(llama, datasets.Dataset.from_dict({"content": tiny_texts}), HOOK, context_size=16)
    with pytest.raises(ValueError, match=f"token id {VOCABULARY}, outside"):
        list(ActivationStream(llama, [{"tokens": [5, VOCABULARY]}], HOOK, context_size=16))


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_a_model_without_a_tokenizer(model_class, tiny_texts):
    model = make_model("llama", model_class)
    model.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        ActivationStream(model, tiny_texts, HOOK, context_size=16)
    with pytest.raises(ValueError, match="no tokenizer"):
        list(ActivationStream(model, tiny_texts, HOOK, context_size=16, exclude_special_tokens=False))
    with pytest.raises(ValueError, match="no BOS token"):
        ActivationStream(
            model, [{"tokens": [5, 6]}], HOOK, context_size=16, exclude_special_tokens=False, prepend_bos=True
        )
    ids = [{"tokens": [5, 6, 7]}]
    found, columns = collect(ActivationStream(model, ids, HOOK, context_size=16, exclude_special_tokens=False))
    assert columns["token_ids"].tolist() == [5, 6, 7] and len(found) == 3
