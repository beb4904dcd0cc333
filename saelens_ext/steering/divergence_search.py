"""The search for the coefficient at which a steered prediction has diverged by a given amount; see `strength`."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import elementwise
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.host.chat_template import Prompt
from saelens_ext.host.hook_edits import edit_hook, edit_point, flat_rows, hooked
from saelens_ext.host.models import HostModel, tokenizer_of
from saelens_ext.host.prompt_passes import logits_of, prompt_ids
from saelens_ext.host.tokens import special_token_ids
from saelens_ext.ops.precision import wide

_GRID_RATIO = 2.0
_GRID_START = 2.0**-3  # of the typical norm; a target crossed below it is bracketed by 0
_RESOLUTION = 1e-7  # relative width of a bracket that is not split any further: what float32 tells apart
_ROUNDING = 1e-4  # a relative fall in divergence below which it is taken for rounding

Point = tuple[int, float]
"""A row of directions, and the coefficient |a| along it."""


@dataclass(frozen=True, kw_only=True)
class MatchedStrength:
    """The coefficient found for one sign and one target."""

    sign: int
    """+1 along the direction, -1 against it."""
    target: float
    """Requested divergence, in nats."""
    coefficient: float
    """Signed, in units of the activation. When not reached: where the divergence came closest to the target."""
    kl: float
    """Divergence at the coefficient, in nats. When saturated: the largest attained within the limit."""
    status: Literal["reached", "saturated", "unresolved"]
    """``"saturated"``: no coefficient within the limit attains the target with finite logits. ``"unresolved"``: the
    divergence jumps over the target (a model in half precision) and no coefficient comes within the tolerance."""
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
    """Divergence as a function of |a| for one direction and sign, as far as it was evaluated."""

    def __init__(self, sign: int):
        self.sign = sign
        self.known: dict[float, float] = {0.0: 0.0}

    def points(self) -> list[tuple[float, float]]:
        """Every finite (|a|, D), by ascending |a|."""
        return sorted((a, kl) for a, kl in self.known.items() if math.isfinite(kl))

    def bracket(self, target: float) -> tuple[float, float] | None:
        """The first two neighbours between which the divergence crosses the target; None when it never does."""
        points = sorted(self.known.items())
        return next(((low, high) for (low, _), (high, kl) in zip(points, points[1:]) if kl >= target), None)

    def open_bracket(self, target: float, tolerance: float) -> tuple[float, float] | None:
        """Where to look for a target; None when it is met, cannot be, or its bracket is too narrow to split."""
        bracket = self.bracket(target)
        if bracket is None or bracket[1] - bracket[0] <= _RESOLUTION * bracket[1]:
            return None
        return None if self.strength(target, tolerance).reached else bracket

    def strength(self, target: float, tolerance: float) -> MatchedStrength:
        """The state of the first crossing, of the lower edge of the tolerance, as far as it is known."""
        points = self.points()
        bracket = self.bracket(target * (1 - tolerance))
        status: Literal["reached", "saturated", "unresolved"] = "saturated"
        a, kl = max(points, key=lambda point: point[1])
        # Where the upper end overflows, no finite divergence crosses the target.
        if bracket is not None and math.isfinite(self.known[bracket[1]]):
            a, kl = min(((a, self.known[a]) for a in bracket), key=lambda point: abs(point[1] - target))
            status = "reached" if abs(kl / target - 1) <= tolerance else "unresolved"
        return MatchedStrength(
            sign=self.sign,
            target=target,
            coefficient=self.sign * a,
            kl=kl,
            status=status,
            monotone=all(high >= low * (1 - _ROUNDING) for (_, low), (_, high) in zip(points, points[1:])),
            n_evaluations=len(self.known) - 1,
        )


class DivergenceSearch:
    """Curves of many rows, each with a sign, and the search that evaluates them together, many to a forward pass.

    ``divergences`` gives D at each of several points; what is not finite lies beyond every target.
    """

    def __init__(self, divergences: Callable[[Sequence[Point]], list[float]], signs: Sequence[int]):
        self._divergences = divergences
        self.curves = [Curve(sign) for sign in signs]

    def run(
        self, targets: Sequence[float], tolerance: float, *, norm: float | int, limit: float | int, batch_size: int
    ) -> list[MatchedStrength]:
        """The strengths of every row and target, rows first."""
        self._scan(max(targets) * (1 - tolerance), norm, limit, batch_size)
        self._solve(targets, tolerance)
        return [curve.strength(target, tolerance) for curve in self.curves for target in targets]

    def _evaluate(self, points: Sequence[Point]) -> list[float]:
        new = [(row, a) for row, a in dict.fromkeys(points) if a not in self.curves[row].known]
        for (row, a), kl in zip(new, self._divergences(new), strict=True):
            self.curves[row].known[a] = kl if math.isfinite(kl) else math.inf
        return [self.curves[row].known[a] for row, a in points]

    def _scan(self, target: float, norm: float | int, limit: float | int, batch_size: int) -> None:
        """Evaluate a geometric grid of |a| upwards until each row crosses the target or meets the limit."""
        steps = math.ceil(math.log(max(limit / (norm * _GRID_START), 1), _GRID_RATIO))
        grid = [a for step in range(steps) if (a := norm * _GRID_START * _GRID_RATIO**step) < limit] + [limit]
        open_rows = list(range(len(self.curves)))
        while grid and open_rows:
            step = max(1, batch_size // len(open_rows))
            self._evaluate([(row, a) for row in open_rows for a in grid[:step]])
            grid = grid[step:]
            open_rows = [row for row in open_rows if self.curves[row].bracket(target) is None]

    def _solve(self, targets: Sequence[float], tolerance: float) -> None:
        """Evaluate coefficients until every target that is bracketed is met, for all rows and targets at once."""

        def residual(a: Any, row: Any, target: Any) -> Any:
            divergences = self._evaluate([(int(r), float(x)) for r, x in zip(row, a, strict=True)])
            # On the scale of the root the function is nearly linear.
            return np.sqrt(np.nan_to_num(divergences, posinf=1e300) / target) - 1

        # |D / target - 1| <= tolerance on the scale of the root, where the upper side is the narrower one; a little
        # less, so that rounding cannot make the two disagree.
        tolerances = {"fatol": 0.99 * (math.sqrt(1 + tolerance) - 1), "frtol": 0.0, "xrtol": _RESOLUTION / 2}
        n_known = -1
        # Every round learns something or is the last.
        while n_known < (n_known := sum(len(curve.known) for curve in self.curves)):
            # One target's evaluations can uncover an earlier crossing of another, which is then searched in turn.
            open_brackets = {
                (row, target): bracket
                for row, curve in enumerate(self.curves)
                for target in targets
                if (bracket := curve.open_bracket(target, tolerance)) is not None
            }
            if not open_brackets:
                return
            low, high = np.array(list(open_brackets.values())).T
            row, target = np.array(list(open_brackets)).T
            elementwise.find_root(residual, (low, high), args=(row, target), tolerances=tolerances)


class DivergenceMeter:
    """D(base || steered) of a model on prompts, as a function of the direction (a unit row) and the coefficient.

    Prompts run one at a time and without padding; the sequences of a batch are one prompt, each steered otherwise.
    ``on_rows`` is called with the number of rows that a pass has evaluated.
    """

    def __init__(
        self,
        model: HostModel,
        hook_name: str,
        rows: Tensor,
        prompts: Sequence[Prompt],
        batch_size: int,
        *,
        average_over: str = "last",
        templated: bool = False,
        chat_template_options: Mapping[str, Any] | None = None,
        on_rows: Callable[[int], object] = lambda n: None,
    ):
        self._model = model
        self._hook_name = hook_name
        self._point = edit_point(model, hook_name)
        self._rows = rows
        self._batch_size = batch_size
        self._on_rows = on_rows
        how: dict[str, Any] = {"templated": templated, "chat_template_options": chat_template_options}
        self._ids = [prompt_ids(model, prompt, **how) for prompt in prompts]
        special = torch.tensor(special_token_ids(tokenizer_of(model)))
        content = [self._content(ids.cpu(), special) for ids in self._ids]
        self._positions = [[len(ids) - 1] for ids in self._ids] if average_over == "last" else content
        self._norms: list[Tensor] = []
        self._base = [self._base_pass(*args) for args in zip(self._ids, content, self._positions, strict=True)]

    @property
    def typical_norm(self) -> float:
        """Median norm of the unsteered activations at the prompts' tokens."""
        return float(torch.cat(self._norms).median())

    def divergences(self, points: Sequence[Point]) -> list[float]:
        """Mean divergence over prompts at each row and coefficient, in nats."""
        means: list[float] = []
        for begin in range(0, len(points), self._batch_size):
            numbers, coefficients = zip(*points[begin : begin + self._batch_size], strict=True)
            rows = self._rows[list(numbers)]
            offsets = rows * torch.tensor(coefficients, dtype=rows.dtype, device=rows.device)[:, None]
            prompts = zip(self._ids, self._positions, self._base, strict=True)
            means += torch.stack([self._steered_pass(offsets, *prompt) for prompt in prompts]).mean(dim=0).tolist()
            self._on_rows(len(numbers))
        return means

    @staticmethod
    def _content(ids: Tensor, special: Tensor) -> list[int]:
        """Positions of tokens that are text; all where there is none."""
        return (~torch.isin(ids, special)).nonzero()[:, 0].tolist() or list(range(len(ids)))

    def _base_pass(self, ids: Tensor, content: list[int], positions: list[int]) -> Tensor:
        """Unsteered log-probabilities ``(positions, d_vocab)``; notes the norms of the activations."""

        def note(x: Tensor, hook: Any = None) -> None:
            rows = flat_rows(x, self._rows.shape[1], self._hook_name)[0, content]
            self._norms.append(rows.float().norm(dim=-1).cpu())

        with hooked(self._model, [(self._point, note)]):
            return log_probabilities(logits_of(self._model, ids[None])[0, positions])

    def _steered_pass(self, offsets: Tensor, ids: Tensor, positions: list[int], base: Tensor) -> Tensor:
        """Divergences ``(b,)`` of one prompt with offsets ``(b, d)``."""
        with hooked(self._model, [(self._point, adding_rows(offsets, self._hook_name))]):
            logits = logits_of(self._model, ids.expand(len(offsets), -1))
        # Row by row, since float64 of the whole batch would be large for a large vocabulary.
        return torch.stack([divergence(base, log_probabilities(row[positions])) for row in logits]).cpu()


def adding_rows(offsets: Tensor, hook_name: str) -> Any:
    """A hook that adds row i of ``(b, d)`` to every token of sequence i."""

    def add(x: Tensor) -> Tensor:
        if len(x) != len(offsets):
            raise ValueError(f"All rows of a batch share one activation at {hook_name}: pass batch_size=1.")
        return x + offsets.to(x).view(len(offsets), *[1] * (x.ndim - 2), -1)

    return edit_hook(add, offsets.shape[1], hook_name)


def checked_signs(signs: Sequence[int]) -> list[int]:
    """The different signs; ValueError unless they are one or both of 1 and -1."""
    different = list(dict.fromkeys(signs))
    if not different or any(sign not in (1, -1) for sign in different):
        raise ValueError(f"signs must be one or both of 1 and -1, got {list(signs)}.")
    return different


def check_limits(target: float | int, tolerance: float, max_strength: float | int, batch_size: int) -> None:
    """ValueError unless the numbers that bound a search are in their ranges."""
    _checks.between(target, 0, math.inf, "target")
    _checks.between(tolerance, 0, 1, "tolerance")
    _checks.between(max_strength, 0, math.inf, "max_strength")
    _checks.positive(batch_size, "batch_size")


def log_probabilities(logits: Tensor) -> Tensor:
    """Of logits, in float64."""
    return wide(logits).log_softmax(dim=-1)


def divergence(base: Tensor, steered: Tensor) -> Tensor:
    """Mean over rows of log-probabilities of sum_i p_i (log p_i - log q_i) in nats, where p_i = 0 counts nothing."""
    p = base.exp()
    terms = torch.where(p > 0, p * (base - steered), 0)
    # Rounding can take the sum of a zero divergence just below zero.
    return terms.sum(dim=-1).mean().clamp(min=0)
