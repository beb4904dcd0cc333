"""Steering at matched strength: how far to go along a direction so that the model's prediction moves by so much.

Two directions, or two methods, are comparable when their effects on the next token are of one size. That size is the
Kullback-Leibler divergence of the steered prediction from the unsteered one, D(base || steered) in nats, exact in
float64 from the logits as they are.

Symbols
    u   the unit direction
    a   coefficient, in units of the activation; x <- x + a u at every position, with a > 0 for sign +1
    t   typical norm of the activation at the hook
    D   divergence in nats; D(0) = 0, and near 0 it grows as the square of a

The search scans |a| from below on a grid of ratio 2, and solves sqrt(D / target) = 1 inside the first cell of the grid
that crosses the target, the lowest of which begins at 0. The root scale makes the function nearly linear there.
Divergence need not grow with |a| everywhere; what is found is the root of the first crossing among everything
evaluated, ``monotone`` says whether the divergence was seen to fall anywhere, and a peak narrower than a cell can be
missed.

A batch carries a coefficient in each row, for all directions, both signs and all targets at once. Only the blocks after
the hook would have to run again, but bridges and HookedTransformers have no common way to start in the middle of a
network, so whole passes are run; sharing them among targets is what saves time.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from saelens_ext import _checks
from saelens_ext.host.chat_template import Prompt, listed_prompts
from saelens_ext.host.models import HostModel
from saelens_ext.ops.modes import evaluating, standard_modes
from saelens_ext.steering.divergence_search import (
    DivergenceMeter,
    DivergenceSearch,
    MatchedStrength,
    check_limits,
    checked_signs,
)
from saelens_ext.steering.interventions import unit_rows

logger = logging.getLogger(__name__)

PAPER_TARGETS = (0.025, 0.05, 0.1, 0.15, 0.25, 0.35, 0.5)
"""Divergences, in nats, that arXiv 2506.10920 steers at."""


@dataclass(frozen=True, kw_only=True)
class StrengthSearch:
    """Matched strengths of one direction."""

    strengths: tuple[MatchedStrength, ...]
    """One per sign and target, in the order of the arguments."""
    typical_norm: float
    """t: the unit of the search limits."""
    max_coefficient: float
    """The largest |a| that was allowed, in units of the activation."""
    curves: dict[int, tuple[tuple[float, float], ...]]
    """For each sign, every (coefficient, divergence) evaluated, by ascending |a|."""

    def at(self, sign: int, target: float | int) -> MatchedStrength:
        """The strength of a sign and target; ValueError if it was not searched."""
        for strength in self.strengths:
            if strength.sign == sign and strength.target == target:
                return strength
        known = ", ".join(f"({strength.sign:+d}, {strength.target:g})" for strength in self.strengths)
        raise ValueError(f"No strength was searched for sign {sign!r} and target {target!r}; there are {known}.")

    def to_dataframe(self) -> pd.DataFrame:
        """One row per sign and target."""
        return pd.DataFrame([{**asdict(s), "reached": s.reached} for s in self.strengths])


@standard_modes()
def match_strength(
    model: HostModel,
    hook_name: str,
    direction: Tensor,
    targets: Sequence[float | int] = PAPER_TARGETS,
    *,
    prompts: Prompt | Sequence[Prompt] = "I think that",
    average_over: Literal["last", "all"] = "last",
    signs: Sequence[int] = (1, -1),
    tolerance: float = 0.01,
    max_strength: float | int = 100.0,
    typical_norm: float | int | None = None,
    templated: bool = False,
    chat_template_options: Mapping[str, Any] | None = None,
    batch_size: int = 16,
) -> StrengthSearch:
    """Find the coefficients of a direction at which steering has given effects on the next token.

    Args:
        model: any TransformerLens model. Interventions and hooks that are active count as part of the unsteered model.
        hook_name: any alias of the hook.
        direction: ``(d,)``; only its direction counts. It is added at every position of the prompt, BOS included.
        targets: divergences in nats, each above 0.
        prompts: one prompt or several, over which the divergence is averaged with equal weight; texts, or
            conversations as for :func:`sample_texts`.
        average_over: ``"last"``: the prediction at the last position of each prompt; ``"all"``: the mean over its
            positions, those of special tokens left out.
        signs: +1, -1 or both; each is searched on its own, since the effects of a and -a differ.
        tolerance: largest ``|D / target - 1|`` that counts as reached, in (0, 1).
        max_strength: the limit of |a|, in units of the typical norm. There is no lower limit.
        typical_norm: t, in units of the activation; by default the median over the prompts' tokens, special tokens
            left out. It scales the limit and the grid, and nothing else.
        templated: the texts were written by a chat template, which itself decides about BOS.
        chat_template_options: passed to the chat template of conversations.
        batch_size: coefficients per forward pass.

    Returns:
        A strength for every sign and target; those that cannot be reached are there and say so.

    Raises:
        ValueError: unknown hook, a direction that is zero, not finite or of another width, a target that is not
            positive, another argument out of range, or a model without a tokenizer.

    Examples:
        >>> search = sx.match_strength(model, "blocks.1.hook_out", partition.exemplars[0], targets=(0.05,))
        >>> strength = search.at(+1, 0.05)
        >>> strength.reached and abs(strength.kl - 0.05) < 0.005
        True

    Source: arXiv 2506.10920, causal steering, with its search replaced: the published one looks only at coefficients
    from 1 to 2000 and one sign, and leaves out targets that it does not hit.
    """
    if direction.ndim != 1 or direction.numel() == 0:
        raise ValueError(f"direction must have shape (d,), got {tuple(direction.shape)}; pass one row of a dictionary.")
    (search,) = match_strengths(
        model,
        hook_name,
        direction[None],
        targets,
        prompts=prompts,
        average_over=average_over,
        signs=signs,
        tolerance=tolerance,
        max_strength=max_strength,
        typical_norm=typical_norm,
        templated=templated,
        chat_template_options=chat_template_options,
        batch_size=batch_size,
    )
    return search


@standard_modes()
def match_strengths(
    model: HostModel,
    hook_name: str,
    directions: Tensor,
    targets: Sequence[float | int] = PAPER_TARGETS,
    *,
    prompts: Prompt | Sequence[Prompt] = "I think that",
    average_over: Literal["last", "all"] = "last",
    signs: Sequence[int] = (1, -1),
    tolerance: float = 0.01,
    max_strength: float | int = 100.0,
    typical_norm: float | int | None = None,
    templated: bool = False,
    chat_template_options: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> list[StrengthSearch]:
    """:func:`match_strength` of several directions ``(m, d)`` at one hook, searched together, many to a forward pass.

    All other arguments are those of :func:`match_strength`.

    Returns:
        One search per direction.
    """
    units = unit_rows(directions.detach())
    targets = _checked_targets(targets)
    signs = checked_signs(signs)
    _checks.choice(average_over, ("last", "all"), "average_over")
    check_limits(max(targets), tolerance, max_strength, batch_size)
    rows = torch.stack([sign * unit for unit in units for sign in signs])
    with evaluating(model), tqdm(desc="matching strengths", unit="row", disable=not progress) as bar:
        how: dict[str, Any] = {"average_over": average_over, "templated": templated, "on_rows": bar.update}
        how |= {"chat_template_options": chat_template_options}
        meter = DivergenceMeter(model, hook_name, rows, listed_prompts(prompts), batch_size, **how)
        norm = meter.typical_norm if typical_norm is None else typical_norm
        _checks.between(norm, 0, math.inf, "typical_norm")
        limit = norm * max_strength
        search = DivergenceSearch(meter.divergences, signs * len(units))
        strengths = search.run(targets, tolerance, norm=norm, limit=limit, batch_size=batch_size)
    for one in (strength for strength in strengths if not strength.reached):
        said = "Target %g nats, sign %+d: %s within |coefficient| <= %g; %g nats attained."
        logger.info(said, one.target, one.sign, one.status, limit, one.kl)
    each, n = len(signs) * len(targets), len(signs)
    return [
        StrengthSearch(
            strengths=tuple(strengths[number * each : (number + 1) * each]),
            typical_norm=float(norm),
            max_coefficient=float(limit),
            curves={
                curve.sign: tuple((curve.sign * a, kl) for a, kl in curve.points())
                for curve in search.curves[number * n : (number + 1) * n]
            },
        )
        for number in range(len(units))
    ]


def _checked_targets(targets: Sequence[float | int]) -> list[float]:
    if not targets:
        raise ValueError("targets is empty; give one or more divergences in nats, 0.1 for example.")
    return [float(_checks.between(target, 0, math.inf, "each of targets")) for target in targets]
