"""Sentences of random words, and a model in which the letters that stand for concepts have directions of their own."""

import string

import numpy as np
import torch

from saelens_ext.evals.concepts_data import Concept
from tests import models_zoo

HOOK = "blocks.0.hook_resid_pre"
D = models_zoo.D_MODEL
N_TRIGGERS = 12
TRIGGERS, NEUTRAL = tuple(string.ascii_uppercase[:N_TRIGGERS]), "Z"


def model_with_directions():
    """A tiny model in whose embedding trigger i has 10 in coordinate i and 0 elsewhere, and the neutral letter nothing;
    all other tokens have 0 in the first `N_TRIGGERS` coordinates.
    """
    model = models_zoo.make_model("llama", "HookedSAETransformer")
    with torch.no_grad():
        model.W_E[:, :N_TRIGGERS] = 0
        for coordinate, letter in enumerate((*TRIGGERS, NEUTRAL)):
            (token,) = model.tokenizer.encode(letter, add_special_tokens=False)
            model.W_E[token] = 0
            if letter != NEUTRAL:
                model.W_E[token, coordinate] = 10
    return model


def words(generator, n=7):
    """Random words of small letters."""
    return ["".join(generator.choice(list(string.ascii_lowercase), size=3)) for _ in range(n)]


def concept(number, trigger, *, n_per_side=12, n_hard=0):
    """Sentences of random words with and without a trigger; without one (None) both sides are noise."""
    generator = np.random.default_rng(number)
    sides = []
    for side, n in enumerate((n_per_side, n_per_side, n_hard)):
        sentences = []
        for _ in range(n):
            own = words(generator)
            # As many words on either side, so that nothing but the trigger differs.
            own[int(generator.integers(1, 7))] = trigger if trigger is not None and side == 0 else NEUTRAL
            sentences.append("We " + " ".join(own) + ".")
        sides.append(tuple(sentences))
    return Concept(name=f"concept {number}", positives=sides[0], negatives=sides[1], hard_negatives=sides[2])
