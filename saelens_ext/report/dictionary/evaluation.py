"""SAELens' evaluation figures with what each of them means."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from saelens_ext.report.format import Fact, significant

_MEANINGS = {
    "kl_div_score": (
        "Behaviour kept",
        "Fraction of the KL divergence caused by zeroing the activation that the reconstruction avoids: 1 if "
        "next-token predictions are unchanged, 0 if they are as bad as with zeros.",
    ),
    "kl_div_with_sae": (
        "KL divergence, reconstructed",
        "Divergence of next-token predictions when the reconstruction stands in for the activation; nats per token, 0 "
        "is perfect.",
    ),
    "kl_div_with_ablation": (
        "KL divergence, zeroed",
        "Divergence of next-token predictions when the activation is set to zero, which the score compares with; nats "
        "per token.",
    ),
    "ce_loss_score": (
        "Loss kept",
        "Fraction of the loss added by zeroing the activation that the reconstruction avoids: 1 if the model's loss is "
        "unchanged, 0 if it is as high as with zeros.",
    ),
    "ce_loss_without_sae": (
        "Loss, model as it is",
        "Cross-entropy of the untouched model on this text; nats per token.",
    ),
    "ce_loss_with_sae": (
        "Loss, reconstructed",
        "Cross-entropy when the reconstruction stands in for the activation; nats per token.",
    ),
    "ce_loss_with_ablation": ("Loss, zeroed", "Cross-entropy with the activation set to zero; nats per token."),
    "explained_variance": (
        "Variance explained",
        "Fraction of the activations' variance about their mean that the reconstruction captures; 1 is perfect, below "
        "0 is worse than the mean.",
    ),
    "explained_variance_legacy": (
        "Variance explained, legacy",
        "An older SAELens formula that averages the fraction token by token; kept to compare with older reports.",
    ),
    "mse": (
        "Squared error",
        "Squared distance between activation and reconstruction, summed over the width and averaged over tokens.",
    ),
    "cossim": (
        "Cosine similarity",
        "Mean cosine between activation and reconstruction, neither of them centred; 1 is the same direction.",
    ),
    "l0": ("Active latents (L0)", "Mean number of latents that are not zero on a token."),
    "l1": ("Size of the code (L1)", "Mean sum of the absolute values of the latents on a token."),
    "l2_norm_in": ("Norm of activations", "Mean L2 norm of what goes in."),
    "l2_norm_out": ("Norm of reconstructions", "Mean L2 norm of what comes out."),
    "l2_ratio": ("Norm ratio", "Mean of norm out over norm in, token by token; below 1 the reconstruction shrinks."),
    "relative_reconstruction_bias": (
        "Reconstruction bias",
        "Mean squared norm of the reconstruction over its mean product with the activation: 1 is unbiased, below 1 "
        "shrinks, above 1 overshoots.",
    ),
    "total_tokens_eval_reconstruction": (
        "Tokens, behaviour and loss",
        "Tokens behind the divergence and loss figures.",
    ),
    "total_tokens_eval_sparsity_variance": (
        "Tokens, other figures",
        "Tokens behind the sparsity, norm and variance figures.",
    ),
}


def evaluation_rows(evals: Mapping[str, Any]) -> list[Fact]:
    """The figures of ``sae_lens.evals.run_evals``, nested by group as it returns them or flat, in the order given.

    Figures that this version does not know are shown under SAELens' own name; anything that is not a number is left
    out.
    """
    rows = []
    for key, value in _numbers(evals):
        name, meaning = _MEANINGS.get(key, (key.replace("_", " "), "As SAELens reports it under this name."))
        rows.append(Fact(key, name, significant(value) if math.isfinite(value) else "not defined", meaning))
    return rows


def _numbers(evals: Mapping[str, Any]) -> Iterator[tuple[str, float | int]]:
    """Every number in a nested mapping, with its innermost key."""
    for key, value in evals.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield str(key), value
