"""Text that goes on from a prompt, and its tokens: each as it is behind the prompt, not as it would be alone.

A tokenizer may put a space before a text that stands alone (SentencePiece), drop the one that it starts with, or write
the middle of a word in its own way (WordPiece's ``##``).
"""

from collections.abc import Iterator, Sequence
from itertools import chain

from transformers import PreTrainedTokenizerBase

from saelens_ext.host.bos import begins_with_bos
from saelens_ext.host.models import HostModel, tokenizer_of
from saelens_ext.host.prompt_passes import text_ids

# What a text is put behind, to be tokenised as the middle of one, when it would merge with the end of its prompt.
_ANCHORS = ("\n", ".", "z", "q", "0")
_LONGEST_TAIL = 8


def text_after(model: HostModel, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of tokens as it reads behind the prompt; special tokens among them have none."""
    return text_behind(tokenizer_of(model), prompt, tokens)


def text_behind(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The same by the tokenizer."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    said = [i for i in tokens if i not in special]
    # BOS has no place in a prompt's text. Others have, as a space may depend on whether one stands before.
    start = list(prompt[1:] if begins_with_bos(tokenizer, prompt) else prompt)
    before, whole = _decoded(tokenizer, start), _decoded(tokenizer, [*start, *said])
    return whole[len(before) :] if whole.startswith(before) else _decoded(tokenizer, said)


def text_read_as(tokenizer: PreTrainedTokenizerBase, prompt: str, ids: Sequence[int]) -> str | None:
    """A prompt as a tokenizer, with the special tokens that it adds, turns it into these ids: BOS written or left out.

    An EOS that it puts behind every text is no matter. None where it does not give these ids.
    """
    bos = str(tokenizer.bos_token or "")
    for text in dict.fromkeys((prompt, prompt.removeprefix(bos), bos + prompt)):
        made = list(tokenizer(text, verbose=False)["input_ids"]) if text else []
        if made == list(ids) or (made[:-1] == list(ids) and made[-1] == tokenizer.eos_token_id):
            return text
    return None


def ids_after(model: HostModel, prompt: str, texts: Sequence[str], *, templated: bool = False) -> list[list[int]]:
    """Tokens of texts that go on from a prompt, each with its leading space where there is one.

    The prompt keeps its own tokens. Where the tokens of prompt and text together begin with them, the rest are the
    text's. Elsewhere, where the two would merge ("cat" and "s" to "cats"), the text is cut into tokens as it is within
    other text, so that behind the prompt they read as the text.

    So tokens that a model gave come back from their text if the tokenizer cuts that text so. A text can be cut in
    other ways, which a model may sample, and special tokens and bytes that are no whole character have no text: such
    continuations are known by their token ids alone. A ``templated`` prompt has the BOS that its chat template decides.

    Raises:
        ValueError: a prompt without a token, or a model without a tokenizer.
    """
    start = text_ids(model, prompt, templated=templated).tolist()
    found = []
    for text in texts:
        ways = _ways(model, start, prompt, text, templated)
        first = next(ways)
        found.append(next((ids for ids in chain([first], ways) if text_after(model, start, ids) == text), first))
    return found


def _ways(model: HostModel, start: list[int], prompt: str, text: str, templated: bool) -> Iterator[list[int]]:
    """Ways to cut a text into tokens behind a prompt, the best first; at least one."""
    whole = text_ids(model, prompt + text, templated=templated).tolist()
    if whole[: len(start)] == start:
        yield whole[len(start) :]
    tokenizer = tokenizer_of(model)
    for anchor in ("", *_ANCHORS, *(prompt[-n:] for n in range(1, min(_LONGEST_TAIL, len(prompt)) + 1))):
        alone, both = (tokenizer(t, add_special_tokens=False, verbose=False).input_ids for t in (anchor, anchor + text))
        if both[: len(alone)] == alone:
            yield both[len(alone) :]


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    # What else a tokenizer tidies up would not be the text that the tokens are of.
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
