"""Whether a steering direction works by what the activations do anyway, or by a pathway that lies idle on real text.

A direction is cut in two: its part in the span of the principal components that hold nearly all variance of real
activations, and the rest, which real activations hardly use. If the rest has most of the effect, what was found is an
artefact: it moves the model by a way that the model does not take (the illusion of interpretability by subspace
patching, arXiv 2311.17030). Over an MLP's neurons it is also cut into the part that the output matrix passes on and the
part that it maps to zero.

Symbols
    u      the unit direction;  a  the coefficient: what is added is a u, or a times a part of u
    V      the principal directions of the activations that hold the fraction ``variance`` of their variance, (d, m)
    p, q   the active part V V^T u and the dormant part u - p;  |p|^2 + |q|^2 = 1
    D      divergence KL(base || steered) of the next-token prediction at the end of a prompt, in nats
    shift  what steering adds to the logit of a token, beyond the mean of what it adds to all logits
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saelens_ext.concepts.token_activations import read_texts
from saelens_ext.host.chat_template import Prompt, in_words, listed_prompts
from saelens_ext.host.mlp_output import output_weights
from saelens_ext.host.models import HostModel, resolve_hook
from saelens_ext.host.prompt_passes import logits_of, prompt_ids
from saelens_ext.ops.modes import evaluating, standard_modes
from saelens_ext.ops.resampling import Interval, unit_bootstrap
from saelens_ext.steering.divergence_search import divergence, log_probabilities
from saelens_ext.steering.interventions import add_direction, unit_rows

WHOLE, ACTIVE, DORMANT, WRITTEN, UNWRITTEN = "whole", "active", "dormant", "written", "unwritten"
_RANK_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True, eq=False)
class PathwayCheck:
    """A direction, its parts, and what each does to the model."""

    hook_name: str
    """Where the direction acts."""
    coefficient: float
    """a, in units of the activation."""
    variance: float
    """Fraction of the variance that the principal directions hold."""
    n_components: int
    """m."""
    n_activations: int
    """Activations that the principal directions are of."""
    shares: dict[str, float]
    """Squared norm of each part of the unit direction, in [0, 1]: "active" and "dormant" add up to 1, and so do
    "written" and "unwritten" where the direction is over an MLP's neurons.
    """
    cells: pd.DataFrame
    """One row per prompt and part ("whole" among them): ``prompt``, ``part``, ``token`` (whose logit is watched), and
    ``shift`` and ``kl`` in nats.
    """

    @property
    def dormant_effect(self) -> float:
        """Mean shift by the dormant part ÷ mean shift by the whole; near the dormant share where all is in order."""
        means = self.cells.groupby("part")["shift"].mean()
        return float(means[DORMANT] / means[WHOLE]) if means[WHOLE] != 0 else float("nan")

    @property
    def flagged(self) -> bool:
        """Whether the dormant part has more than half of the effect."""
        return self.dormant_effect > 0.5

    def verdict(self) -> str:
        """What was found, in a sentence or two."""
        share, effect = self.shares[DORMANT], self.dormant_effect
        found = (
            f"The part of the direction that real activations hardly use (outside the {self.n_components} principal "
            f"directions that hold {self.variance:.0%} of their variance) is {share:.0%} of its square and gives "
            f"{effect:.0%} of the shift over {self.cells['prompt'].nunique()} prompts."
        )
        if not self.flagged:
            return f"{found} The effect comes from what activations do on real text."
        return (
            f"{found} The direction works by a dormant pathway: that it moves the model is no evidence that the model "
            "represents anything along it."
        )

    def summary(self, *, confidence: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """One row per part: its share of the squared direction, and mean shift and divergence over prompts with their
        intervals.
        """
        rows = []
        for part, own in self.cells.groupby("part", sort=False):
            row: dict[str, object] = {"part": part, "share": self.shares.get(str(part), 1.0)}
            for metric in ("shift", "kl"):
                generator = np.random.default_rng(seed)
                found: Interval = unit_bootstrap(
                    np.mean, own[metric].to_numpy(), generator=generator, confidence=confidence
                )
                row |= {metric: found.estimate, f"{metric}_low": found.low, f"{metric}_high": found.high}
            rows.append(row | {"n_prompts": len(own)})
        return pd.DataFrame(rows)


@standard_modes(gradients=False)
def pathway_check(
    model: HostModel,
    hook_name: str,
    direction: Tensor,
    texts: Sequence[str],
    *,
    coefficient: float | int,
    prompts: Prompt | Sequence[Prompt],
    variance: float = 0.99,
    token: int | None = None,
    chat_template_options: Mapping[str, Any] | None = None,
    batch_size: int = 16,
) -> PathwayCheck:
    """Cut a steering direction into what real activations use and what they do not, and compare the effects.

    Args:
        model: any TransformerLens model.
        hook_name: any alias of the hook where the direction acts.
        direction: ``(d,)``; only its direction counts.
        texts: real texts, whose activations say which directions are in use; with more activations than d.
        coefficient: a, such as :func:`match_strength` gives; each part is added at the same a.
        prompts: one prompt or several, which the effects are averaged over; texts, or conversations as for
            :func:`sample_texts`.
        variance: fraction of the variance that counts as in use, in (0, 1).
        token: id of the token whose logit is watched; by default, for each prompt, the one whose probability the whole
            direction raises most.
        chat_template_options: passed to the chat template of conversations.
        batch_size: texts in a forward pass.

    Raises:
        ValueError: a direction that is zero, not finite or of another width, a coefficient of 0, no more activations
            than dimensions, a fraction out of range, or no such token.

    Examples:
        >>> check = sx.pathway_check(
        ...     model, "blocks.1.hook_out", partition.exemplars[0], texts, coefficient=2.0, prompts="I think that"
        ... )
        >>> round(check.shares["active"] + check.shares["dormant"], 6)
        1.0

    Source: arXiv 2311.17030, for the illusion and the split over an MLP's neurons.
    """
    if not 0 < variance < 1:
        raise ValueError(f"variance must be in (0, 1), got {variance!r}.")
    if not np.isfinite(coefficient) or coefficient == 0:
        raise ValueError(f"coefficient must be finite and not 0, got {coefficient!r}.")
    if token is not None and not 0 <= token < model.cfg.d_vocab:
        raise ValueError(f"token must be one of 0 to {model.cfg.d_vocab - 1}, got {token!r}.")
    name = resolve_hook(model, hook_name)
    x = read_texts(model, name, texts, batch_size=batch_size).activations[name].cpu().double()
    if direction.shape != x[0].shape:
        raise ValueError(
            f"direction must have shape {tuple(x[0].shape)}, as wide as the hook, got {tuple(direction.shape)}."
        )
    u = unit_rows(direction[None])[0].cpu().double()
    in_use = _principal_directions(x, variance)
    parts = {WHOLE: u, ACTIVE: in_use @ (in_use.T @ u)}
    parts[DORMANT] = u - parts[ACTIVE]
    written = _written_part(model, name, u)
    if written is not None:
        parts |= {WRITTEN: written, UNWRITTEN: u - written}
    rows = []
    for prompt in listed_prompts(prompts):
        ids = prompt_ids(model, prompt, chat_template_options=chat_template_options)[None]
        rows += [{"prompt": in_words(prompt), **row} for row in _effects(model, name, ids, parts, coefficient, token)]
    return PathwayCheck(
        hook_name=name,
        coefficient=float(coefficient),
        variance=variance,
        n_components=in_use.shape[1],
        n_activations=len(x),
        shares={part: float(vector.square().sum()) for part, vector in parts.items() if part != WHOLE},
        cells=pd.DataFrame(rows),
    )


def _principal_directions(x: Tensor, variance: float) -> Tensor:
    """Orthonormal columns ``(d, m)``, the fewest that hold the fraction of the variance of rows ``(n, d)``."""
    n, d = x.shape
    if n <= d:
        raise ValueError(
            f"The texts give {n} activations of width {d}; which directions are in use takes more activations than "
            "dimensions. Give more texts."
        )
    values, vectors = torch.linalg.eigh(torch.cov(x.T))
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    held = values.cumsum(0) / values.sum()
    return vectors[:, : int((held < variance).sum()) + 1]


def _written_part(model: HostModel, name: str, u: Tensor) -> Tensor | None:
    """The part of a direction over neurons that the output matrix does not map to zero; None at other hooks."""
    weights = output_weights(model, name)
    if weights is None:
        return None
    left, values, _ = torch.linalg.svd(weights.cpu().double(), full_matrices=False)
    left = left[:, values > _RANK_TOLERANCE * values[0]]
    return left @ (left.T @ u)


def _effects(
    model: HostModel, name: str, ids: Tensor, parts: dict[str, Tensor], coefficient: float, token: int | None
) -> list[dict[str, object]]:
    """What each part does to the prediction at the end of a prompt."""
    with evaluating(model):
        base = logits_of(model, ids)[0, -1].cpu().double()
        logits = {}
        for part, vector in parts.items():
            size = float(vector.norm())
            if size == 0:
                logits[part] = base
                continue
            with add_direction(model, name, vector, coefficient * size):
                logits[part] = logits_of(model, ids)[0, -1].cpu().double()
    log_p = {part: log_probabilities(one) for part, one in logits.items()}
    start = log_probabilities(base)
    watched = int((log_p[WHOLE].exp() - start.exp()).argmax()) if token is None else token
    rows = []
    for part, one in logits.items():
        change = one - base
        rows.append(
            {
                "part": part,
                "token": watched,
                "shift": float(change[watched] - change.mean()),
                "kl": float(divergence(start, log_p[part])),
            }
        )
    return rows
