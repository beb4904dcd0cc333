"""A corpus of made-up words and a dictionary whose latents are known: what each is active on, and what labels it."""

import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from saelens_ext.activations.stream import ActivationBatch, ActivationStream
from saelens_ext.analysis.profile import profile_dictionary

HOOK = "blocks.0.hook_out"
WORDS = [f"{a}{b}{c}a" for a in "bdfgklmn" for b in "aeiou" for c in "prst"]
LENGTH, CONTEXT = 20, 5
TOKEN, TOPIC, SILENT, N_PLANTED = 0, 1, 2, 3
"""Latents: active on one token; on any token near a word; never."""
THE_TOKEN, THE_WORD = 7, 11


def make_tokenizer(words=WORDS):
    """One token per word, each with a space in front, as SentencePiece writes them."""
    pieces = ["<s>", *(f"\u2581{word}" for word in words)]
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


class WordStream(ActivationStream):
    """Windows of words with the given activations, after a BOS that is not read."""

    model = None

    def __init__(self, windows, x):
        self.hook_names = self.requested_hook_names = (HOOK,)
        self.windows, self.x, self.max_tokens = windows, x, x.shape[0]

    def __iter__(self):
        n, length = self.windows.shape
        rows, positions = torch.meshgrid(torch.arange(n), torch.arange(1, length), indexing="ij")
        rows, positions = rows.reshape(-1), positions.reshape(-1)
        yield ActivationBatch(
            activations={HOOK: self.x},
            token_ids=self.windows[rows, positions],
            sequence_ids=rows,
            positions=positions,
            document_ids=rows,
            windows=self.windows,
            first_sequence_id=0,
        )

    def describe(self):
        return {}


def make(n_noise=40, n_windows=400, seed=0):
    """A stream and a dictionary: three planted latents, and others active at random."""
    random = torch.Generator().manual_seed(seed)
    windows = torch.randint(1, len(WORDS) + 1, (n_windows, LENGTH + 1), generator=random)
    windows[:, 0] = 0
    tokens = windows[:, 1:]
    near = torch.nn.functional.max_pool1d((tokens == THE_WORD + 1).float()[:, None], 7, 1, 3)[:, 0] > 0
    active = torch.rand(n_windows, LENGTH, N_PLANTED + n_noise, generator=random) < 0.04
    active[..., TOKEN], active[..., TOPIC], active[..., SILENT] = tokens == THE_TOKEN + 1, near, False
    strength = 1 + torch.rand(active.shape, generator=random)
    x = torch.where(active, strength, 0.0).reshape(n_windows * LENGTH, -1)
    k = x.shape[1]
    sae = StandardSAE(StandardSAEConfig(d_in=k, d_sae=k, metadata=SAEMetadata(hook_name=HOOK)))
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.eye(k) if name.startswith("W") else torch.zeros(k))
    return WordStream(windows, x), sae


def make_profile(n_random=8, **options):
    stream, sae = make(**options)
    return profile_dictionary(sae, stream, n_examples=10, n_random=n_random, context=CONTEXT)
