"""What a chat template writes at the start of a conversation and behind an answer."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from saelens_ext import _checks

Messages = Sequence[Mapping[str, str]]
"""A conversation: messages with "role" ("system", "user" or "assistant") and "content". It ends with a user's message,
or with the beginning of an answer, which is gone on from."""
Prompt = str | Messages
"""A text, or a conversation."""
ROLES = ("system", "user", "assistant")

_WORD = re.compile(r"[^\W\d]\w*")
_OPENING_MARK = re.compile(r"\s*(<[^<>/\s]+>)")
_DECIDED = ("tokenize", "add_generation_prompt", "continue_final_message")
_ANSWER = "zqANSWERqz"
_ASKED, _ANSWERED = {"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}


class Asked(NamedTuple):
    """A prompt as the model gets it."""

    prompt: str
    """What is shown of it: the text, or a conversation's last question."""
    text: str
    """What is continued."""
    templated: bool
    """Whether a chat template wrote it."""
    messages: list[dict[str, str]] | None
    """The conversation, if it is one."""


def asked(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    chat_template: bool = False,
    options: Mapping[str, Any] | None = None,
    name: str = "prefix",
) -> Asked:
    """A prompt as the model gets it: a text as it is, or as a user's message; a conversation in the chat template.

    Raises:
        ValueError: neither a text nor a conversation, or a template that is missing or refuses the conversation.
    """
    if isinstance(prompt, str):
        text = _checks.text(prompt, name)
        written = as_conversation(tokenizer, [{"role": "user", "content": text}], options) if chat_template else text
        return Asked(text, written, chat_template, None)
    messages = checked_messages(prompt, name)
    shown = next((one["content"] for one in reversed(messages) if one["role"] == "user"), messages[-1]["content"])
    return Asked(shown, as_conversation(tokenizer, messages, options), True, messages)


def listed_prompts(prompts: Prompt | Sequence[Prompt], name: str = "prompts") -> list[Prompt]:
    """One prompt or several, as a list of texts and conversations; ValueError for none, or one that is neither."""
    alone = isinstance(prompts, str) or (isinstance(prompts, Sequence) and prompts and isinstance(prompts[0], Mapping))
    found: list[Prompt] = []
    for number, one in enumerate([prompts] if alone else _checks.listed(prompts, name, "prompt")):
        place = f"{name}[{number}]"
        is_talk = isinstance(one, Sequence) and not isinstance(one, str | bytes)
        found.append(checked_messages(one, place) if is_talk else _checks.text(one, place))
    return found


def different_prompts(prompts: Prompt | Sequence[Prompt], name: str = "prompts") -> list[Prompt]:
    """The same; ValueError where one is there twice."""
    found = listed_prompts(prompts, name)
    if len(set(map(in_words, found))) != len(found):
        twice = next(one for number, one in enumerate(found) if one in found[:number])
        raise ValueError(f"{name} must all be different, got {in_words(twice)!r:.300} twice.")
    return found


def in_words(prompt: Prompt) -> str:
    """A prompt as one text: a conversation as its roles and what each says."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{one['role']}: {one['content']}" for one in prompt)


def checked_messages(messages: Any, name: str) -> list[dict[str, str]]:
    """A conversation as plain dicts; ValueError for anything else."""
    remedy = 'give a text, or messages such as [{"role": "user", "content": "Why?"}]'
    found: list[dict[str, str]] = []
    for one in messages if isinstance(messages, Sequence) else ():
        if not isinstance(one, Mapping) or set(one) != {"role", "content"}:
            given = sorted(map(str, one)) if isinstance(one, Mapping) else one
            raise ValueError(
                f"{name} has the message {given!r:.200}, and a message has role and content alone (no tools): {remedy}."
            )
        role = _checks.choice(one["role"], ROLES, f"The role of a message of {name}")
        found.append({"role": role, "content": _checks.text(one["content"], f"The content of a message of {name}")})
    if not found:
        raise ValueError(f"{name} must be a text or a conversation, got {messages!r:.200}: {remedy}.")
    if found[-1]["role"] == "system":
        raise ValueError(f"{name} ends with a system message, which nobody answers; add a user's message.")
    if not found[-1]["content"].strip():
        raise ValueError(f"{name} ends with an empty message; give its text, or leave it out.")
    return found


def as_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, options: Mapping[str, Any] | None = None
) -> str:
    """A conversation up to where the answer begins, or to the end of the answer that it begins itself.

    Raises:
        ValueError: the tokenizer has no chat template, or its template refuses the conversation or has no such option.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "This model's tokenizer has no chat template, which messages need; give texts and chat_template=False, or "
            "set tokenizer.chat_template."
        )
    _check_options(tokenizer, options or {})

    def written(these: Messages, **how: bool) -> str:
        plain = [dict(one) for one in these]
        return str(tokenizer.apply_chat_template(plain, tokenize=False, **how, **(options or {})))

    begun = messages[-1]["role"] == "assistant"
    try:
        return _with_beginning(written, messages) if begun else written(messages, add_generation_prompt=True)
    except Exception as error:  # a template is a program of its author's, and may raise what it likes
        roles = ", ".join(one["role"] for one in messages)
        raise ValueError(f"The chat template refuses messages of the roles {roles}: {error}") from error


def _with_beginning(written: Callable[..., str], messages: Messages) -> str:
    """A conversation whose last message begins the answer, as it was given.

    Some templates trim it, or leave out the reasoning in it. Then it is put behind what opens an answer; where that
    opens the reasoning, too (``<think>``), this is not written twice.
    """
    beginning, made, failed = messages[-1]["content"], "", None
    try:
        made = written(messages, continue_final_message=True)
    except Exception as error:  # as above
        failed = error
    if made.endswith(beginning):
        return made
    try:
        opened, before = (written(messages[:-1], add_generation_prompt=opens) for opens in (True, False))
    except Exception as error:
        if failed is None:
            return made
        raise failed from error
    if opened == before:
        if failed is None:
            return made
        raise failed
    mark = _OPENING_MARK.match(beginning)
    if mark and opened.rstrip().endswith(mark[1]):
        opened = opened.rstrip().removesuffix(mark[1])
    return opened + beginning


def _check_options(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> None:
    """ValueError for options that the conversation decides, or that no chat template of the tokenizer mentions."""
    if not isinstance(options, Mapping):
        raise ValueError(f'chat_template_options must be like {{"enable_thinking": False}}, got {options!r}.')
    if decided := [name for name in _DECIDED if name in options]:
        raise ValueError(
            f"chat_template_options has {', '.join(decided)}, which the last message decides: behind a user's an "
            "answer begins, and an assistant's is gone on from."
        )
    template = tokenizer.chat_template
    words = set(_WORD.findall(" ".join(template.values()) if isinstance(template, dict) else str(template)))
    if unknown := [name for name in options if name not in words]:
        raise ValueError(
            f"The chat template has no option {unknown[0]!r}, so it would change nothing."
            f"{_checks.near_matches(unknown[0], words)} Leave it out of chat_template_options."
        )


def starts_with(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> bool:
    """Whether a conversation starts with these tokens; False without a template."""
    return _ids(tokenizer, _rendered(tokenizer, [_ASKED]))[: len(ids)] == list(ids)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The added token that comes next after an answer, if there is one."""
    # Where nothing closes the last answer, it ends where the next question begins.
    for messages in ([_ASKED, _ANSWERED], [_ASKED, _ANSWERED, _ASKED]):
        behind = _rendered(tokenizer, messages).rpartition(_ANSWER)[2].lstrip()
        if behind:
            return frozenset(_ids(tokenizer, behind)[:1]) & frozenset(tokenizer.added_tokens_decoder)
    return frozenset()


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    if not tokenizer.chat_template:
        return ""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # a template is a program of its author's, and may raise what it likes
        return ""


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
