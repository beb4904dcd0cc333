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

A batch carries a coefficient in each row, for both signs and all targets at once. Only the blocks behind the hook
would have to run again, but the hosts cannot start in the middle of a network in a way that is the same for both, so
whole passes are run; sharing them among targets is what saves.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from scipy.optimize import elementwise
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.host.hook_edits import edit_hook, edit_point, flat_rows, hooked
from saelens_ext.host.models import HostModel, tokenizer_of
from saelens_ext.host.prompt_passes import evaluating, logits_of, prompt_ids, prompt_list
from saelens_ext.host.tokens import special_token_ids

if TYPE_CHECKING:
    import pandas

logger = logging.getLogger(__name__)

PAPER_TARGETS = (0.025, 0.05, 0.1, 0.15, 0.25, 0.35, 0.5)
"""Divergences, in nats, that arXiv 2506.10920 steers at."""

_GRID_RATIO = 2.0
_GRID_START = 2.0**-7  # of the typical norm; a target crossed below it is bracketed by 0
_RESOLUTION = 1e-7  # relative width of a bracket that is not split any further: what float32 tells apart
_ROUNDING = 1e-4  # a relative fall in divergence below which it is taken for rounding


@dataclass(frozen=True, kw_only=True)
class MatchedStrength:
    """What was found for one sign and one target."""

    sign: int
    """+1 along the direction, -1 against it."""
    target: float
    """Divergence asked for, in nats."""
    coefficient: float
    """Signed, in units of the activation. When not reached: where the divergence came closest to the target."""
    kl: float
    """Divergence at the coefficient, in nats. When saturated: the largest attained within the limit."""
    status: Literal["reached", "saturated", "unresolved"]
    """``"saturated"``: no coefficient within the limit attains the target. ``"unresolved"``: the divergence jumps over
    the target (a model in half precision) and no coefficient comes within the tolerance."""
    monotone: bool
    """Whether the divergence fell nowhere between the coefficients evaluated for this sign, which reach up to the
    largest target or the limit. When False, larger coefficients may give the same divergence."""
    n_evaluations: int
    """Coefficients evaluated for this sign; its targets share them."""

    @property
    def reached(self) -> bool:
        """Whether the divergence is within the tolerance of the target."""
        return self.status == "reached"


@dataclass(frozen=True, kw_only=True)
class StrengthSearch:
    """Matched strengths of one direction."""

    strengths: tuple[MatchedStrength, ...]
    """One per sign and target, in the order they were asked for."""
    typical_norm: float
    """t: the unit of the search limits."""
    max_coefficient: float
    """The largest |a| that was allowed, in units of the activation."""
    curves: dict[int, tuple[tuple[float, float], ...]]
    """For each sign, every (coefficient, divergence) evaluated, by ascending |a|."""

    def at(self, sign: int, target: float | int) -> MatchedStrength:
        """The strength of a sign and target.

        Raises:
            ValueError: it was not asked for.
        """
        for strength in self.strengths:
            if strength.sign == sign and strength.target == target:
                return strength
        known = ", ".join(f"({strength.sign:+d}, {strength.target:g})" for strength in self.strengths)
        raise ValueError(f"No strength was searched for sign {sign!r} and target {target!r}; there are {known}.")

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per sign and target."""
        import pandas

        return pandas.DataFrame([{**asdict(s), "reached": s.reached} for s in self.strengths])


def match_strength(
    model: HostModel,
    hook_name: str,
    direction: Tensor,
    targets: Sequence[float | int] = PAPER_TARGETS,
    *,
    prompts: str | Sequence[str] = "I think that",
    average_over: Literal["last", "all"] = "last",
    signs: Sequence[int] = (1, -1),
    tolerance: float = 0.01,
    max_strength: float | int = 100.0,
    typical_norm: float | int | None = None,
    batch_size: int = 16,
) -> StrengthSearch:
    """Find the coefficients of a direction at which steering has given effects on the next token.

    Args:
        model: either host class. Interventions and hooks that are active count as part of the unsteered model.
        hook_name: any alias of the hook.
        direction: ``(d,)``; only its direction counts. It is added at every position of the prompt, BOS included.
        targets: divergences in nats, each above 0.
        prompts: one prompt or several, over which the divergence is averaged with equal weight.
        average_over: ``"last"``: the prediction at the last position of each prompt; ``"all"``: the mean over its
            positions, those of special tokens left out.
        signs: +1, -1 or both; each is searched on its own, since the effects of a and -a differ.
        tolerance: largest ``|D / target - 1|`` that counts as reached, in (0, 1).
        max_strength: the limit of |a|, in units of the typical norm. There is no lower limit.
        typical_norm: t, in units of the activation; by default the median over the prompts' tokens, special tokens
            left out. It scales the limit and the grid, and nothing else.
        batch_size: coefficients per forward pass.

    Returns:
        A strength for every sign and target; those that cannot be reached are there and say so.

    Raises:
        ValueError: unknown hook, a direction that is zero, not finite or of another width, a target that is not
            positive, another argument out of range, or a model without a tokenizer.

    Source: arXiv 2506.10920, causal steering, with its search replaced: the published one looks only at coefficients
    from 1 to 2000 and one sign, and leaves out targets that it does not hit.
    """
    unit = _unit(direction)
    targets = _checked_targets(targets)
    signs = _checked_signs(signs)
    _checks.choice(average_over, ("last", "all"), "average_over")
    _checks.between(tolerance, 0, 1, "tolerance")
    _checks.between(max_strength, 0, math.inf, "max_strength")
    _checks.positive(batch_size, "batch_size")
    with evaluating(model):
        meter = _DivergenceMeter(model, hook_name, unit, prompt_list(prompts), average_over, batch_size)
        norm = meter.typical_norm if typical_norm is None else typical_norm
        _checks.between(norm, 0, math.inf, "typical_norm")
        curves = {sign: _Curve(sign) for sign in signs}
        known = _SharedEvaluations(meter.divergences, curves)
        limit = norm * max_strength
        _scan(known, norm, limit, max(targets), batch_size)
        _solve(known, targets, tolerance)
    found = tuple(curves[sign].strength(target, tolerance) for sign in signs for target in targets)
    _log_unreached(found, limit)
    evaluated = {sign: tuple((sign * a, kl) for a, kl in curve.points()) for sign, curve in curves.items()}
    return StrengthSearch(strengths=found, typical_norm=float(norm), max_coefficient=float(limit), curves=evaluated)


# --- the search, on numbers alone ---


class _Curve:
    """Divergence as a function of |a| for one sign, as far as it was evaluated."""

    def __init__(self, sign: int):
        self.sign = sign
        self.known: dict[float, float] = {0.0: 0.0}

    def points(self) -> list[tuple[float, float]]:
        """Every finite (|a|, D), by ascending |a|."""
        return sorted((a, kl) for a, kl in self.known.items() if math.isfinite(kl))

    def bracket(self, target: float) -> tuple[float, float] | None:
        """The first two neighbours between which the divergence crosses the target; None when it never does."""
        points = self.points()
        for (low, _), (high, kl) in zip(points, points[1:]):
            if kl >= target:
                return low, high
        return None

    def strength(self, target: float, tolerance: float) -> MatchedStrength:
        """The state of the first crossing, of the lower edge of the tolerance, as far as it is known."""
        points = self.points()
        bracket = self.bracket(target * (1 - tolerance))
        status: Literal["reached", "saturated", "unresolved"] = "saturated"
        a, kl = max(points, key=lambda point: point[1])
        if bracket is not None:
            ends = [point for point in points if point[0] in bracket]
            a, kl = min(ends, key=lambda point: abs(point[1] - target))
            status = "reached" if abs(kl / target - 1) <= tolerance else "unresolved"
        rises = all(high >= low * (1 - _ROUNDING) for (_, low), (_, high) in zip(points, points[1:]))
        return MatchedStrength(
            sign=self.sign, target=target, coefficient=self.sign * a, kl=kl, status=status, monotone=rises,
            n_evaluations=len(self.known) - 1,
        )


class _SharedEvaluations:
    """Curves of one or both signs, and the one call that evaluates what is not known yet."""

    def __init__(self, divergences: Callable[[Sequence[float]], list[float]], curves: dict[int, _Curve]):
        self._divergences = divergences
        self.curves = curves

    @property
    def n_evaluations(self) -> int:
        """Coefficients evaluated so far, over all signs."""
        return sum(len(curve.known) - 1 for curve in self.curves.values())

    def evaluate(self, wanted: Sequence[tuple[int, float]]) -> list[float]:
        """Divergences at (sign, |a|), new ones in as few passes as they fit."""
        new = [(sign, a) for sign, a in dict.fromkeys(wanted) if a not in self.curves[sign].known]
        for (sign, a), kl in zip(new, self._divergences([sign * a for sign, a in new]), strict=True):
            self.curves[sign].known[a] = kl
        return [self.curves[sign].known[a] for sign, a in wanted]


def _scan(known: _SharedEvaluations, norm: float, limit: float, target: float, batch_size: int) -> None:
    """Evaluate a geometric grid of |a| upwards until each sign crosses the largest target or meets the limit."""
    steps = math.ceil(math.log(max(limit / (norm * _GRID_START), 1), _GRID_RATIO))
    grid = [*(norm * _GRID_START * _GRID_RATIO**step for step in range(steps)), limit]
    grid = [a for a in grid if a < limit] + [limit]
    open_signs = list(known.curves)
    begin = 0
    while begin < len(grid) and open_signs:
        step = max(1, batch_size // len(open_signs))
        known.evaluate([(sign, a) for sign in open_signs for a in grid[begin : begin + step]])
        begin += step
        # A pass that overflows ends the scan: beyond it lies nothing that a model could be steered with.
        open_signs = [s for s in open_signs if not any(kl >= target or math.isnan(kl) for kl in known.curves[s].known.values())]


def _solve(known: _SharedEvaluations, targets: Sequence[float], tolerance: float) -> None:
    """Evaluate coefficients until every target that is bracketed is met, for all signs and targets at once."""

    def residual(a: Any, sign: Any, target: Any) -> Any:
        divergences = known.evaluate([(int(s), float(x)) for s, x in zip(sign, a, strict=True)])
        # A divergence that is not finite lies beyond every target.
        return np.sqrt(np.nan_to_num(divergences, nan=1e300, posinf=1e300) / target) - 1

    # |D / target - 1| <= tolerance on the scale of the root, where the upper side is the narrower one; a little less,
    # so that rounding cannot make the two disagree.
    tolerances = {"fatol": 0.99 * (math.sqrt(1 + tolerance) - 1), "frtol": 0.0, "xrtol": _RESOLUTION / 2}
    n_known = -1
    # Every round learns something or is the last.
    while n_known < (n_known := known.n_evaluations):
        # One target's evaluations can uncover an earlier crossing of another, which is then searched in turn.
        open_brackets = {
            (sign, target): bracket
            for sign, curve in known.curves.items()
            for target in targets
            if (bracket := _open_bracket(curve, target, tolerance)) is not None
        }
        if not open_brackets:
            return
        low, high = np.array(list(open_brackets.values())).T
        sign, target = np.array(list(open_brackets)).T
        elementwise.find_root(residual, (low, high), args=(sign, target), tolerances=tolerances)


def _open_bracket(curve: _Curve, target: float, tolerance: float) -> tuple[float, float] | None:
    """Where to look for a target; None when it is met, cannot be, or its bracket is too narrow to split."""
    bracket = curve.bracket(target)
    if bracket is None or curve.strength(target, tolerance).reached or bracket[1] - bracket[0] <= _RESOLUTION * bracket[1]:
        return None
    return bracket


def _log_unreached(found: Sequence[MatchedStrength], limit: float) -> None:
    for strength in found:
        if not strength.reached:
            logger.info(
                "Target %g nats, sign %+d: %s within |coefficient| <= %g; %g nats attained.",
                strength.target, strength.sign, strength.status, limit, strength.kl,
            )


# --- the model ---


class _DivergenceMeter:
    """D(base || steered) of a model on prompts, as a function of the coefficient.

    Prompts run one at a time and without padding; the rows of a batch are one prompt with different coefficients.
    """

    def __init__(
        self, model: HostModel, hook_name: str, unit: Tensor, prompts: list[str], average_over: str, batch_size: int
    ):
        self._model = model
        self._hook_name = hook_name
        self._point = edit_point(model, hook_name)
        self._unit = unit
        self._batch_size = batch_size
        self._ids = [prompt_ids(model, prompt) for prompt in prompts]
        special = torch.tensor(special_token_ids(tokenizer_of(model)))
        content = [self._content(ids.cpu(), special) for ids in self._ids]
        self._positions = [[len(ids) - 1] for ids in self._ids] if average_over == "last" else content
        self._norms: list[Tensor] = []
        self._base = [self._base_pass(*args) for args in zip(self._ids, content, self._positions, strict=True)]

    @property
    def typical_norm(self) -> float:
        """Median norm of the unsteered activations at the prompts' tokens."""
        return float(torch.cat(self._norms).median())

    def divergences(self, coefficients: Sequence[float]) -> list[float]:
        """Mean divergence over prompts at each coefficient, in nats."""
        found: list[float] = []
        for begin in range(0, len(coefficients), self._batch_size):
            part = torch.tensor(coefficients[begin : begin + self._batch_size], dtype=torch.float64)
            each = [self._steered_pass(part, *prompt) for prompt in zip(self._ids, self._positions, self._base, strict=True)]
            found += torch.stack(each).mean(dim=0).tolist()
        return found

    @staticmethod
    def _content(ids: Tensor, special: Tensor) -> list[int]:
        """Positions of tokens that are text; all where there is none."""
        return (~torch.isin(ids, special)).nonzero()[:, 0].tolist() or list(range(len(ids)))

    def _base_pass(self, ids: Tensor, content: list[int], positions: list[int]) -> Tensor:
        """Unsteered log-probabilities ``(positions, d_vocab)``; notes the norms of the activations."""

        def note(x: Tensor, hook: Any = None) -> None:
            self._norms.append(flat_rows(x, len(self._unit), self._hook_name)[0, content].float().norm(dim=-1).cpu())

        with hooked(self._model, [(self._point, note)]):
            return _log_probabilities(logits_of(self._model, ids[None])[0, positions])

    def _steered_pass(self, coefficients: Tensor, ids: Tensor, positions: list[int], base: Tensor) -> Tensor:
        """Divergences ``(b,)`` of one prompt at coefficients ``(b,)``."""

        def add(x: Tensor) -> Tensor:
            if len(x) != len(coefficients):
                raise ValueError(f"All rows of a batch share one activation at {self._hook_name}: pass batch_size=1.")
            return x + coefficients.to(x).view(-1, *[1] * (x.ndim - 1)) * self._unit.to(x)

        hook = edit_hook(add, len(self._unit), self._hook_name)
        with hooked(self._model, [(self._point, hook)]):
            logits = logits_of(self._model, ids.expand(len(coefficients), -1))
        # Row by row, since float64 of the whole batch would be large for a large vocabulary.
        return torch.stack([_divergence(base, _log_probabilities(row[positions])) for row in logits]).cpu()


def _log_probabilities(logits: Tensor) -> Tensor:
    # One kind of accelerator has no float64.
    return logits.to(torch.float32 if logits.device.type == "mps" else torch.float64).log_softmax(dim=-1)


def _divergence(base: Tensor, steered: Tensor) -> Tensor:
    """Mean over rows of sum_i p_i (log p_i - log q_i), where p_i = 0 counts nothing."""
    p = base.exp()
    terms = torch.where(p > 0, p * (base - steered), 0)
    # Rounding can take the sum of a zero divergence just below zero.
    return terms.sum(dim=-1).mean().clamp(min=0)


def _unit(direction: Tensor) -> Tensor:
    if direction.ndim != 1 or direction.numel() == 0:
        raise ValueError(f"direction must have shape (d,), got {tuple(direction.shape)}; pass one row of a dictionary.")
    wide = _checks.finite(direction, "direction").detach().to(torch.promote_types(direction.dtype, torch.float32))
    if not bool(wide.any()):
        raise ValueError("direction is zero: it points nowhere, so no coefficient has an effect.")
    return wide / wide.norm()


def _checked_targets(targets: Sequence[float | int]) -> list[float]:
    if not targets:
        raise ValueError("targets is empty; give one or more divergences in nats, 0.1 for example.")
    return [float(_checks.between(target, 0, math.inf, "each of targets")) for target in targets]


def _checked_signs(signs: Sequence[int]) -> list[int]:
    found = list(dict.fromkeys(signs))
    if not found or any(sign not in (1, -1) for sign in found):
        raise ValueError(f"signs must be one or both of 1 and -1, got {list(signs)}.")
    return found
