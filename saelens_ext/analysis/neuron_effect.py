"""What a group of neurons does to chosen tokens, compared with as many neurons drawn at random.

Symbols
    m    neurons in the group; v their values or additions, ``(m,)``
    T    tokens of interest; y their readings after the last position of a prompt: logits or log-probabilities
    e    effect: y with the intervention minus y without, averaged over prompts, ``(T,)``
    R    random draws of m neurons outside the group
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.host.chat_template import Asked, Prompt, asked, listed_prompts
from saelens_ext.host.continued_text import ids_after
from saelens_ext.host.hook_edits import edit_point, flat_rows, hooked
from saelens_ext.host.models import HostModel, tokenizer_of
from saelens_ext.host.prompt_passes import logits_of, prompt_ids
from saelens_ext.host.tokens import special_token_ids, token_strings
from saelens_ext.ops.modes import evaluating, standard_modes

# Logits held at once: 128 MB in float32.
_LOGITS_PER_PASS = 2**25


@dataclass(frozen=True, kw_only=True, eq=False)
class NeuronGroupEffect:
    """The effect of a group on T tokens, and of R random groups; CPU float64 ``(T,)`` unless said otherwise."""

    tokens: tuple[str, ...]
    """The tokens of interest."""
    token_ids: Tensor
    """Their ids, int64."""
    measure: str
    """What changed: "logit", or "log_probability" in nats."""
    effect: Tensor
    """e, the mean over prompts."""
    by_prompt: Tensor
    """The effect on each prompt, ``(prompts, T)``."""
    control: Tensor
    """The effect of each random group, mean over prompts, ``(R, T)``."""
    control_low: Tensor
    """Lower end of the central range of the random effects, ``confidence`` of them inside."""
    control_high: Tensor
    """Upper end of it."""
    p_value: Tensor
    """Two-sided Monte-Carlo p-value of e among the random effects; at least 2 / (R + 1), for each token by itself."""
    confidence: float
    """Fraction of the random effects in the range, in (0, 1)."""

    def __str__(self) -> str:
        prompts = f"{len(self.by_prompt)} prompt{'s' if len(self.by_prompt) > 1 else ''}"
        heading = (
            f"Change of the {self.measure.replace('_', ' ')} over {prompts}, beside {len(self.control)} random groups"
        )
        return f"{heading}\n{self.to_dataframe().to_string(index=False)}"

    def to_dataframe(self) -> pd.DataFrame:
        """One row per token of interest."""
        columns = {"effect": self.effect, "control_mean": self.control.mean(0)}
        columns |= {name: getattr(self, name) for name in ("control_low", "control_high", "p_value")}
        ids = {"token": list(self.tokens), "token_id": self.token_ids.numpy()}
        return pd.DataFrame(ids | {name: column.numpy() for name, column in columns.items()})


@standard_modes()
def neuron_group_effect(
    model: HostModel,
    hook_name: str,
    neurons: Tensor | Sequence[int],
    weights: Tensor | Sequence[float | int],
    tokens_of_interest: Sequence[str | int],
    prompts: Prompt | Sequence[Prompt],
    *,
    mode: Literal["add", "set"] = "add",
    positions: Literal["last", "all"] = "last",
    measure: Literal["logit", "log_probability"] = "logit",
    n_random: int = 100,
    control_pool: Tensor | Sequence[int] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    chat_template_options: Mapping[str, Any] | None = None,
    batch_size: int = 32,
) -> NeuronGroupEffect:
    """Change a group of neurons, and see what that does to the prediction after each prompt.

    The control does the same with m other neurons: the weights are dealt out to them in random order, and the change
    of the activation has at every position the norm that the group's change has there. A random group is the same on
    every prompt, so the spread of the control is over groups.

    Args:
        model: any TransformerLens model.
        hook_name: where the neurons are: ``blocks.L.mlp.hook_post``, or any other hook.
        neurons: indices, at least 1, no two alike.
        weights: one per neuron, in units of the activation: what is added, or what it is set to.
        tokens_of_interest: ids, or strings that are single tokens behind a prompt; with the leading space where there
            is one.
        prompts: one or several, texts or conversations as for :func:`sample_texts`.
        mode: "add" weights to the activations, or "set" activations to weights.
        positions: change the "last" token of the prompt, or "all" that are not special.
        measure: "logit", as published, which also moves when all logits move together; or "log_probability".
        n_random: R, at least 1.
        control_pool: neurons to draw from, for example those that any feature uses; those of the group are taken out.
            By default all.
        confidence: fraction of the random effects inside their range, in (0, 1).
        seed: of the draws.
        chat_template_options: passed to the chat template of conversations.
        batch_size: rows in a forward pass, at most.

    Raises:
        ValueError: unknown hook; neurons that are repeated or out of range; weights that do not fit or are not finite;
            a string that is not one token; no prompt; a pool with fewer than m neurons.

    Source: arXiv 2506.10920, the weekday experiment, which has no control.
    """
    _checks.choice(mode, ("add", "set"), "mode")
    _checks.choice(positions, ("last", "all"), "positions")
    _checks.choice(measure, ("logit", "log_probability"), "measure")
    _checks.between(confidence, 0, 1, "confidence")
    _checks.positive(n_random, "n_random")
    _checks.positive(batch_size, "batch_size")
    group, values = _checked_group(neurons, weights)
    point, tokenizer = edit_point(model, hook_name), tokenizer_of(model)
    given = [asked(tokenizer, one, options=chat_template_options) for one in listed_prompts(prompts)]
    starts = [prompt_ids(model, one.text, templated=one.templated) for one in given]
    tokens = _checks.listed(tokens_of_interest, "tokens_of_interest", "token")
    ids = torch.tensor([_token_id(model, token, given[0]) for token in tokens])
    with evaluating(model):
        d = _width(model, point, starts[0])
        indices, amounts = _with_random_groups(group, values, _pool(group, d, control_pool), n_random, seed)
        change = _Change(indices, amounts, mode == "set", point)
        read = [_readings(model, start, change, ids, positions, measure, batch_size) for start in starts]
    # Row 0 of each prompt is the group, the others are random.
    effects = torch.stack(read)
    real, control = effects[:, 0], effects[:, 1:].mean(0)
    low, high = (1 - confidence) / 2, (1 + confidence) / 2
    return NeuronGroupEffect(
        tokens=tuple(token_strings(tokenizer, ids.tolist())),
        token_ids=ids,
        measure=measure,
        effect=real.mean(0),
        by_prompt=real,
        control=control,
        control_low=control.quantile(low, dim=0),
        control_high=control.quantile(high, dim=0),
        p_value=_two_sided(real.mean(0), control),
        confidence=confidence,
    )


# --- from the arguments to numbers ---


def _checked_group(neurons: Tensor | Sequence[int], weights: Tensor | Sequence[float | int]) -> tuple[Tensor, Tensor]:
    group = torch.as_tensor(neurons).detach().cpu().long()
    values = torch.as_tensor(weights).detach().cpu().float()
    if group.ndim != 1 or len(group) == 0 or len(group.unique()) < len(group) or int(group.min()) < 0:
        raise ValueError(f"neurons must be one or more different indices from 0, got {group.tolist()}.")
    if values.shape != group.shape:
        raise ValueError(f"weights must be one number per neuron: {len(group)} neurons, shape {tuple(values.shape)}.")
    return group, _checks.finite(values, "weights")


def _token_id(model: HostModel, token: str | int, prompt: Asked) -> int:
    size = model.cfg.d_vocab
    if not isinstance(token, str):
        if not 0 <= token < size:
            raise ValueError(f"A token id of interest must lie from 0 to {size - 1}, got {token}.")
        return int(token)
    (ids,) = ids_after(model, prompt.text, [token], templated=prompt.templated)
    if len(ids) != 1:
        pieces = token_strings(tokenizer_of(model), ids)
        raise ValueError(f"{token!r} is not one token but {pieces}. Give one, with its leading space if any, or an id.")
    return ids[0]


@torch.no_grad()
def _width(model: HostModel, point: str, ids: Tensor) -> int:
    """Width of the activations at a hook, from a pass over one token."""
    found: list[int] = []

    def see(x: Tensor, hook: Any = None) -> None:
        found.append(x.flatten(2).shape[-1])

    with hooked(model, [(point, see)]):
        logits_of(model, ids[None, :1])
    if not found:
        raise ValueError(f"The hook {point!r} did not fire in a forward pass: it needs other settings of the model.")
    return found[0]


def _pool(group: Tensor, d: int, given: Tensor | Sequence[int] | None) -> Tensor:
    pool = torch.arange(d) if given is None else torch.as_tensor(given).detach().cpu().long().unique()
    for name, indices in (("neurons", group), ("control_pool", pool)):
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < d:
            raise ValueError(f"{name} must lie from 0 to {d - 1}, got {int(indices.min())} to {int(indices.max())}.")
    pool = pool[~torch.isin(pool, group)]
    if len(pool) < len(group):
        raise ValueError(f"control_pool needs {len(group)} neurons outside the group, got {len(pool)}: widen it.")
    return pool


def _with_random_groups(group: Tensor, values: Tensor, pool: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices and values ``(n + 1, m)``: the group itself and n random ones, values in random order."""
    generator = torch.Generator().manual_seed(seed)
    draws = [pool[torch.randperm(len(pool), generator=generator)[: len(group)]] for _ in range(n)]
    orders = [values[torch.randperm(len(group), generator=generator)] for _ in range(n)]
    return torch.stack([group, *draws]), torch.stack([values, *orders])


# --- the passes ---


@dataclass(frozen=True)
class _Change:
    """A change of m activations in each of n + 1 ways."""

    indices: Tensor
    values: Tensor
    is_set: bool
    point: str

    def hook(self, ways: slice, columns: Tensor) -> Callable[..., Tensor]:
        """A hook for a batch whose row r is changed in way r of ``ways``, at the columns of its prompt."""

        @standard_modes()
        def edit(x: Tensor, hook: Any = None) -> Tensor:
            d = x.flatten(2).shape[-1]
            flat = flat_rows(x, d, self.point)
            part = flat[:, columns.to(x.device)].to(torch.promote_types(x.dtype, torch.float32))
            result = flat.clone()
            result[:, columns.to(x.device)] = (part + self._delta(part, ways)).to(x.dtype)
            return result.reshape(x.shape)

        return edit

    def _delta(self, part: Tensor, ways: slice) -> Tensor:
        """What is added to activations ``(rows, columns, d)``."""
        where = self.indices[ways, None].to(part.device).expand(-1, part.shape[1], -1)
        amount = self.values[ways, None].to(part).expand(-1, part.shape[1], -1)
        if self.is_set:
            amount = self._equal_norms(amount - part.gather(2, where), part)
        return torch.zeros_like(part).scatter_(2, where, amount)

    def _equal_norms(self, amount: Tensor, part: Tensor) -> Tensor:
        """Scale changes to the norm of the group's own at the same place; all rows are one prompt before the change."""
        own = self.values[0].to(part) - part[:1, :, self.indices[0].to(part.device)]
        norm = amount.norm(dim=2, keepdim=True).clamp_min(torch.finfo(part.dtype).tiny)
        return amount * (own.norm(dim=2, keepdim=True) / norm)


def _readings(
    model: HostModel, prompt: Tensor, change: _Change, ids: Tensor, positions: str, measure: str, batch_size: int
) -> Tensor:
    """Change of the readings ``(n + 1, T)`` of one prompt, for every way."""
    columns = _columns(model, prompt, positions)
    rows = max(1, min(batch_size, _LOGITS_PER_PASS // (len(prompt) * model.cfg.d_vocab)))
    before = _read(logits_of(model, prompt[None])[:, -1], ids, measure)
    after = []
    for start in range(0, len(change.indices), rows):
        ways = slice(start, min(start + rows, len(change.indices)))
        with hooked(model, [(change.point, change.hook(ways, columns))]):
            logits = logits_of(model, prompt.expand(ways.stop - ways.start, -1))
        after.append(_read(logits[:, -1], ids, measure))
    return torch.cat(after) - before


def _columns(model: HostModel, prompt: Tensor, positions: str) -> Tensor:
    if positions == "last":
        return torch.tensor([len(prompt) - 1])
    special = torch.tensor(special_token_ids(tokenizer_of(model)), dtype=torch.int64)
    columns = (~torch.isin(prompt.cpu(), special)).nonzero().flatten()
    if len(columns) == 0:
        raise ValueError("A prompt holds special tokens only, so that there is no position to change; add a word.")
    return columns


def _read(logits: Tensor, ids: Tensor, measure: str) -> Tensor:
    """Readings ``(rows, T)``, float64 on the CPU."""
    values = logits.cpu().double()
    return (values if measure == "logit" else values.log_softmax(dim=-1))[:, ids]


def _two_sided(effect: Tensor, control: Tensor) -> Tensor:
    above, below = (control >= effect).sum(0), (control <= effect).sum(0)
    return (2 * (1 + torch.minimum(above, below)).double() / (1 + len(control))).clamp_max(1)
