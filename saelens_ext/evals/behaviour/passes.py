"""What a model does with prompts under several ablations at once: rows of one batch, each with its own.

Symbols
    b  rows of a forward pass: a prompt under a condition
    Q  orthonormal columns that span the directions of a row's condition, ``(d, m)``; 0 in a row that nothing is done to
    c  the centre at a hook
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from saelens_ext import _checks
from saelens_ext.evals.behaviour.behaviour import OpeningOdds
from saelens_ext.evals.methods import Kind
from saelens_ext.host.chat_template import Asked, Prompt, asked, in_words, listed_prompts
from saelens_ext.host.continued_text import ids_after
from saelens_ext.host.hook_edits import edit_hook, edit_point, hooked
from saelens_ext.host.models import HostModel, tokenizer_of
from saelens_ext.host.prompt_passes import logits_of, prompt_ids
from saelens_ext.ops.modes import evaluating, standard_modes
from saelens_ext.ops.precision import wide
from saelens_ext.steering.behaviour import Behaviour
from saelens_ext.steering.interventions import orthonormal_basis, unit_rows
from saelens_ext.steering.sampling import SamplingOptions, continued, equal_length_batches

_LOGIT_ROWS = 16
"""Rows whose logits at every token are held at once."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Condition:
    """Directions to project out of the activations, or nothing."""

    name: str
    """Draws of one control share it."""
    kind: Kind = "control"
    directions: Tensor | None = None
    """``(m, d)``, of any length but 0; None: the model as it is."""
    draw: int = 0
    centers: Mapping[str, Tensor] | None = None
    """c by hook, ``(d,)``; by default the centre of the hook."""
    description: str = ""

    def basis(self) -> "Basis | None":
        """What is projected out."""
        if self.directions is None:
            return None
        return Basis(orthonormal_basis(unit_rows(self.directions)).detach(), self.centers)


class Basis(NamedTuple):
    """What is projected out of the activations of a row."""

    q: Tensor
    """Q, ``(d, rank)``."""
    centers: Mapping[str, Tensor] | None = None
    """c by hook, ``(d,)``; by default the centre of the hook."""


class Verdict(NamedTuple):
    """What a prompt brought about."""

    shown: float
    """To what extent the behaviour is shown, in [0, 1]; NaN: no verdict."""
    odds: float
    """Log-odds of the openings in nats; NaN where answers were judged."""
    text: str
    """The answer; empty where only openings were looked at."""


@contextmanager
def ablating(model: HostModel, centers: Mapping[str, Tensor], bases: Sequence[Basis | None]) -> Iterator[HostModel]:
    """Project the directions of each row out of what flows on at some hooks: x <- x - Q Q^T (x - c).

    Args:
        model: any TransformerLens model.
        centers: c, ``(d,)``, by hook, of rows without centres of their own.
        bases: what is projected out of each row of the batch, None for a row that stays as it is. Without any, no hook
            is set.
    """
    known = [basis for basis in bases if basis is not None]
    if not known:
        yield model
        return
    d = known[0].q.shape[0]
    stacked = known[0].q.new_zeros(len(bases), d, max(basis.q.shape[1] for basis in known))
    for row, basis in enumerate(bases):
        if basis is not None:
            stacked[row, :, : basis.q.shape[1]] = basis.q

    def edit(x: Tensor, c: Tensor) -> Tensor:
        q = stacked.to(x)
        return x - (x - c.to(x)) @ q @ q.mT

    hooks = []
    for name, center in centers.items():
        own = [center if basis is None or basis.centers is None else basis.centers[name] for basis in bases]
        rows = torch.stack([c.to(center) for c in own])[:, None]
        hooks.append((edit_point(model, name), edit_hook(lambda x, c=rows: edit(x, c), d, name)))
    with hooked(model, hooks):
        yield model


@dataclass(frozen=True, kw_only=True, eq=False)
class Asking:
    """How prompts are put to a model and what it does is judged."""

    model: HostModel
    behaviour: Behaviour | OpeningOdds
    chat_template: bool = True
    chat_template_options: Mapping[str, Any] | None = None
    max_new_tokens: int = 60
    batch_size: int = 64
    """Rows of a forward pass."""
    centers: Mapping[str, Tensor] = field(default_factory=dict)
    """Where conditions act."""

    def ask(
        self, prompts: Sequence[Prompt], conditions: Sequence[Condition] = (Condition(name="no ablation"),), *,
        progress: bool = False,
    ) -> list[list[Verdict]]:  # fmt: skip
        """The verdict on every prompt under every condition, by condition.

        Rows of conditions and prompts of as many tokens share forward passes. Where nothing is ablated no hook is set,
        so that the answer is that of the plain model.
        """
        found = [[Verdict(np.nan, np.nan, "")] * len(prompts) for _ in conditions]
        bases = [condition.basis() for condition in conditions]
        tokenizer, how = tokenizer_of(self.model), {"chat_template": self.chat_template}
        given = [asked(tokenizer, one, **how, options=self.chat_template_options, name="A prompt") for one in prompts]
        starts = [prompt_ids(self.model, one.text, templated=one.templated) for one in given]
        self._check_lengths(prompts, starts)
        with evaluating(self.model), tqdm(total=len(prompts) * len(conditions), disable=not progress) as bar:
            for chosen in (
                [n for n, q in enumerate(bases) if q is None],
                [n for n, q in enumerate(bases) if q is not None],
            ):
                behaviour, rest = self.behaviour, (starts, chosen, bases)
                is_odds = isinstance(behaviour, OpeningOdds)
                parts = self._opened(behaviour, given, *rest) if is_odds else self._answered(behaviour, prompts, *rest)
                for rows, verdicts in parts:
                    for (number, prompt), verdict in zip(rows, verdicts, strict=True):
                        found[number][prompt] = verdict
                    bar.update(len(rows))
        return found

    def _check_lengths(self, prompts: Sequence[Prompt], starts: Sequence[Tensor]) -> None:
        room, limit = self._room(), int(self.model.cfg.n_ctx)
        for prompt, start in zip(prompts, starts):
            if len(start) + room > limit:
                raise ValueError(
                    f"The prompt {in_words(prompt)[:60]!r} has {len(start)} tokens, and with an answer of {room} it is "
                    f"longer than the model's limit of {limit}. Shorten it or lower max_new_tokens."
                )

    def _room(self) -> int:
        """Tokens behind a prompt."""
        if not isinstance(self.behaviour, OpeningOdds):
            return self.max_new_tokens
        openings = [*self.behaviour.shows, *self.behaviour.lacks]
        return max(map(len, tokenizer_of(self.model)(openings, add_special_tokens=False).input_ids))

    def _answered(
        self, behaviour: Behaviour, prompts: Sequence[Prompt], starts: Sequence[Tensor], conditions: Sequence[int],
        bases: Sequence[Basis | None],
    ) -> Iterator[tuple[list[tuple[int, int]], list[Verdict]]]:  # fmt: skip
        """Greedy answers, judged; prompts of equal length together."""
        options = SamplingOptions(max_new_tokens=self.max_new_tokens, temperature=0)
        for part in equal_length_batches(starts, conditions, self.batch_size):
            with ablating(self.model, self.centers, [bases[number] for _, number in part]):
                answers = continued(self.model, starts, part, [0] * len(part), options)
            verdicts = [
                Verdict(judged(behaviour, prompts[prompt], answer), np.nan, answer)
                for (prompt, _), answer in zip(part, answers, strict=True)
            ]
            yield [(number, prompt) for prompt, number in part], verdicts

    def _opened(
        self, odds: OpeningOdds, given: Sequence[Asked], starts: Sequence[Tensor], conditions: Sequence[int],
        bases: Sequence[Basis | None],
    ) -> Iterator[tuple[list[tuple[int, int]], list[Verdict]]]:  # fmt: skip
        """Log-odds of openings; prompts of like length together."""
        openings = [*odds.shows, *odds.lacks]
        order = sorted(range(len(starts)), key=lambda prompt: len(starts[prompt]))
        rows = [(number, prompt) for prompt in order for number in conditions]
        for part in _parts(rows, max(1, _LOGIT_ROWS // len(openings))):
            behind = {
                prompt: ids_after(self.model, given[prompt].text, openings, templated=given[prompt].templated)
                for _, prompt in part
            }
            sequences = [(starts[prompt], ids) for _, prompt in part for ids in behind[prompt]]
            each = [bases[number] for number, _ in part for _ in openings]
            with ablating(self.model, self.centers, each):
                scores = _log_probs(self.model, sequences).reshape(len(part), len(openings))
            shows, lacks = scores.split([len(odds.shows), len(odds.lacks)], dim=1)
            values = (shows.logsumexp(dim=1) - lacks.logsumexp(dim=1)).tolist()
            yield part, [Verdict(float(value > odds.threshold), value, "") for value in values]


def judged(behaviour: Behaviour, prompt: Prompt, answer: str) -> float:
    """What a behaviour says of one answer.

    Raises:
        ValueError: another number of verdicts than one, or one outside [0, 1].
    """
    values = [float(value) for value in behaviour(prompt, [answer])]
    if len(values) != 1 or not (np.isnan(values[0]) or 0 <= values[0] <= 1):
        raise ValueError(
            f"The behaviour gave {values} for one answer; it must give one number in [0, 1] for each, or NaN where it "
            "has no verdict."
        )
    return values[0]


def _parts(rows: list[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    """Parts of at most ``size`` rows, as equal in number as can be."""
    n = -(-len(rows) // _checks.positive(size, "batch_size"))
    for number in range(n):
        yield rows[number * len(rows) // n : (number + 1) * len(rows) // n]


def _log_probs(model: HostModel, sequences: Sequence[tuple[Tensor, Sequence[int]]]) -> Tensor:
    """Log-probability of the tokens that follow each prompt, together, float64 ``(n,)``."""
    whole = [torch.cat([start, torch.tensor(list(ids), device=start.device)]) for start, ids in sequences]
    ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)
    lengths = torch.tensor([len(sequence) for sequence in whole], device=ids.device)
    places = torch.arange(ids.shape[1], device=ids.device)
    first = torch.tensor([len(start) for start, _ in sequences], device=ids.device)
    logits = logits_of(model, ids, places < lengths[:, None])
    from_here = int(first.min()) - 1  # what the prompts predict before their last tokens is of no use
    scores = logits[:, from_here:-1].float().log_softmax(dim=-1).gather(-1, ids[:, from_here + 1 :, None])[..., 0]
    at = places[from_here + 1 :]
    counts = (at >= first[:, None]) & (at < lengths[:, None])
    return wide(torch.where(counts, scores, 0)).sum(dim=1).cpu()


@standard_modes(gradients=False)
def measure_behaviour(
    model: HostModel,
    prompts: Prompt | Sequence[Prompt],
    behaviour: Behaviour | OpeningOdds,
    *,
    chat_template: bool = True,
    chat_template_options: Mapping[str, Any] | None = None,
    max_new_tokens: int = 60,
    batch_size: int = 64,
    progress: bool = False,
) -> pd.DataFrame:
    """Ask a model, as it is, hooks and interventions included, and judge what it does.

    Args:
        model: any TransformerLens model.
        prompts: one or several, each a text, or a conversation, which the chat template writes; where its last message
            is the assistant's, it is the beginning of the answer.
        behaviour: judges greedy answers, or `OpeningOdds`.
        chat_template: make each text a user's message.
        chat_template_options: passed to the chat template, for example ``{"enable_thinking": False}``.
        max_new_tokens: of an answer.
        batch_size: answers in a forward pass.
        progress: show a progress bar.

    Returns:
        One row per prompt: prompt (of a conversation its roles and what each says), shown (in [0, 1], NaN without a
        verdict), odds (log-odds in nats, NaN where answers are judged) and text (the answer).

    Raises:
        ValueError: no prompt, one that is too long, no chat template, or verdicts outside [0, 1].

    Examples:
        >>> odds = sx.OpeningOdds(shows=[" not"], lacks=[" and"])
        >>> found = sx.measure_behaviour(model, ["The cat did", "The cat"], odds, chat_template=False)
        >>> found["prompt"].tolist(), bool(found["odds"].notna().all())
        (['The cat did', 'The cat'], True)
    """
    given = listed_prompts(prompts)
    asking = Asking(
        model=model, behaviour=behaviour, chat_template=chat_template, chat_template_options=chat_template_options,
        max_new_tokens=max_new_tokens, batch_size=batch_size,
    )  # fmt: skip
    (verdicts,) = asking.ask(given, progress=progress)
    table = pd.DataFrame(verdicts, columns=list(Verdict._fields))
    return table.assign(prompt=list(map(in_words, given)))[["prompt", *Verdict._fields]]


def given_verdicts(asked: pd.DataFrame, prompts: Sequence[Prompt], what: str) -> list[Verdict]:
    """Verdicts on prompts from a table as :func:`measure_behaviour` gives it; odds and text may be missing.

    ``what`` names the prompts.

    Raises:
        ValueError: a table of other prompts, or a verdict outside [0, 1].
    """
    table = asked.reindex(columns=["prompt", *Verdict._fields])
    if table["prompt"].tolist() != list(map(in_words, prompts)):
        raise ValueError(
            f"asked has {len(table)} prompts, which are not the {len(prompts)} of {what} in their order; give what "
            f"measure_behaviour(model, {what}, …) gave, or leave it out."
        )
    shown = table["shown"].astype(float)
    if not shown.dropna().between(0, 1).all():
        raise ValueError(f"asked has the verdict {shown[~shown.between(0, 1)].dropna().iloc[0]}, outside [0, 1].")
    texts = ["" if pd.isna(text) else str(text) for text in table["text"]]
    return [Verdict(*row) for row in zip(shown.tolist(), table["odds"].astype(float).tolist(), texts)]
