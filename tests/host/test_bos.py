"""Texts start as they do on the host: with BOS, with nothing, or with what else the tokenizer begins with."""

import datasets
import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.load_model import HookedProxyLM
from tokenizers import processors

from saelens_ext.activations.stream import ActivationStream
from saelens_ext.analysis.profile import profile_dictionary
from saelens_ext.concepts.detector import Detector
from saelens_ext.concepts.sentence_scores import sentence_scores
from saelens_ext.continuations.attribution.attribute import attribute_continuations
from saelens_ext.continuations.sample import sample_continuations, score_continuations
from saelens_ext.dictionaries.fit_exemplars import fit_exemplar_partition
from saelens_ext.dictionaries.fit_snmf import fit_snmf
from saelens_ext.host.bos import text_start
from saelens_ext.host.models import load_model, retarget
from saelens_ext.host.prompt_passes import is_causal, is_resumable, prompt_ids
from saelens_ext.steering.interventions import latent_directions
from saelens_ext.steering.sampling import mean_log_likelihoods
from saelens_ext.steering.strength import match_strength
from tests.models_zoo import (
    CHAT_TEMPLATE,
    CHAT_TEMPLATE_WITHOUT_BOS,
    D_MODEL,
    HOSTED,
    MODEL_CLASSES,
    TOKENIZERS,
    ZOO,
    make_hf_model,
    make_model,
    make_tokenizer,
)
from tests.steering.steered import sample_steered

PROMPT = "I think that"
PROMPTS = (PROMPT, " two spaces", "line\n", "é")
HOOK = "blocks.1.hook_resid_post"
# A model whose host puts BOS in front, one of which the adapter says otherwise, and one whose tokenizer has none.
KINDS = ("llama", "pythia", "qwen2")


def host_ids(model, text):
    return model.to_tokens(text)[0].tolist()


@pytest.fixture(scope="module", params=[(name, model_class) for name in KINDS for model_class in MODEL_CLASSES])
def model(request):
    return make_model(*request.param)


# --- prompts ---


@pytest.mark.parametrize(("architecture", "model_class"), HOSTED)
def test_prompts_start_as_on_the_host(architecture, model_class):
    model = make_model(architecture, model_class)
    assert text_start(model).prepends_bos == ZOO[architecture].prepends_bos
    for prompt in PROMPTS:
        assert prompt_ids(model, prompt).tolist() == host_ids(model, prompt)


@pytest.mark.parametrize("bos", ["<s>", "</s>", None])
@pytest.mark.parametrize("family", TOKENIZERS)
@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_and_with_every_tokenizer_under_either_default(model_class, family, bos):
    model = make_model("llama", model_class, make_tokenizer(bos=bos, family=family))
    for model.cfg.default_prepend_bos in (True, False):
        for prompt in PROMPTS:
            assert prompt_ids(model, prompt).tolist() == host_ids(model, prompt)


def test_what_a_tokenizer_puts_in_front_besides_bos_is_kept():
    tokenizer = make_tokenizer(family="without_bos")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<pad>", "<s>"]})
    template = processors.TemplateProcessing(single="<pad> <s> $A", special_tokens=[("<pad>", 2), ("<s>", 0)])
    tokenizer.backend_tokenizer.post_processor = template
    model = make_model("qwen2", "SAETransformerBridge", tokenizer)
    assert prompt_ids(model, PROMPT).tolist() == host_ids(model, PROMPT)
    assert not text_start(model).prepends_bos and text_start(model).ids == (2, 0)
    stream = ActivationStream(model, [PROMPT], HOOK, context_size=32)
    assert next(iter(stream)).windows[0, :2].tolist() == [2, 0]
    assert 0 in stream.excluded_ids


def test_an_end_that_a_tokenizer_puts_behind_is_left_out():
    model = make_model("llama", "SAETransformerBridge")
    model.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert model.tokenizer(PROMPT)["input_ids"][-1] == 1
    model.cfg.tokenizer_appends_eos = True
    assert prompt_ids(model, PROMPT).tolist() == host_ids(model, PROMPT)


def test_a_prompt_that_has_bos_gets_no_second():
    model = make_model("llama", "SAETransformerBridge")
    assert prompt_ids(model, f"<s>{PROMPT}").tolist() == host_ids(model, PROMPT)
    model.cfg.default_prepend_bos = False
    assert prompt_ids(model, f"<s>{PROMPT}").tolist() == host_ids(model, f"<s>{PROMPT}")


def test_no_bos_and_no_word_is_no_prompt():
    with pytest.raises(ValueError, match="has no token, and this model has no BOS"):
        prompt_ids(make_model("qwen2", "SAETransformerBridge"), "")


# --- all who ask ---


def test_everyone_gives_the_model_the_same_prompt(model):
    expected = host_ids(model, PROMPT)
    assert is_causal(model) and is_resumable(model)  # both are tried on tokens of their own
    seen = []
    handle = model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        sampled = sample_continuations(model, PROMPT, 2, max_new_tokens=1)
        scored = score_continuations(model, PROMPT, [" and"])
        mean_log_likelihoods(model, PROMPT, [" and"])
        direction = torch.ones(model.cfg.d_model)
        match_strength(model, HOOK, direction, (0.1,), prompts=[PROMPT])
        sample_steered(model, PROMPT, HOOK, direction, 1.0, n=1, max_new_tokens=1)
    finally:
        handle.remove()
    assert sampled.prefix_ids == scored.prefix_ids == tuple(expected)
    assert len(seen) >= 5
    assert all(ids[row, : len(expected)].tolist() == expected for ids in seen for row in range(len(ids)))


def test_streams_go_by_it_too_and_both_record_it(model):
    stream = ActivationStream(model, [PROMPT], HOOK, context_size=32)
    first = next(iter(stream)).windows[0]
    assert first[first >= 0].tolist() == host_ids(model, PROMPT)
    sampled = sample_continuations(model, PROMPT, 1, max_new_tokens=2)
    expected = text_start(model).prepends_bos
    assert stream.prepend_bos == stream.describe()["prepend_bos"] == sampled.metadata["prepend_bos"] == expected


@pytest.mark.parametrize("prepend_bos", [True, False])
def test_what_a_stream_is_told_wins_and_is_recorded(model, prepend_bos):
    stream = ActivationStream(model, [PROMPT], HOOK, context_size=32, prepend_bos=prepend_bos)
    first = next(iter(stream)).windows[0]
    assert first[first >= 0].tolist() == model.to_tokens(PROMPT, prepend_bos=prepend_bos)[0].tolist()
    assert stream.describe()["prepend_bos"] == prepend_bos


@pytest.mark.parametrize("architecture", KINDS)
def test_a_proxy_reads_texts_as_a_bridge_of_its_architecture(architecture):
    hf_model, tokenizer = make_hf_model(architecture), make_tokenizer(family=ZOO[architecture].tokenizer)
    proxy = ActivationStream(HookedProxyLM(hf_model, tokenizer), [PROMPT], HOOK, context_size=32)
    bridge = make_model(architecture, "SAETransformerBridge")
    stream = ActivationStream(bridge, [PROMPT], HOOK, context_size=32)
    assert proxy.prepend_bos == stream.prepend_bos == ZOO[architecture].prepends_bos
    assert list(proxy.token_windows()) == list(stream.token_windows())


def test_bos_that_a_tokenizer_has_not_is_refused():
    model = make_model("llama", "SAETransformerBridge")
    model.tokenizer.bos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no BOS"):
        ActivationStream(model, [PROMPT], HOOK, context_size=32, prepend_bos=True)


# --- dictionaries ---


@pytest.fixture(scope="module")
def dictionary():
    """A function that gives a dictionary which records how its texts started."""
    made = StandardSAE(StandardSAEConfig(d_in=D_MODEL, d_sae=4, device="cpu"))
    made.cfg.metadata.hook_name, made.cfg.metadata.model_name = HOOK, "tiny"

    def recording(prepend_bos):
        made.cfg.metadata.hook_name, made.cfg.metadata.prepend_bos = HOOK, prepend_bos
        return made

    return recording


def uses(model, sae):
    """Every way to use a dictionary on a model's texts."""
    found = score_continuations(model, PROMPT, [" and"])
    stream = ActivationStream(model, [PROMPT], HOOK, context_size=32)
    detector = Detector.from_dictionary(sae, hook_name=HOOK)
    return {
        "retarget": lambda: retarget(sae, model),
        "profile": lambda: profile_dictionary(sae, stream, n_examples=1),
        "attribute": lambda: attribute_continuations(model, sae, found, backend="gradient"),
        "detect": lambda: sentence_scores(model, detector, [PROMPT]),
        "steer": lambda: latent_directions(model, sae, [0]),
    }


@pytest.mark.parametrize("use", ["retarget", "profile", "attribute", "detect", "steer"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_dictionary_used_under_the_other_policy_is_said(architecture, use, dictionary):
    model = make_model(architecture, "SAETransformerBridge")
    here = text_start(model).prepends_bos
    built = "without BOS" if here else "with BOS"
    with pytest.warns(UserWarning, match=f"built on texts that start {built}.*prepend_bos={not here}"):
        uses(model, dictionary(not here))[use]()
    for prepend_bos in (here, None):
        uses(model, dictionary(prepend_bos))[use]()


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_dictionaries_record_how_their_texts_started(architecture, tiny_texts):
    model = make_model(architecture, "SAETransformerBridge")
    expected = text_start(model).prepends_bos
    for prepend_bos in (None, not expected):
        stream = ActivationStream(
            model, tiny_texts, "blocks.1.mlp.hook_post", context_size=16, max_tokens=200, prepend_bos=prepend_bos
        )
        recorded = expected if prepend_bos is None else prepend_bos
        partition = fit_exemplar_partition(stream, percentile=50).dictionary
        factors = fit_snmf(stream, 3, max_iter=2).dictionary
        assert {sae.cfg.metadata.prepend_bos for sae in (partition, factors)} == {recorded}


# --- chat templates ---


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHAT_TEMPLATE_WITHOUT_BOS])
def test_a_chat_prompt_has_the_tokens_that_its_template_gives(model, template):
    model.tokenizer.chat_template = template
    found = sample_continuations(model, "Why?", 1, max_new_tokens=2, chat_template=True)
    expected = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert list(found.prefix_ids) == expected
    assert found.metadata["prepend_bos"] == (expected[0] == model.tokenizer.bos_token_id)
    assert score_continuations(model, "Why?", [" x"], chat_template=True).prefix_ids == found.prefix_ids


@pytest.mark.parametrize("iterable", [False, True])
def test_conversations_start_as_their_template_has_it(iterable):
    model = load_model(
        "tiny", hf_model=make_hf_model("llama"), tokenizer=make_tokenizer(), model_class="SAETransformerBridge"
    )
    messages = [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "Yes."}]
    rows = datasets.Dataset.from_dict({"messages": [messages]})
    rows = rows.to_iterable_dataset() if iterable else rows
    for template, prepends_bos in ((CHAT_TEMPLATE, True), (CHAT_TEMPLATE_WITHOUT_BOS, False)):
        model.tokenizer.chat_template = template
        stream = ActivationStream(model, rows, HOOK, context_size=64)
        ((_, window),) = stream.token_windows()
        assert window == model.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert stream.prepend_bos == prepends_bos
    told = ActivationStream(model, rows, HOOK, context_size=64, prepend_bos=True)
    assert next(told.token_windows())[1] == [0, *window]
    texts = ActivationStream(model, [PROMPT], HOOK, context_size=64)
    assert texts.prepend_bos, "a text is no conversation"
