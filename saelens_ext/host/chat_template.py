"""What a chat template writes at the start of a conversation and behind an answer."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

_ANSWER = "zqANSWERqz"
_ASKED, _ANSWERED = {"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}


def as_user_message(tokenizer: PreTrainedTokenizerBase, prompt: str, options: Mapping[str, Any] | None = None) -> str:
    """A prompt as a user's message, up to where the answer begins.

    Args:
        tokenizer: of the model.
        prompt: the message.
        options: passed to the template.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "This model's tokenizer has no chat template; set chat_template=False, or tokenizer.chat_template."
        )
    messages = [{"role": "user", "content": prompt}]
    made = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **(options or {}))
    return str(made)


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
