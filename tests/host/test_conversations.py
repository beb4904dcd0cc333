"""Prompts that are conversations: what the template writes, where the answer begins, and what is refused."""

import pytest

from saelens_ext.audit.audit import audit_continuations
from saelens_ext.continuations.sample import sample_continuations, score_continuations
from saelens_ext.continuations.steps import sample_steps
from saelens_ext.host.chat_template import asked, checked_messages, different_prompts, in_words
from tests.continuations._dictionaries import make
from tests.models_zoo import make_model, make_tokenizer

SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}
BEGUN, AGAIN = {"role": "assistant", "content": "Because"}, {"role": "user", "content": "And so?"}
TALKS = {
    "system": [SYSTEM, USER],
    "several turns": [SYSTEM, USER, BEGUN, AGAIN],
    "begun": [USER, BEGUN],
    "one": [USER],
}


@pytest.fixture(scope="module")
def model():
    return make_model("llama", "SAETransformerBridge")


@pytest.mark.parametrize("talk", TALKS.values(), ids=TALKS)
def test_what_is_continued_is_what_the_template_writes(talk, model):
    tokenizer = make_tokenizer()
    begun = talk[-1]["role"] == "assistant"
    how = {"continue_final_message": True} if begun else {"add_generation_prompt": True}
    text = tokenizer.apply_chat_template(talk, tokenize=False, **how)
    given = asked(tokenizer, talk)
    assert given.text == text and given.templated and given.messages == talk
    assert given.prompt == next(one["content"] for one in reversed(talk) if one["role"] == "user")
    assert text.endswith("Because") == begun
    found = sample_continuations(model, talk, 2, max_new_tokens=3)
    assert found.prefix == text and found.prompt == given.prompt and found.metadata["messages"] == talk
    assert list(found.prefix_ids) == tokenizer(text, add_special_tokens=False).input_ids
    scored = score_continuations(model, talk, [found.ids_of(0)])
    assert scored.prefix_ids == found.prefix_ids
    assert scored.log_probs[0].tolist() == pytest.approx(found.log_probs[0, : found.lengths[0]].tolist(), abs=1e-4)
    tree = sample_steps(model, talk, n_candidates=24, max_steps=1, delimiter="e", max_step_tokens=7, final=())
    assert tree.prompt_ids == found.prefix_ids and tree.settings["messages"] == talk


def test_one_question_is_the_text_in_the_template():
    tokenizer = make_tokenizer()
    assert asked(tokenizer, [USER]).text == asked(tokenizer, "Why?", chat_template=True).text
    assert asked(tokenizer, "Why?") == ("Why?", "Why?", False, None)


def test_options_reach_the_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if thinking %}<think>{% endif %}"
    assert asked(tokenizer, [USER], options={"thinking": True}).text == "Why?<think>"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thinkin": True}, "has no option 'thinkin', so it would change nothing. Did you mean 'thinking'"),
        ({"add_generation_prompt": False}, "has add_generation_prompt, which the last message decides"),
        ({"tokenize": True}, "has tokenize, which the last message decides"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, message):
    tokenizer = make_tokenizer()
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}{% if thinking %}<think>{% endif %}"
    for template in (plain, {"default": plain, "tool_use": "{{ tools }}"}):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=message):
            asked(tokenizer, [USER], options=options)


# What writes a message: as Gemma's template, trimmed; as those of reasoning models, without its reasoning.
TRIMMED = "m.content | trim"
UNREASONED = "m.content.split('</think>')[-1].lstrip('\\n') if m.role == 'assistant' else m.content"


@pytest.mark.parametrize(
    ("written", "opens", "beginning", "expected"),
    [
        (TRIMMED, "", "Because ", "<user>Why?\n<assistant>Because "),
        (TRIMMED, "", "Because", "<user>Why?\n<assistant>Because"),
        (UNREASONED, "", "<think>\nHm.</think>\n\nSo", "<user>Why?\n<assistant><think>\nHm.</think>\n\nSo"),
        (UNREASONED, "<think>\n", "<think>\nHm.</think>\nSo", "<user>Why?\n<assistant><think>\nHm.</think>\nSo"),
        (UNREASONED, "<think>\n", "Hm.</think>\nSo", "<user>Why?\n<assistant><think>\nHm.</think>\nSo"),
        (UNREASONED, "<think>\n", "So", "<user>Why?\n<assistant>So"),
    ],
)
def test_the_beginning_of_an_answer_is_gone_on_from_as_it_was_given(written, opens, beginning, expected):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ " + written + " }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>" + opens + "{% endif %}"
    )
    assert asked(tokenizer, [USER, {"role": "assistant", "content": beginning}]).text == expected


def test_prompts_are_told_apart():
    assert different_prompts([USER], "prefixes") == [[USER]]
    assert different_prompts("a", "prefixes") == ["a"]
    assert different_prompts([[USER], "a", [USER, BEGUN]], "prefixes") == [[USER], "a", [USER, BEGUN]]
    assert in_words([USER, BEGUN]) == "user: Why?\nassistant: Because"
    with pytest.raises(ValueError, match="prefixes must all be different, got"):
        different_prompts([[USER], [dict(USER)]], "prefixes")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "prefix must be a text or a conversation, got .*: give a text, or messages such as"),
        (5, "prefix must be a text or a conversation, got 5"),
        ([{"role": "user"}], r"has the message .*'role'.*, and a message has role and content alone \(no tools\)"),
        ([{**USER, "tool_calls": []}], "has role and content alone"),
        (["Why?"], "has the message 'Why"),
        ([{"role": "tool", "content": "4"}], "role of a message of prefix must be one of .*got 'tool'"),
        ([{"role": "user", "content": 4}], "content of a message of prefix must be a text, got 4"),
        ([SYSTEM], "ends with a system message, which nobody answers"),
        ([USER, {"role": "assistant", "content": ""}], "ends with an empty message"),
        ([USER, {"role": "assistant", "content": " \n"}], "ends with an empty message"),
    ],
)
def test_what_is_no_conversation(given, message):
    with pytest.raises(ValueError, match=message):
        checked_messages(given, "prefix")


def test_templates_that_are_missing_or_refuse():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ValueError, match="refuses messages of the roles system, user: System role not supported"):
        asked(tokenizer, [SYSTEM, USER])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template, which messages need"):
        asked(tokenizer, [USER])


@pytest.mark.slow
def test_an_audit_of_conversations_goes_on_from_its_folder(model, tmp_path):
    talks = [TALKS["several turns"], TALKS["begun"]]
    options = {"n": 8, "max_new_tokens": 3, "betas": (1.0,), "gammas": (0.5,), "n_clusters": (1, 8)}
    options |= {"n_resamples": 2, "validate": False, "folder": tmp_path, "min_cluster_size": 1}
    dictionaries = [make("standard", "blocks.1.hook_out", model.cfg.d_model, d_sae=16)]
    audit = audit_continuations(model, talks, dictionaries, **options)
    assert [one.prompt for one in audit.prefixes] == list(map(in_words, talks))
    again = audit_continuations(model, talks, dictionaries, **options)
    assert again.to_dataframe().equals(audit.to_dataframe())
    turned = audit_continuations(model, talks[::-1], dictionaries, **options)
    assert [one.prompt for one in turned.prefixes] == [one.prompt for one in audit.prefixes][::-1]
    for one, other in zip(turned.prefixes, audit.prefixes[::-1]):
        assert one.continuations.texts == other.continuations.texts and one.modes().equals(other.modes())
    page = audit.save_html(tmp_path / "page.html").read_text()
    assert all(f"<b>{one['content']}</b>" in page for talk in talks for one in talk)
