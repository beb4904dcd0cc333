"""Tokenizers of the families that models are published with, trained on the spot on English prose."""

from collections.abc import Callable
from functools import lru_cache
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.models_zoo.table import VOCABULARY

SPECIAL_TOKENS = ["<s>", "</s>", "<pad>"]
CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
CHAT_TEMPLATE_WITHOUT_BOS = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@lru_cache(maxsize=1)
def _byte_level() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(topics.values())[:20], trainer)
    return tokenizer.to_str()


@lru_cache(maxsize=1)
def _sentence_piece() -> str:
    """Pieces that carry their leading space, a dummy space in front of every text, bytes for what is in no piece."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces = VOCABULARY - len(SPECIAL_TOKENS) - len(_BYTES)
    trainer = trainers.BpeTrainer(vocab_size=pieces, limit_alphabet=pieces - 20, show_progress=False)
    trained.train_from_iterator(list(topics.values())[:20], trainer)
    learned = trained.get_vocab()
    ordered = SPECIAL_TOKENS + _BYTES + sorted(learned, key=learned.__getitem__)
    merges = [(a, b) for a in learned for b in learned if a + b in learned]
    merges.sort(key=lambda pair: (learned["".join(pair)], pair))
    vocabulary = {piece: i for i, piece in enumerate(ordered)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer.to_str()


_FAMILIES: dict[str, Callable[[], str]] = {
    "byte_level": _byte_level,
    "without_bos": _byte_level,
    "sentence_piece": _sentence_piece,
}
TOKENIZERS = tuple(_FAMILIES)


def make_tokenizer(pad: str = "<pad>", bos: str | None = "<s>", family: str = "byte_level") -> PreTrainedTokenizerFast:
    """A tokenizer with BOS 0, EOS 1 and padding 2.

    Args:
        pad: ``"<pad>"``, or one of the others (GPT-2, Pythia).
        bos: as ``pad``.
        family: ``"byte_level"`` (GPT-2, Llama 3), ``"without_bos"`` (Qwen: the same, but there is no BOS, and neither
            has the chat template one) or ``"sentence_piece"`` (Llama 2, Mistral: a text starts with a dummy space, and
            what is in no piece is written in bytes).
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_FAMILIES[family]()),
        bos_token=None if family == "without_bos" else bos,
        eos_token="</s>",
        pad_token=pad,
        padding_side="right",
    )
    tokenizer.chat_template = CHAT_TEMPLATE_WITHOUT_BOS if family == "without_bos" else CHAT_TEMPLATE
    return tokenizer
