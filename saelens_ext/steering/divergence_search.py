"""The search for the coefficient at which a steered prediction has diverged by a given amount; see `strength`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import elementwise
from torch import Tensor

from saelens_ext.host.hook_edits import edit_hook, edit_point, flat_rows, hooked
from saelens_ext.host.models import HostModel, tokenizer_of
from saelens_ext.host.prompt_passes import logits_of, prompt_ids
from saelens_ext.host.tokens import special_token_ids

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


class Curve:
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
            sign=self.sign,
            target=target,
            coefficient=self.sign * a,
            kl=kl,
            status=status,
            monotone=rises,
            n_evaluations=len(self.known) - 1,
        )


class SharedEvaluations:
    """Curves of one or both signs, and the one call that evaluates what is not known yet."""

    def __init__(self, divergences: Callable[[Sequence[float]], list[float]], curves: dict[int, Curve]):
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


def scan(known: SharedEvaluations, norm: float, limit: float, target: float, batch_size: int) -> None:
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
        open_signs = [
            s for s in open_signs if not any(kl >= target or math.isnan(kl) for kl in known.curves[s].known.values())
        ]


def solve(known: SharedEvaluations, targets: Sequence[float], tolerance: float) -> None:
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


def _open_bracket(curve: Curve, target: float, tolerance: float) -> tuple[float, float] | None:
    """Where to look for a target; None when it is met, cannot be, or its bracket is too narrow to split."""
    bracket = curve.bracket(target)
    if (
        bracket is None
        or curve.strength(target, tolerance).reached
        or bracket[1] - bracket[0] <= _RESOLUTION * bracket[1]
    ):
        return None
    return bracket


class DivergenceMeter:
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
            each = [
                self._steered_pass(part, *prompt) for prompt in zip(self._ids, self._positions, self._base, strict=True)
            ]
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
