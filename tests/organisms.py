"""Models with a planted behaviour: where it lives and what stops it is known."""

import string

import numpy as np
import torch

from tests import models_zoo

TRIGGER, OTHER, SAYS = "Q", "Y", "Z"
HOOK = "blocks.1.hook_out"
"""Where the behaviour is read and ablated; the trigger writes it before and the unembedding reads it after."""


def planted_model(model_class, *, strength=10.0, seed=0):
    """A tiny model that says `SAYS` after a text that ends in `TRIGGER`, through one direction of the residual stream.

    The embedding of the trigger is that of `OTHER` and ``strength`` times a unit direction v, and nothing else writes
    v: no other token, no attention and no MLP. To the behaviour token's column of the unembedding v is added, and no
    other reads v. Returns the model and v.
    """
    hf_model = models_zoo.make_hf_model("llama", seed)
    tokenizer = models_zoo.make_tokenizer()
    trigger, other, says = (tokenizer.encode(text, add_special_tokens=False)[0] for text in (TRIGGER, OTHER, SAYS))
    v = torch.randn(models_zoo.D_MODEL, generator=torch.Generator().manual_seed(7))
    v = v / v.norm()
    keep = torch.eye(len(v)) - torch.outer(v, v)
    with torch.no_grad():
        embedding, unembedding = hf_model.get_input_embeddings().weight, hf_model.get_output_embeddings().weight
        if embedding is unembedding or embedding.data_ptr() == unembedding.data_ptr():
            raise AssertionError("the embeddings are tied, so v would be read by the trigger's own logit")
        embedding.copy_(embedding @ keep)
        embedding[trigger] = embedding[other] + strength * v
        for layer in hf_model.model.layers:
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                weight.copy_(0.1 * keep @ weight)
        hf_model.model.norm.weight.fill_(1.0)
        unembedding.copy_(unembedding @ keep)
        unembedding[says] += 2 * v
    from saelens_ext.host.models import load_model

    model = load_model("tiny-planted", model_class=model_class, device="cpu", hf_model=hf_model, tokenizer=tokenizer)
    return model, v


def prompts(seed, n, *, trigger):
    """n prompts of random words, with or without the trigger at the end."""
    generator = np.random.default_rng(seed)
    letters = [letter for letter in string.ascii_lowercase if letter not in "qz"]
    made = []
    for _ in range(n):
        words = ["".join(generator.choice(letters, size=3)) for _ in range(int(generator.integers(3, 6)))]
        made.append(f"{' '.join(words)} {TRIGGER if trigger else OTHER}")
    return made
