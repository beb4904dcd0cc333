"""What is read and said live is what the package's own functions give, and what is wrong is refused in plain words."""

from contextlib import ExitStack

import pytest
import torch

from saelens_ext.host.chat_template import as_conversation
from saelens_ext.host.prompt_passes import logits_of, prompt_ids
from saelens_ext.serve.live import TOLERANCE, LatentChange, LiveModel
from saelens_ext.serve.served import Served
from saelens_ext.steering.divergence_search import divergence, log_probabilities
from saelens_ext.steering.interventions import add_direction, latent_directions, scale_latent
from saelens_ext.steering.sampling import SamplingOptions, sample_steered, sample_texts
from saelens_ext.steering.strength import match_strength
from tests import models_zoo
from tests.continuations._dictionaries import make
from tests.serve.conftest import HOOK, make_live

TRUTH = [{"role": "user", "content": "What is truth?"}]
TALK = [{"role": "system", "content": "Be brief."}, *TRUTH, {"role": "assistant", "content": "It is"}]
TEXT = "The assert statement raises an error.\nIt is used in tests"
OPTIONS = SamplingOptions(max_new_tokens=6, seed=3)


def last(live, changes, text=TEXT, **more):
    (*_, end) = live.steer(text, changes, OPTIONS, **more)
    assert end.done
    return end


# --- reading ---


@pytest.mark.parametrize("host", ["tiny_bridge", "tiny_hooked"])
def test_a_reading_is_what_the_dictionaries_give(host, request, tiny_texts):
    model = request.getfixturevalue(host)
    live = make_live(model, tiny_texts)
    read = live.read(TEXT)
    ids = model.to_tokens(TEXT)
    for name, one in live.dictionaries.items():
        hook = one.sae.cfg.metadata.hook_name
        _, cache = model.run_with_cache(ids, names_filter=[hook])
        codes = one.sae.encode(cache[hook][0])
        assert len(read[name]) == ids.shape[1]
        for token, code in zip(read[name], codes):
            best = code.abs().topk(6).indices
            assert [found.latent for found in token.latents] == [int(i) for i in best if code[i] != 0]
            values = torch.tensor([found.value for found in token.latents])
            assert torch.allclose(values, code[[found.latent for found in token.latents]], atol=1e-5)
        if name == "regions":
            assigned = one.sae.assign(cache[hook][0])
            assert [token.region for token in read[name]] == assigned.regions.tolist()
            novelties = torch.tensor([token.novelty for token in read[name]])
            assert torch.allclose(novelties, assigned.distances, atol=1e-5)
        else:
            assert all(token.region is token.novelty is None for token in read[name])
    assert "".join(token.text for token in read["regions"] if not token.special) == TEXT
    assert [token.special for token in read["regions"]] == [True] + [False] * (ids.shape[1] - 1)


@pytest.mark.parametrize("talk", [TRUTH, TALK])
def test_a_conversation_is_read_in_the_chat_template(live, model, talk):
    tokens = live.read(talk)["regions"]
    asked = as_conversation(model.tokenizer, talk)
    assert asked.endswith("[user] What is truth?</s>\n[assistant] " + ("It is" if talk is TALK else ""))
    assert len(tokens) == len(prompt_ids(model, asked, templated=True))
    assert "".join(token.text for token in tokens) == asked


def test_hostile_text_is_text(live):
    text = '<script>alert(1)</script>\u202ereversed\x00\x1b[31m &amp; "quoted" \U0001f600'
    assert "".join(token.text for token in live.read(text)["neurons"] if not token.special)


def test_a_dictionary_that_never_fires_shows_nothing_and_steers_nothing(model):
    silent = make("standard", HOOK)
    with torch.no_grad():
        silent.b_enc.fill_(-1e6)
        silent.W_dec[3] = 0
    live = LiveModel(model, [Served(name="silent", sae=silent)])
    assert all(token.latents == () for token in live.read(TEXT)["silent"])
    with pytest.raises(ValueError, match="Latent 3 of silent has a direction of zeros and cannot be steered"):
        live.steer(TEXT, [LatentChange(dictionary="silent", latent=3, nats=0.1)], OPTIONS)
    ablated = last(live, [LatentChange(dictionary="silent", latent=3, ablate=True)])
    assert ablated.steered == ablated.unsteered and ablated.divergence == 0


# --- steering ---


@pytest.mark.parametrize("nats", [0.3, -0.3])
def test_steering_is_that_of_the_library(live, model, nats):
    end = last(live, [LatentChange(dictionary="regions", latent=2, nats=nats)])
    hook, direction, norm = latent_directions(model, live.dictionaries["regions"].sae, 2)
    sign = 1 if nats > 0 else -1
    search = match_strength(model, hook, direction, (0.3,), prompts=TEXT, tolerance=TOLERANCE, typical_norm=norm)
    strength = search.at(sign, 0.3)
    assert strength.reached and end.strengths[0].coefficient == pytest.approx(strength.coefficient, rel=1e-5)
    offsets = torch.stack([torch.zeros_like(direction), strength.coefficient * direction / direction.norm()])
    expected = sample_steered(model, hook, offsets, TEXT, n=1, options=OPTIONS)
    assert [[[end.unsteered]], [[end.steered]]] == expected
    assert end.unsteered != end.steered
    assert end.divergence == pytest.approx(0.3, rel=TOLERANCE)


def test_several_latents_of_two_dictionaries_are_steered_and_ablated_together(live, model):
    changes = [
        LatentChange(dictionary="regions", latent=1, nats=0.4),
        LatentChange(dictionary="neurons", latent=5, nats=-0.1),
        LatentChange(dictionary="neurons", latent=live.read(TEXT)["neurons"][-1].latents[0].latent, ablate=True),
        LatentChange(dictionary="regions", latent=0),
    ]
    updates = list(live.steer(TEXT, changes, OPTIONS))
    end = updates[-1]
    assert [one is None for one in end.strengths] == [False, False, True, True]
    with ExitStack() as stack:
        stack.enter_context(scale_latent(model, live.dictionaries["neurons"].sae, changes[2].latent, 0))
        for change, strength in zip(changes[:2], end.strengths):
            hook, direction, _ = latent_directions(model, live.dictionaries[change.dictionary].sae, change.latent)
            stack.enter_context(add_direction(model, hook, direction, strength.coefficient))
        assert [[end.steered]] == sample_texts(model, TEXT, n=1, options=OPTIONS)
        steered = log_probabilities(logits_of(model, prompt_ids(model, TEXT)[None])[:, -1].detach())
    base = log_probabilities(logits_of(model, prompt_ids(model, TEXT)[None])[:, -1].detach())
    assert end.divergence == pytest.approx(float(divergence(base, steered)), rel=1e-4)
    # Token by token, from the first on.
    said = [update for update in updates if update.n_tokens]
    assert [update.n_tokens for update in said] == list(range(1, len(said) + 1))
    assert all(end.unsteered.startswith(update.unsteered) for update in said)
    assert [update.stage for update in updates[:2]] == [
        "finding the strength of region 1",
        "finding the strength of latent 5",
    ]


@pytest.mark.parametrize("talk", [TRUTH, TALK])
def test_a_conversation_is_steered_from_its_own_tokens(live, model, talk):
    end = last(live, [LatentChange(dictionary="regions", latent=2, nats=0.3)], talk)
    asked = as_conversation(model.tokenizer, talk)
    assert [[end.unsteered]] == sample_texts(model, talk, n=1, options=OPTIONS)
    ids = prompt_ids(model, asked, templated=True)[None]
    hook, direction, _ = latent_directions(model, live.dictionaries["regions"].sae, 2)
    base = log_probabilities(logits_of(model, ids)[:, -1].detach())
    with add_direction(model, hook, direction, end.strengths[0].coefficient):
        steered = log_probabilities(logits_of(model, ids)[:, -1].detach())
    # The tokenizer's own prompt starts with BOS, which the template leaves out.
    assert len(prompt_ids(model, asked)) == ids.shape[1] + 1
    assert float(divergence(base, steered)) == pytest.approx(0.3, rel=TOLERANCE)
    assert end.divergence == pytest.approx(0.3, rel=TOLERANCE)


def test_a_strength_is_searched_for_once(live, monkeypatch):
    change = LatentChange(dictionary="regions", latent=3, nats=0.2)
    first = last(live, [change])
    monkeypatch.setattr("saelens_ext.serve.live.match_strength", lambda *args, **kwargs: pytest.fail("searched again"))
    assert last(live, [change]) == first


def test_a_target_out_of_reach_says_so_and_goes_as_far_as_it_can(live):
    end = last(live, [LatentChange(dictionary="neurons", latent=4, nats=5.0)])
    if not end.strengths[0].reached:
        assert end.strengths[0].status == "saturated" and end.strengths[0].kl < 5
    assert end.divergence == pytest.approx(end.strengths[0].kl, rel=1e-3)


def test_stopping_leaves_the_model_as_it_was(live, model):
    before = model(TEXT)
    updates = live.steer(TEXT, [LatentChange(dictionary="regions", latent=2, nats=0.3)], OPTIONS)
    next(updates), next(updates)
    assert torch.is_grad_enabled()  # between tokens nothing is left switched
    updates.close()
    assert torch.equal(before, model(TEXT))
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


# --- what is refused ---


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        ([], r"The conversation must be a text or a conversation, got \[\]"),
        ([{"role": "user", "content": " "}, *TALK[1:]], "A message is empty; type or paste at least one word"),
        ([*TALK[:1], {"role": "user", "content": ""}], "The conversation ends with an empty message"),
        (TALK[:1], "The conversation ends with a system message"),
        ([{"role": "user", "content": "word " * 5000}], "25,000 characters, and at most 20,000 are taken; shorten it"),
        ([{"role": "user", "content": "word " * 300}], "The conversation has .* tokens, and at most .* are taken"),
        ([{**TRUTH[0], "tool_calls": []}], r"role and content alone \(no tools\)"),
    ],
)
def test_a_conversation_that_cannot_be_taken_is_refused(live, talk, message):
    for act in (live.read, live.steer):
        with pytest.raises(ValueError, match=message):
            act(talk)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "The text is empty; type or paste at least one word"),
        (" \n\t", "The text is empty"),
        ("a \ud800 b", "half a character"),
        ("word " * 5000, "25,000 characters, and at most 20,000 are taken; shorten it"),
        ("word " * 300, "tokens, and at most .* are taken; shorten it"),
    ],
)
def test_a_text_that_cannot_be_taken_is_refused(live, text, message):
    with pytest.raises(ValueError, match=message):
        live.read(text)
    with pytest.raises(ValueError, match=message):
        live.steer(text, [], OPTIONS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dictionary": "other"}, "There is no dictionary 'other' here; there are regions, neurons"),
        ({"latent": -1}, "Region -1 is not in regions; its regions are 0 to"),
        ({"latent": True}, "Region True is not in regions"),
        ({"latent": 10**9}, "Region 1000000000 is not in regions"),
        ({"nats": 6.0}, "at most 5 nats along or against its direction, got 6"),
        ({"nats": float("nan")}, "got nan"),
        ({"nats": float("-inf")}, "got -inf"),
    ],
)
def test_a_change_that_cannot_be_made_is_refused(live, change, message):
    with pytest.raises(ValueError, match=message):
        live.steer(TEXT, [LatentChange(**({"dictionary": "regions", "latent": 0, "nats": 0.1} | change))], OPTIONS)


def test_too_much_at_once_is_refused(live):
    change = LatentChange(dictionary="regions", latent=0, nats=0.1)
    with pytest.raises(ValueError, match="At most 8 latents are changed at once, got 9; remove some"):
        live.steer(TEXT, [change] * 9, OPTIONS)
    with pytest.raises(ValueError, match="At most 200 new tokens are sampled, got 201"):
        live.steer(TEXT, [change], SamplingOptions(max_new_tokens=201))


def test_a_dictionary_that_does_not_fit_is_refused(model, live, tiny_bridge):
    wide = make("standard", HOOK, 2 * models_zoo.D_MODEL)
    with pytest.raises(ValueError, match="The dictionary wide does not fit the model: .*width"):
        LiveModel(model, [Served(name="wide", sae=wide)])
    elsewhere = make("standard", "blocks.99.hook_resid_post")
    with pytest.raises(ValueError, match="The dictionary elsewhere does not fit the model: .*blocks.99"):
        LiveModel(model, [Served(name="elsewhere", sae=elsewhere)])
    nowhere = make("standard", HOOK)
    nowhere.cfg.metadata.hook_name = None
    with pytest.raises(ValueError, match="The dictionary nowhere names no hook"):
        Served(name="nowhere", sae=nowhere)
    regions = live.dictionaries["regions"]
    with pytest.raises(ValueError, match="The dictionary other has 24 latents, the profile"):
        Served(name="other", sae=make("standard", HOOK), profile=regions.profile)
    with pytest.raises(ValueError, match="No dictionary was given"):
        LiveModel(model, [])
    with pytest.raises(ValueError, match="Two dictionaries have one name: regions, regions"):
        LiveModel(model, [regions, regions])


def test_options_reach_the_template(live, monkeypatch):
    template = live.tokenizer.chat_template
    monkeypatch.setattr(live.tokenizer, "chat_template", "{% if quiet %}Hush. {% endif %}" + template)
    tokens = live.read(TRUTH, chat_template_options={"quiet": True})["regions"]
    assert "".join(token.text for token in tokens).startswith("Hush. [user]")
    hushed, loud = (last(live, [], TRUTH, chat_template_options={"quiet": quiet}).unsteered for quiet in (True, False))
    expected = sample_texts(live.model, TRUTH, n=1, options=OPTIONS, chat_template_options={"quiet": True})
    assert [[hushed]] == expected and hushed != loud


def test_a_conversation_needs_a_template(live, monkeypatch):
    monkeypatch.setattr(live.tokenizer, "chat_template", None)
    assert not live.has_chat_template
    with pytest.raises(ValueError, match="has no chat template"):
        live.read(TRUTH)


# --- latents ---


def test_latents_are_found_by_label_and_number(live):
    regions = live.dictionaries["regions"]
    assert regions.find("", 5) == [0, 1, 2, 3, 4] and regions.find(" 3 ", 5) == [3]
    label = regions.labels[4].text
    assert 4 in regions.find(label.upper(), 50) and regions.find("no such words anywhere", 5) == []
    assert live.dictionaries["neurons"].find("", 2) == [0, 1] and live.dictionaries["neurons"].find("word", 2) == []


def test_a_latent_is_shown_as_in_a_notebook(live, model):
    regions = live.dictionaries["regions"]
    expected = regions.profile.show(2, model.tokenizer, 8, labels=regions.labels, lens=regions.lens)
    assert repr(regions.show(2, model.tokenizer)) == repr(expected)
    assert live.dictionaries["neurons"].show(2, model.tokenizer) is None
