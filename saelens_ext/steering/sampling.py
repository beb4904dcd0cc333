"""Sampled continuations of a prompt, steered or not, that depend on nothing but what is asked for.

Each continuation has random numbers of its own, made from the seed, the prompt and its number. So the third
continuation of a prompt is the same text whatever other prompts, how many others, or which batch it is sampled with
(up to rounding: a forward pass of another batch size may differ in its last bits, and a draw that falls within them
takes the neighbouring token). The global random state is neither read nor changed.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.host.chat_template import Prompt, asked, listed_prompts
from saelens_ext.host.continued_text import ids_after, text_after
from saelens_ext.host.hook_edits import edit_point, hooked
from saelens_ext.host.models import HostModel, tokenizer_of
from saelens_ext.host.prompt_passes import (
    CachedPasses,
    KVCache,
    is_resumable,
    length_batches,
    logits_of,
    position_chunks,
    prompt_ids,
)
from saelens_ext.host.turn_ends import end_ids
from saelens_ext.ops.modes import evaluating, standard_modes
from saelens_ext.ops.precision import wide
from saelens_ext.steering.divergence_search import adding_rows

T = TypeVar("T")

_SHORTLIST = 1024
"""The likeliest tokens that are looked at before all are sorted."""


@_checks.normalising
@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How continuations are sampled.

    Raises:
        ValueError: a value out of range.
    """

    max_new_tokens: int = 50
    """Tokens after which a continuation ends, unless EOS or the end of the turn ended it before; at least 1."""
    temperature: float | int = 1.0
    """What logits are divided by; 0 takes the likeliest token."""
    top_k: int | None = 30
    """Only this many of the likeliest tokens can be drawn; None: all."""
    top_p: float | int = 1.0
    """Of those, only the likeliest that together hold this much of their mass, in (0, 1]."""
    seed: int = 0

    def __post_init__(self) -> None:
        _checks.normalise_fields(self)
        _checks.positive(self.max_new_tokens, "max_new_tokens")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature!r}.")
        if self.top_k is not None:
            _checks.positive(self.top_k, "top_k")
        _checks.between(self.top_p, 0, 1, "top_p", closed_high=True)


@dataclass(frozen=True)
class Drawn:
    """One sampled continuation."""

    token_ids: list[int]
    """Its tokens, without the EOS or the end of the turn that ended it."""
    log_probs: Tensor
    """Log-probabilities in nats at temperature 1, whole distribution, whatever was sampled from; CPU float32."""
    ended_by: str
    """"eos" (or another of :func:`end_ids`), "stop" (a stop text, which it holds) or "length"."""
    text: str | None = None
    """Its text, where that was given; otherwise that of its tokens."""


@standard_modes()
def sample_texts(
    model: HostModel,
    prompts: Prompt | Sequence[Prompt],
    *,
    n: int = 8,
    options: SamplingOptions = SamplingOptions(),
    chat_template_options: Mapping[str, Any] | None = None,
    batch_size: int = 32,
) -> list[list[str]]:
    """Sample continuations of prompts from the model as it is, hooks and interventions included.

    Prompts of as many tokens share a forward pass. The default options are what the code of arXiv 2506.10920 does: it
    also names a ``top_p`` of 0.3, but TransformerLens ignores that beside a ``top_k``.

    Args:
        model: any TransformerLens model.
        prompts: one prompt or several, each a text, to which BOS is added where ``model.to_tokens`` adds it, or a
            conversation: messages with "role" and "content", of which the last may be the beginning of the answer.
        n: continuations per prompt, at least 1.
        options: how to sample.
        chat_template_options: passed to the chat template of conversations, for example ``{"enable_thinking": False}``.
        batch_size: continuations per forward pass.

    Returns:
        For each prompt, n continuations without the prompt, without BOS, and without the EOS or end of turn that ended
        them.

    Raises:
        ValueError: a number out of range, no prompt, or a model without a tokenizer.

    Examples:
        >>> options = sx.SamplingOptions(max_new_tokens=5)
        >>> with sx.add_direction(model, "blocks.1.hook_out", partition.exemplars[0], 2.0):
        ...     texts = sx.sample_texts(model, ["I think that", "The assert statement"], n=3, options=options)
        >>> [len(each) for each in texts]
        [3, 3]
    """
    _checks.positive(n, "n")
    starts = [prompt_ids(model, one, chat_template_options=chat_template_options) for one in listed_prompts(prompts)]
    texts: list[list[str]] = [[] for _ in starts]
    for part in equal_length_batches(starts, range(n), batch_size):
        for (prompt, _), text in zip(part, continued(model, starts, part, [number for _, number in part], options)):
            texts[prompt].append(text)
    return texts


@standard_modes()
def sample_steered(
    model: HostModel,
    hook_name: str,
    offsets: Tensor,
    prompts: Prompt | Sequence[Prompt],
    *,
    n: int = 8,
    options: SamplingOptions = SamplingOptions(),
    chat_template_options: Mapping[str, Any] | None = None,
    batch_size: int = 32,
) -> list[list[list[str]]]:
    """:func:`sample_texts` under each of several interventions at one hook, many to a forward pass.

    A prompt's draws are the same under all of them.

    Args:
        model: any TransformerLens model.
        hook_name: any alias of the hook.
        offsets: ``(c, d)``, what each intervention adds to the activation at every token.
        prompts: one prompt or several, texts or conversations.
        n: continuations per intervention and prompt.
        options: how to sample.
        chat_template_options: passed to the chat template of conversations.
        batch_size: continuations per forward pass.

    Returns:
        For each intervention and prompt, n continuations.

    Raises:
        ValueError: as :func:`sample_texts`, or offsets of another width than the hook.
    """
    starts = [prompt_ids(model, one, chat_template_options=chat_template_options) for one in listed_prompts(prompts)]
    texts: list[list[list[str]]] = [[[] for _ in starts] for _ in offsets]
    point = edit_point(model, hook_name)
    each = [(number, cell) for number in range(_checks.positive(n, "n")) for cell in range(len(offsets))]
    for part in equal_length_batches(starts, each, batch_size):
        added = offsets[[cell for _, (_, cell) in part]]
        with hooked(model, [(point, adding_rows(added, hook_name))]):
            said = continued(model, starts, part, [number for _, (number, _) in part], options)
        for (prompt, (_, cell)), text in zip(part, said):
            texts[cell][prompt].append(text)
    return texts


def equal_length_batches(starts: Sequence[Tensor], each: Sequence[T], batch_size: int) -> Iterator[list[tuple[int, T]]]:
    """Every prompt with every entry ``(prompt, entry)``, in batches whose prompts have as many tokens.

    Args:
        starts: ids of the prompts.
        each: what every prompt is continued under.
        batch_size: pairs in a batch, at most.
    """
    by_length = sorted(range(len(starts)), key=lambda number: len(starts[number]))
    for _, alike in groupby(by_length, key=lambda number: len(starts[number])):
        rows = [(prompt, entry) for prompt in alike for entry in each]
        yield from (rows[i : i + batch_size] for i in range(0, len(rows), _checks.positive(batch_size, "batch_size")))


def continued(
    model: HostModel,
    starts: Sequence[Tensor],
    part: Sequence[tuple[int, object]],
    numbers: Sequence[int],
    options: SamplingOptions,
) -> list[str]:
    """A continuation of the prompt of every row of a batch; ``numbers`` as for :func:`draw_continuations`."""
    ids = torch.stack([starts[prompt] for prompt, _ in part])
    with evaluating(model):
        drawn = draw_continuations(model, ids, numbers, options)
    return [text_after(model, start.tolist(), one.token_ids) for start, one in zip(ids, drawn, strict=True)]


def mean_log_likelihoods(
    model: HostModel,
    prompt: Prompt,
    texts: Sequence[str],
    *,
    chat_template_options: Mapping[str, Any] | None = None,
    batch_size: int = 16,
) -> Tensor:
    """How likely the model, as it is, finds texts after a prompt, in the tokens of :func:`ids_after`.

    Returns:
        Mean log-likelihood per token in nats, float64 ``(n,)``; NaN for a text without a token.

    Raises:
        ValueError: no prompt token, or a model without a tokenizer.
    """
    _checks.positive(batch_size, "batch_size")
    given = asked(tokenizer_of(model), prompt, options=chat_template_options, name="prompt")
    start = prompt_ids(model, given.text, templated=given.templated)
    rows = ids_after(model, given.text, texts, templated=given.templated)
    with evaluating(model):
        scores = continuation_log_probs(model, start, rows, batch_size=batch_size)
    return torch.tensor([float(row.mean()) if len(row) else float("nan") for row in scores], dtype=torch.float64)


def continuation_log_probs(
    model: HostModel, start: Tensor, continuations: Sequence[Sequence[int]], *, batch_size: int = 16
) -> list[Tensor]:
    """The log-probability in nats of every token of continuations of one prompt (ids ``(length,)``, at least one).

    The model is as it is, in evaluation mode and without gradients (``evaluating``); float32 on the CPU.

    Memory: beside a pass's activations, the logits of a batch in the model's dtype, of at most 4096 tokens or of one
    row, and their float32 a row at a time. A bridge has none for the prompt but its last token; a `HookedTransformer`,
    or a bridge with hooks at its unembedding, has those of the prompt too, once for each row. A row of more than 1024
    tokens alone goes through in chunks, where there is a cache, and takes its keys and values and a chunk's logits.
    """
    found: list[Tensor] = [torch.zeros(0)] * len(continuations)
    filled = [i for i, ids in enumerate(continuations) if len(ids)]
    for batch in length_batches([len(start) + len(continuations[i]) for i in filled], batch_size):
        rows = [filled[i] for i in batch]
        for row, scores in zip(rows, _batch_log_probs(model, start, [continuations[i] for i in rows]), strict=True):
            found[row] = scores
    return found


def _batch_log_probs(model: HostModel, start: Tensor, continuations: list[Sequence[int]]) -> list[Tensor]:
    sequences = [torch.cat([start, torch.tensor(ids, device=start.device)]) for ids in continuations]
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    # Column t of the logits is about token t + 1; the first that counts is the one the prompt's last token predicts.
    first = len(start) - 1
    chunks = position_chunks(ids.shape[1]) if len(ids) == 1 else []
    if len(chunks) > 1 and is_resumable(model):
        cache = KVCache(model, 1).started()
        runs = ((columns, cache.run(ids[:, columns])) for columns in chunks)
    else:
        logits = logits_of(model, ids, mask, last=ids.shape[1] - first)
        runs = iter([(slice(ids.shape[1] - logits.shape[1], ids.shape[1]), logits)])
    found: list[list[Tensor]] = [[] for _ in continuations]
    for columns, logits in runs:
        skipped = max(0, first - columns.start)
        chosen = ids[:, columns.start + skipped + 1 : columns.stop + 1, None]
        # Row by row: the float32 of a whole batch's vocabulary would be another copy of the logits.
        for scores, row, own in zip(found, logits, chosen, strict=True):
            scores.append(row[skipped : skipped + len(own)].float().log_softmax(dim=-1).gather(-1, own)[:, 0].cpu())
    return [torch.cat(scores)[: len(given)] for scores, given in zip(found, continuations, strict=True)]


def seed_of(seed: int, number: int, ids: Sequence[int]) -> int:
    """The seed of one continuation of one prompt."""
    name = f"{seed}|{number}|{','.join(map(str, ids))}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 2**63


def _draws(options: SamplingOptions, ids: Tensor, number: int) -> Tensor:
    """Uniform numbers ``(max_new_tokens,)`` that belong to one continuation of one prompt."""
    generator = torch.Generator().manual_seed(seed_of(options.seed, number, ids.tolist()))
    return torch.rand(options.max_new_tokens, generator=generator, dtype=torch.float64)


def draw_continuations(
    model: HostModel, ids: Tensor, numbers: Sequence[int], options: SamplingOptions, *, stop: Sequence[str] = ()
) -> list[Drawn]:
    """Sample continuations of one prompt, or of prompts of equal length, as one batch, under ``evaluating``.

    Args:
        ids: the prompt, ``(length,)``, or that of each continuation ``(b, length)``; at least one token.
        numbers: which continuations, b of them; each number of a prompt is always the same one.
        stop: texts that end a continuation as soon as one of them is in it.
    """
    drawing = Drawing(model, ids, numbers, options, stop=stop)
    while not drawing.done:
        drawing.step()
    return drawing.drawn


class Drawing:
    """Continuations of prompts that grow by a token at each step; the arguments of :func:`draw_continuations`."""

    def __init__(
        self,
        model: HostModel,
        ids: Tensor,
        numbers: Sequence[int],
        options: SamplingOptions,
        *,
        stop: Sequence[str] = (),
    ):
        self._model, self._options, self._stop = model, options, stop
        self._ends_turn = end_ids(model)
        self._prompts = ids.expand(len(numbers), -1)
        pairs = zip(self._prompts, numbers, strict=True)
        self._draws = torch.stack([_draws(options, prompt, number) for prompt, number in pairs])
        self._passes = CachedPasses(model, self._prompts)
        self._tokens, self._scores = torch.empty(len(numbers), 0, dtype=torch.int64), torch.empty(len(numbers), 0)
        self._ends: list[tuple[str, int] | None] = [None] * len(numbers)
        self.logits = torch.empty(len(numbers), 0)
        """What the last token of each was drawn from, ``(b, d_vocab)``."""

    @property
    def done(self) -> bool:
        """Whether every continuation has ended."""
        return None not in self._ends or self._tokens.shape[1] == self._options.max_new_tokens

    @property
    def drawn(self) -> list[Drawn]:
        """The continuations so far."""
        lengths = [("length", self._tokens.shape[1]) if end is None else end for end in self._ends]
        return [
            Drawn(self._tokens[row, :n].tolist(), self._scores[row, :n], reason)
            for row, (reason, n) in enumerate(lengths)
        ]

    def step(self) -> None:
        """Draw the next token of each, under ``evaluating``."""
        if self._tokens.shape[1]:
            self._passes.append(self._tokens[:, -1])
        self.logits = self._passes.logits()
        chosen = _choose(self.logits, self._draws[:, self._tokens.shape[1]], self._options)
        self._tokens = torch.cat([self._tokens, chosen[:, None]], dim=1)
        likely = self.logits.float().log_softmax(dim=-1).gather(-1, chosen.to(self.logits.device)[:, None])
        self._scores = torch.cat([self._scores, likely.cpu()], dim=1)
        for row in (row for row, end in enumerate(self._ends) if end is None):
            self._ends[row] = _end_of(self._model, self._prompts[row], self._tokens[row], self._ends_turn, self._stop)


def _end_of(
    model: HostModel, ids: Tensor, tokens: Tensor, ends_turn: Collection[int], stop: Sequence[str]
) -> tuple[str, int] | None:
    """Why a continuation ends with its last token, if it does, and how many of its tokens count."""
    if int(tokens[-1]) in ends_turn:
        return "eos", len(tokens) - 1
    if stop and any(text in text_after(model, ids.tolist(), tokens.tolist()) for text in stop):
        return "stop", len(tokens)
    return None


def _choose(logits: Tensor, draws: Tensor, options: SamplingOptions) -> Tensor:
    """The token ``(b,)`` whose share of the unit interval holds the draw, likelier tokens first."""
    if options.temperature == 0:
        return logits.argmax(dim=-1).cpu()
    width = min(options.top_k or logits.shape[-1], logits.shape[-1])
    if options.top_k is None and width > _SHORTLIST:
        # Sorting a whole vocabulary takes as long as a small model's step, and the draw nearly always falls early.
        total = (wide(logits) / options.temperature).logsumexp(dim=-1, keepdim=True).cpu()
        chosen, found = _choose_among(logits, _SHORTLIST, draws, options, total)
        if bool(found.all()):
            return chosen
    return _choose_among(logits, width, draws, options, None)[0]


def _choose_among(
    logits: Tensor, width: int, draws: Tensor, options: SamplingOptions, total: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The choice among the likeliest tokens, and whether the choice among all would be the same, both ``(b,)``.

    ``total`` is the logarithm of the mass of all tokens, ``(b, 1)``; None: only the likeliest count.
    """
    best, ids = logits.float().topk(width, dim=-1)
    # On the CPU in float64, so that equal draws and equal logits give equal tokens on every device.
    scaled = best.cpu().double() / options.temperature
    mass = scaled.softmax(dim=-1) if total is None else (scaled - total).exp()
    inside = mass.cumsum(dim=-1) - mass < options.top_p
    nucleus = torch.where(inside, mass, 0)
    cumulative = nucleus.cumsum(dim=-1)
    # Of a nucleus that does not end within the list, the whole mass is known only when it is everything.
    known = ~inside[:, -1] if options.top_p < 1 else torch.ones(len(mass), dtype=torch.bool)
    whole = cumulative[:, -1:] if total is None or options.top_p < 1 else torch.ones(len(mass), 1, dtype=torch.float64)
    place = torch.searchsorted(cumulative, draws[:, None] * whole, right=True)
    # A draw that rounds up to the whole mass would fall behind the last token that has any.
    last = (nucleus > 0).sum(dim=-1, keepdim=True) - 1
    return ids.cpu().gather(-1, place.minimum(last))[:, 0], known & (place <= last)[:, 0]
