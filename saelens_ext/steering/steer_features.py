"""One continuation for each feature of a dictionary, all steered equally far.

Equally far means by one divergence of the next token's prediction, see :mod:`saelens_ext.steering.strength`. All
continuations, the unsteered one included, are sampled with the same random numbers, so that they differ by the
steering alone. The strengths of all features are searched for together, many to a forward pass, which is what makes a
whole dictionary affordable; for one direction with several targets or prompts there is
:func:`~saelens_ext.steering.strength.match_strength`, which looks for the same first crossing.

Symbols
    t  typical norm of the activations at the hook
    a  coefficient, in units of the activation; row i of a batch gets a_i times its own unit direction at every position
    D  divergence of the steered prediction at the prompt's last position, in nats; D(0) = 0
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sae_lens import SAE
from scipy.optimize import elementwise
from torch import Tensor
from tqdm.auto import tqdm

from saelens_ext import _checks, _files
from saelens_ext._modes import standard_modes
from saelens_ext.host.bos import text_start, warn_of_other_bos
from saelens_ext.host.continued_text import text_after
from saelens_ext.host.flat_sae import hooks_of
from saelens_ext.host.hook_edits import edit_hook, edit_point, flat_rows, hooked
from saelens_ext.host.models import HostModel, tokenizer_of
from saelens_ext.host.prompt_passes import evaluating, logits_of, prompt_ids
from saelens_ext.host.tokens import special_token_ids
from saelens_ext.steering.divergence_search import MatchedStrength
from saelens_ext.steering.sampling import SamplingOptions, draw_continuations

FORMAT_VERSION = 1

_GRID_RATIO = 2.0
_GRID_START = 2.0**-3  # of the typical norm; a target crossed below it is bracketed by 0
_ROUNDING = 1e-4  # a relative fall in divergence below which it is taken for rounding


@dataclass(frozen=True, kw_only=True)
class SteeredText:
    """What one feature does to a prompt, at one sign."""

    feature: int
    """Index in the dictionary."""
    strength: MatchedStrength
    """The coefficient found and the divergence it has."""
    text: str | None
    """The continuation without its prompt; None where the target cannot be reached."""


@dataclass(frozen=True, kw_only=True)
class SteeredFeatures:
    """Continuations of one prompt, each steered along another feature of a dictionary."""

    hook_name: str
    """Where the features were added, at every token."""
    prompt: str
    target: float
    """Divergence of the next token's prediction that each was steered to, in nats."""
    unsteered: str
    """The continuation without steering, from the same random numbers."""
    texts: tuple[SteeredText, ...]
    """By feature, and for each by the signs asked for. A feature that is zero has none."""

    def save(self, path: str | Path) -> Path:
        """Write everything as one JSON file."""
        path = Path(path)
        content = {"format_version": FORMAT_VERSION} | asdict(self)
        _files.write_json(path, content)
        return path


@standard_modes()
def steer_features(
    model: HostModel,
    sae: SAE[Any],
    *,
    prompt: str = "I think that",
    target: float | int = 0.25,
    features: Sequence[int] | None = None,
    signs: Sequence[int] = (1,),
    tolerance: float = 0.05,
    max_strength: float | int = 100.0,
    typical_norm: float | int | None = None,
    options: SamplingOptions = SamplingOptions(max_new_tokens=25),
    batch_size: int = 32,
    progress: bool = False,
) -> SteeredFeatures:
    """Continue a prompt once for each feature, steered along it so far that the next token's prediction moves by
    ``target``.

    Args:
        model: either host class.
        sae: any dictionary with one direction per feature (``W_dec``), added where it writes: at its own hook, or at a
            transcoder's output hook.
        prompt: what is continued, and where the divergence is measured: at its last position.
        target: divergence from the unsteered prediction in nats, above 0.
        features: which, in [0, d_sae); by default all.
        signs: +1 along a feature, -1 against it, or both.
        tolerance: largest ``|D / target - 1|`` that counts as reached, in (0, 1).
        max_strength: limit of the coefficient, in units of the typical norm.
        typical_norm: t; by default what the metadata of a dictionary records that writes where it reads, else the
            median over the prompt's tokens.
        options: how to sample.
        batch_size: continuations per forward pass.
        progress: show a progress bar of the search, which takes most of the time.

    Returns:
        A strength for every feature and sign, and a continuation for those at which the target can be reached.

    Raises:
        ValueError: no such feature, an unknown hook, or an argument out of range as for
            :func:`~saelens_ext.steering.strength.match_strength`.

    Source: arXiv 2506.10920, causal steering.
    """
    read, hook_name = hooks_of(sae)
    warn_of_other_bos(sae.cfg.metadata.get("prepend_bos"), text_start(model).prepends_bos, "this model's prompts")
    chosen = _chosen(features, sae.cfg.d_sae)
    _checks.positive(batch_size, "batch_size")
    _checks.between(target, 0, math.inf, "target")
    _checks.between(tolerance, 0, 1, "tolerance")
    _checks.between(max_strength, 0, math.inf, "max_strength")
    if not signs or any(sign not in (1, -1) for sign in signs):
        raise ValueError(f"signs must be one or both of 1 and -1, got {list(signs)}.")
    units = torch.nn.functional.normalize(_checks.finite(sae.W_dec.detach(), "W_dec").float(), dim=1)
    pairs = [(index, sign) for index in chosen if bool(units[index].any()) for sign in dict.fromkeys(signs)]
    rows = torch.stack([sign * units[index] for index, sign in pairs]) if pairs else units[:0]
    with evaluating(model):
        meter = _RowMeter(model, hook_name, prompt_ids(model, prompt), rows, batch_size, progress)
        # A transcoder's is of what it reads.
        recorded = sae.cfg.metadata.typical_norm if hook_name == read else None
        norm = next(value for value in (typical_norm, recorded, meter.typical_norm) if value is not None)
        _checks.between(norm, 0, math.inf, "typical_norm")
        strengths = _match(meter, [sign for _, sign in pairs], norm, norm * max_strength, float(target), tolerance)
        meter.bar.close()
    found = [(index, strength) for (index, _), strength in zip(pairs, strengths, strict=True)]
    reached = [(index, strength) for index, strength in found if strength.reached]
    offsets = [torch.zeros_like(units[0]), *(units[index] * strength.coefficient for index, strength in reached)]
    unsteered, *texts = _continue_each(model, hook_name, prompt, offsets, options, batch_size)
    text_of = {(index, strength.sign): text for (index, strength), text in zip(reached, texts, strict=True)}
    return SteeredFeatures(
        hook_name=hook_name,
        prompt=prompt,
        target=float(target),
        unsteered=unsteered,
        texts=tuple(SteeredText(feature=i, strength=s, text=text_of.get((i, s.sign))) for i, s in found),
    )


def _chosen(features: Sequence[int] | None, d_sae: int) -> list[int]:
    chosen = list(range(d_sae)) if features is None else [int(index) for index in features]
    wrong = [index for index in chosen if not 0 <= index < d_sae]
    if wrong or not chosen:
        raise ValueError(f"features must be one or several of 0 to {d_sae - 1}, got {wrong[:5] or chosen}.")
    return chosen


# --- the search ---


class _RowMeter:
    """D of a prompt for rows of directions, each at a coefficient of its own."""

    def __init__(self, model: HostModel, hook_name: str, ids: Tensor, rows: Tensor, batch_size: int, progress: bool):
        self._model, self._hook_name, self._ids, self._rows, self._batch_size = model, hook_name, ids, rows, batch_size
        self._point = edit_point(model, hook_name)
        self.known: list[dict[float, float]] = [{0.0: 0.0} for _ in rows]
        self.bar = tqdm(desc="matching strengths", unit="row", disable=not progress)
        norms: list[Tensor] = []
        special = torch.tensor(special_token_ids(tokenizer_of(model)))
        content = (~torch.isin(ids.cpu(), special)).nonzero()[:, 0].tolist() or list(range(len(ids)))

        def note(x: Tensor, hook: Any = None) -> None:
            norms.append(flat_rows(x, rows.shape[1], hook_name)[0, content].float().norm(dim=-1))

        with hooked(model, [(self._point, note)]):
            self._base = _log_probabilities(logits_of(model, ids[None])[:, -1])
        self.typical_norm = float(torch.cat(norms).median())

    def __call__(self, numbers: Sequence[int], coefficients: Sequence[float]) -> list[float]:
        """Divergences of rows at |a|; those that are not finite count as infinite."""
        found: list[float] = []
        for begin in range(0, len(numbers), self._batch_size):
            part = list(numbers[begin : begin + self._batch_size])
            scale = torch.tensor(coefficients[begin : begin + self._batch_size], dtype=torch.float32)
            offsets = self._rows[part] * scale[:, None].to(self._rows)
            hook = edit_hook(_adder(offsets), offsets.shape[1], self._hook_name)
            with hooked(self._model, [(self._point, hook)]):
                logits = logits_of(self._model, self._ids.expand(len(part), -1))[:, -1]
            terms = self._base.exp() * (self._base - _log_probabilities(logits))
            divergences = torch.where(self._base > -torch.inf, terms, 0).sum(dim=-1).clamp(min=0)
            found += divergences.nan_to_num(nan=torch.inf).tolist()
            self.bar.update(len(part))
        for number, a, kl in zip(numbers, coefficients, found, strict=True):
            self.known[number][float(a)] = kl
        return found


def _log_probabilities(logits: Tensor) -> Tensor:
    # One kind of accelerator has no float64.
    return logits.to(torch.float32 if logits.device.type == "mps" else torch.float64).log_softmax(dim=-1)


def _match(
    meter: _RowMeter, signs: list[int], norm: float | int, limit: float | int, target: float, tolerance: float
) -> list[MatchedStrength]:
    """The strength of every row: the first crossing of the target on a grid of |a|, solved inside its cell."""
    low, high = np.zeros(len(signs)), np.full(len(signs), np.nan)
    open_rows, a = list(range(len(signs))), min(norm * _GRID_START, limit)
    while open_rows:
        for row, kl in zip(open_rows, meter(open_rows, [a] * len(open_rows)), strict=True):
            (high if kl >= target * (1 - tolerance) else low)[row] = a
        open_rows = [row for row in open_rows if np.isnan(high[row])] if a < limit else []
        a = min(a * _GRID_RATIO, limit)
    crossed = np.flatnonzero(~np.isnan(high))

    def residual(a: Any, row: Any) -> Any:
        kl = np.array(meter([int(i) for i in row], [float(x) for x in a]))
        # On the scale of the root the function is nearly linear.
        return np.sqrt(np.nan_to_num(kl, posinf=1e300) / target) - 1

    if len(crossed):
        tolerances = {"fatol": 0.99 * (math.sqrt(1 + tolerance) - 1), "frtol": 0.0, "xrtol": 1e-7}
        elementwise.find_root(residual, (low[crossed], high[crossed]), args=(crossed,), tolerances=tolerances)
    return [_strength(meter.known[row], sign, float(high[row]), target, tolerance) for row, sign in enumerate(signs)]


def _strength(known: dict[float, float], sign: int, high: float, target: float, tolerance: float) -> MatchedStrength:
    """What was found for one row, whose first crossing lies at or below ``high``; NaN if there was none."""
    points = sorted((a, kl) for a, kl in known.items() if math.isfinite(kl))
    status: Literal["reached", "saturated", "unresolved"] = "saturated"
    a, kl = max(points, key=lambda point: point[1])
    if not math.isnan(high):
        a, kl = min((point for point in points if point[0] <= high), key=lambda point: abs(point[1] - target))
        status = "reached" if abs(kl / target - 1) <= tolerance else "unresolved"
    rises = all(after >= before * (1 - _ROUNDING) for (_, before), (_, after) in zip(points, points[1:], strict=False))
    return MatchedStrength(
        sign=sign,
        target=target,
        coefficient=sign * a,
        kl=kl,
        status=status,
        monotone=rises,
        n_evaluations=len(known) - 1,
    )


# --- the continuations ---


def _continue_each(
    model: HostModel, hook_name: str, prompt: str, offsets: list[Tensor], options: SamplingOptions, batch_size: int
) -> list[str]:
    """One continuation for each offset that is added at every token, all from the random numbers of continuation 0."""
    ids = prompt_ids(model, prompt)
    point = edit_point(model, hook_name)
    texts: list[str] = []
    with evaluating(model):
        for begin in range(0, len(offsets), batch_size):
            rows = torch.stack(offsets[begin : begin + batch_size])
            hook = edit_hook(_adder(rows), rows.shape[1], hook_name)
            with hooked(model, [(point, hook)]):
                drawn = draw_continuations(model, ids, [0] * len(rows), options)
            texts += [text_after(model, ids.tolist(), one.token_ids) for one in drawn]
    return texts


def _adder(rows: Tensor) -> Any:
    """Adds row i to every token of sequence i."""

    def add(x: Tensor) -> Tensor:
        if len(x) != len(rows):
            raise ValueError("All sequences of a batch share one activation at this hook: pass batch_size=1.")
        return x + rows.to(x).view(len(rows), *[1] * (x.ndim - 2), -1)

    return add
