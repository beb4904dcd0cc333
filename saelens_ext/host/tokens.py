"""Tokens as a person reads them, and which of them are structure rather than text."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache

from sae_lens.util import get_special_token_ids
from torch import Tensor
from transformers import PreTrainedTokenizerBase

try:
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # where earlier versions have it
    from transformers.models.gpt2.tokenization_gpt2 import (
        bytes_to_unicode,  # pyright: ignore[reportAttributeAccessIssue]
    )

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_JOINERS = "\u200c\u200d"  # emoji and some scripts need them
_WORD_START = "\u2581"  # SentencePiece writes a leading space as this character


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of BOS, EOS, padding and separators, ascending; the role tokens of a chat template are not among them."""
    return sorted(get_special_token_ids(tokenizer))


def token_strings(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | Tensor) -> list[str]:
    r"""One readable string per token, of a fast or a slow tokenizer.

    A leading space is kept as a space, a line break as a line break; bytes that are not a whole character are written
    ``\xNN``. Joined, the strings are the text, save for characters that tokens share. An id outside the vocabulary
    reads ``<id 123>``.
    """
    ids = [int(i) for i in ids]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    added = {int(i): str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    read = _reader(tokenizer)
    # An added token ("<|endoftext|>") is stored as it reads; decoding it as bytes would mangle it.
    return [
        added[i] if i in added else f"<id {i}>" if piece is None else read(piece)
        for i, piece in zip(ids, pieces, strict=True)
    ]


def _reader(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """How this tokenizer's vocabulary writes text: as bytes in disguise, or as text with marked word starts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if hasattr(tokenizer, "byte_decoder") or (backend is not None and "ByteLevel" in repr(backend.decoder)):
        return _read_byte_level
    return _read_sentence_piece


def _read_byte_level(piece: str) -> str:
    alphabet = _byte_alphabet()
    if not alphabet.keys() >= set(piece):
        return piece
    return bytes(alphabet[character] for character in piece).decode("utf-8", errors="backslashreplace")


def _read_sentence_piece(piece: str) -> str:
    byte = _BYTE_PIECE.fullmatch(piece)
    if byte:
        return bytes([int(byte.group(1), 16)]).decode("utf-8", errors="backslashreplace")
    return piece.replace(_WORD_START, " ")


@cache
def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for."""
    return {character: byte for byte, character in bytes_to_unicode().items()}


def visible(text: str) -> str:
    """Text with every invisible or control character but line breaks and tabs spelt out, as ``⟨U+202E⟩``."""

    def hidden(character: str) -> bool:
        return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in "\n\t" + _JOINERS

    return "".join(f"⟨U+{ord(character):04X}⟩" if hidden(character) else character for character in text)


def bare(token: str) -> str:
    """A token without the spaces at its edges, which are signs where there is nothing else."""
    return one_line(token.strip() or token.replace(" ", "␣")) or "∅"


def one_line(text: str) -> str:
    """Text on one line, in which nothing is invisible."""
    return visible(text).replace("\n", "↵").replace("\t", "⇥").strip()


def joined_label(tokens: list[str], words: list[str]) -> str:
    """A label on one line: tokens, and after an ellipsis the words around them that say more than they."""
    said = {token.lower() for token in tokens}
    parts = [" / ".join(tokens), ", ".join(word for word in words if word not in said)]
    return one_line(" … ".join(parts) if parts[1] else parts[0])
