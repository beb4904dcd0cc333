"""Sampled continuations of a prompt, steered or not, that depend on nothing but what is asked for.

Each continuation has random numbers of its own, made from the seed, the prompt and its number. So the third
continuation of a prompt is the same text whatever other prompts, how many others, or which batch it is sampled with
(up to rounding: a forward pass of another batch size may differ in its last bits, and a draw that falls within them
takes the neighbouring token). The global random state is neither read nor changed.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saelens_ext import _checks
from saelens_ext._prompt_passes import CachedPasses, evaluating, logits_of, prompt_ids, prompt_list, text_ids
from saelens_ext.interventions import add_direction
from saelens_ext.models import HostModel, tokenizer_of


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How continuations are sampled.

    Raises:
        ValueError: a value out of range.
    """

    max_new_tokens: int = 50
    """Tokens after which a continuation ends, unless EOS ended it before; at least 1."""
    temperature: float | int = 1.0
    """What logits are divided by; 0 takes the likeliest token."""
    top_k: int | None = 30
    """Only this many of the likeliest tokens can be drawn; None: all."""
    top_p: float | int = 1.0
    """Of those, only the likeliest that together hold this much of their mass, in (0, 1]."""
    seed: int = 0

    def __post_init__(self) -> None:
        _checks.positive(self.max_new_tokens, "max_new_tokens")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature!r}.")
        if self.top_k is not None:
            _checks.positive(self.top_k, "top_k")
        _checks.between(self.top_p, 0, 1, "top_p", closed_high=True)


def sample_steered(
    model: HostModel,
    prompts: str | Sequence[str],
    hook_name: str,
    direction: Tensor,
    coefficient: float | int,
    *,
    n: int = 8,
    max_new_tokens: int = 50,
    temperature: float | int = 1.0,
    top_p: float | int = 1.0,
    top_k: int | None = 30,
    seed: int = 0,
    batch_size: int = 32,
) -> list[list[str]]:
    """Sample continuations while a multiple of a unit direction is added to every token's activation.

    The defaults are what the paper's code does: it also names a ``top_p`` of 0.3, but TransformerLens ignores that
    beside a ``top_k``.

    Args:
        model: either host class.
        prompts: one prompt or several; BOS is added where the tokenizer has one.
        hook_name: any alias of the hook.
        direction: ``(d,)``; only its direction counts.
        coefficient: in units of the activation, any sign, as :func:`match_strength` finds it; 0 leaves the model alone.
        n: continuations per prompt, at least 1.
        max_new_tokens: as in :class:`SamplingOptions`, and likewise ``temperature``, ``top_p``, ``top_k`` and ``seed``.
        batch_size: continuations per forward pass.

    Returns:
        For each prompt, n continuations without the prompt, without BOS, and without the EOS that ended them.

    Raises:
        ValueError: unknown hook, a direction that is zero, not finite or of another width than the hook, an option out
            of range, no prompt, or a model without a tokenizer.

    Source: arXiv 2506.10920, causal steering.
    """
    options = SamplingOptions(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
    )
    with add_direction(model, hook_name, direction, coefficient):
        return sample_continuations(model, prompts, n=n, options=options, batch_size=batch_size)


def sample_continuations(
    model: HostModel,
    prompts: str | Sequence[str],
    *,
    n: int = 8,
    options: SamplingOptions = SamplingOptions(),
    batch_size: int = 32,
) -> list[list[str]]:
    """Sample continuations of prompts from the model as it is, hooks and interventions included.

    Args:
        model: either host class.
        prompts: one prompt or several.
        n: continuations per prompt, at least 1.
        options: how to sample.
        batch_size: continuations per forward pass.

    Returns:
        For each prompt, n continuations as :func:`sample_steered` gives them.

    Raises:
        ValueError: a number out of range, no prompt, or a model without a tokenizer.
    """
    _checks.positive(n, "n")
    _checks.positive(batch_size, "batch_size")
    found = []
    with evaluating(model):
        for prompt in prompt_list(prompts):
            ids = prompt_ids(model, prompt)
            draws = torch.stack([_draws(options, ids, number) for number in range(n)])
            found.append([text for part in draws.split(batch_size) for text in _continue(model, ids, part, options)])
    return found


def mean_log_likelihoods(model: HostModel, prompt: str, texts: Sequence[str], *, batch_size: int = 16) -> Tensor:
    """How likely the model, as it is, finds texts after a prompt.

    The text is tokenised on its own, so that it starts a token where the prompt ends one.

    Args:
        model: either host class.
        prompt: what the texts go on from.
        texts: n continuations.
        batch_size: texts per forward pass.

    Returns:
        Mean log-likelihood per token in nats, float64 ``(n,)``; NaN for a text without a token.

    Raises:
        ValueError: no prompt token, or a model without a tokenizer.
    """
    _checks.positive(batch_size, "batch_size")
    start = prompt_ids(model, prompt)
    continuations = [text_ids(model, text) for text in texts]
    means = torch.full((len(continuations),), float("nan"), dtype=torch.float64)
    # Longest first, so that texts of like length share a batch and little of it is padding.
    order = sorted((i for i, ids in enumerate(continuations) if ids), key=lambda i: -len(continuations[i]))
    with evaluating(model):
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
            means[rows] = _batch_means(model, start, [continuations[i] for i in rows])
    return means


def _batch_means(model: HostModel, start: Tensor, continuations: list[list[int]]) -> Tensor:
    sequences = [torch.cat([start, torch.tensor(ids, device=start.device)]) for ids in continuations]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    # Column t of the logits is about token t + 1; the first that counts is the one the prompt's last token predicts.
    logits = logits_of(model, ids, mask)[:, len(start) - 1 : -1]
    scores = logits.float().log_softmax(dim=-1).gather(-1, ids[:, len(start) :, None])[..., 0]
    counted = mask[:, len(start) :]
    # where, not a product: a padded place may hold -inf.
    return (torch.where(counted, scores, 0).sum(dim=1) / counted.sum(dim=1)).cpu().double()


def _draws(options: SamplingOptions, ids: Tensor, number: int) -> Tensor:
    """Uniform numbers ``(max_new_tokens,)`` that belong to one continuation of one prompt."""
    name = f"{options.seed}|{number}|{','.join(map(str, ids.tolist()))}"
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 2**63
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(options.max_new_tokens, generator=generator, dtype=torch.float64)


def _continue(model: HostModel, ids: Tensor, draws: Tensor, options: SamplingOptions) -> list[str]:
    """One continuation per row of draws ``(b, max_new_tokens)``."""
    eos = tokenizer_of(model).eos_token_id
    passes = CachedPasses(model, ids.expand(len(draws), -1))
    tokens = torch.empty(len(draws), 0, dtype=torch.int64)
    ended = torch.zeros(len(draws), dtype=torch.bool)
    for step in range(options.max_new_tokens):
        chosen = _choose(passes.logits(), draws[:, step], options)
        tokens = torch.cat([tokens, chosen[:, None]], dim=1)
        ended |= chosen == (-1 if eos is None else eos)
        if bool(ended.all()):
            break
        passes.append(chosen)
    return [_text(model, ids.tolist(), row, eos) for row in tokens.tolist()]


def _choose(logits: Tensor, draws: Tensor, options: SamplingOptions) -> Tensor:
    """The token ``(b,)`` whose share of the unit interval holds the draw, likelier tokens first."""
    if options.temperature == 0:
        return logits.argmax(dim=-1).cpu()
    width = logits.shape[-1]
    best, ids = logits.float().topk(min(options.top_k or width, width), dim=-1)
    # On the CPU in float64, so that equal draws give equal tokens on every device.
    mass = (best.cpu().double() / options.temperature).softmax(dim=-1)
    mass = torch.where(mass.cumsum(dim=-1) - mass < options.top_p, mass, 0)
    cumulative = mass.cumsum(dim=-1)
    place = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)
    # A draw that rounds up to the whole mass would fall behind the last token that has any.
    last = (mass > 0).sum(dim=-1, keepdim=True) - 1
    return ids.cpu().gather(-1, place.minimum(last))[:, 0]


def _text(model: HostModel, prompt: list[int], tokens: list[int], eos: int | None) -> str:
    """The text of tokens up to EOS, as it reads behind the prompt."""
    if eos in tokens:
        tokens = tokens[: tokens.index(eos)]
    tokenizer = tokenizer_of(model)
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *tokens], skip_special_tokens=True)
    # Some tokenizers drop the space that a text starts with, so it is read with what stands before it.
    if whole.startswith(before):
        return whole[len(before) :]
    return tokenizer.decode(tokens, skip_special_tokens=True)
