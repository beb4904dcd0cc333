"""Continuations of a prefix, sampled from the model or brought along, with the probability of every token.

Each draw has random numbers of its own, made from the seed, the prefix and the draw's number; so the set does not
depend on the batch size (up to rounding, as `sampling` says). Here and in every later stage the prefix starts with BOS
where the model's texts do (`saelens_ext.host.bos`), and where a chat template writes it, as the template has it.
"""

import logging
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.continuations.collected import Collected
from saelens_ext.continuations.continuation_set import PADDING, WEIGHTINGS, ContinuationSet, pad_rows
from saelens_ext.continuations.samplers.sampler import Sampler
from saelens_ext.continuations.samplers.scored_draws import ScoredDraws
from saelens_ext.host.bos import begins_with_bos
from saelens_ext.host.chat_template import Asked, Prompt, asked
from saelens_ext.host.continued_text import ids_after, text_after
from saelens_ext.host.models import HostModel, describe_model, tokenizer_of
from saelens_ext.host.prompt_passes import prompt_ids
from saelens_ext.ops.modes import evaluating, standard_modes
from saelens_ext.steering.sampling import Drawn, SamplingOptions, continuation_log_probs

logger = logging.getLogger(__name__)


@standard_modes()
def sample_continuations(
    model: HostModel,
    prefix: Prompt,
    n: int,
    *,
    temperature: float | int = 1.0,
    top_p: float | int = 0.9,
    max_new_tokens: int = 20,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    deduplicate: bool = True,
    weights: str = "uniform",
    chat_template: bool = False,
    chat_template_options: Mapping[str, Any] | None = None,
    max_draws: int | None = None,
    sampler: Sampler | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> ContinuationSet:
    """Sample continuations of a prefix.

    Draws are taken in order until n rows are found. Continuations without visible text count as drawn but make no row.

    Args:
        model: any TransformerLens model, with a tokenizer.
        prefix: the text to go on from; BOS is added where ``model.to_tokens`` adds it, and none to a chat template's.
            Or a conversation, messages with "role" ("system", "user", "assistant") and "content", which the template
            writes; where the last is the assistant's, it is the beginning of the answer.
        n: rows wanted, at least 1.
        temperature: what logits are divided by; 0 takes the likeliest token, so that all draws are one.
        top_p: only the likeliest tokens that together hold this much mass are drawn, in (0, 1].
        max_new_tokens: tokens after which a continuation ends, at least 1.
        stop: texts that end a continuation; the token that completes one is kept, in the text too.
        seed: of the draws.
        deduplicate: let every sequence of tokens make one row; its column ``count`` says how often it was drawn. Rows
            may have equal texts: a text can be cut into tokens in several ways, and parts of characters read alike.
        weights: ``"uniform"``, ``"frequency"``, ``"path"`` or ``"length_normalised"``, see
            :meth:`ContinuationSet.with_weights`; the effective sample size is logged.
        chat_template: make the prefix a user's message in the tokenizer's chat template, and continue the answer.
        chat_template_options: passed to the template, for example ``{"enable_thinking": False}``.
        max_draws: stop after so many draws though rows are missing; by default 10 n.
        sampler: where texts come from instead of the model, such as an :class:`EndpointSampler` or a
            :class:`HuggingFaceSampler`. The model scores them. ``metadata["sampling"]["log_prob_difference"]`` says how
            far the sampler's log-probabilities lie from the model's where both have a token (``mean`` and
            ``mean_absolute``, nats per token; at temperature and top-p 1 ``mean`` estimates the Kullback-Leibler
            divergence per token) and what fraction is ``cut_otherwise``. A mean absolute difference above 0.1 is
            logged as a warning, as are other tokens of the prefix.
        batch_size: draws per forward pass.
        progress: show a bar.

    Returns:
        Up to n rows, in the order drawn; fewer (with a logged warning) when the draws bring nothing new.

    Raises:
        ValueError: a number out of range, a prefix that does not leave room for the continuation in the model's
            context, no chat template, no tokenizer, or no draw with visible text.

    Examples:
        >>> continuations = sx.sample_continuations(model, "The assert statement", 8, max_new_tokens=4, seed=0)
        >>> len(continuations), continuations.token_ids.shape[1] <= 4
        (8, True)

    Source: arXiv 2606.08236, sampling (temperature 1, top-p 0.9, 20 tokens).
    """
    n, batch_size = _checks.positive(n, "n"), _checks.positive(batch_size, "batch_size")
    _checks.choice(weights, WEIGHTINGS, "weights")
    options = SamplingOptions(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=None, seed=seed
    )
    limit = 10 * n if max_draws is None else _checks.positive(max_draws, "max_draws")
    stops = _stop_texts(stop)
    given = asked(tokenizer_of(model), prefix, chat_template=bool(chat_template), options=chat_template_options)
    ids = fitting_prefix(model, given.text, options.max_new_tokens, given.templated)
    collected = Collected(model, ids, n, deduplicate)
    draws = None if sampler is None else ScoredDraws(model, sampler, given.text, ids, given.templated)
    if draws is None:
        collected.draw(options, stops, limit, batch_size, progress)
    else:
        draws.fill(collected, options, stops, limit, batch_size, progress)
    settings = {name: getattr(options, name) for name in ("temperature", "top_p", "max_new_tokens")}
    settings |= {"stop": stops, "seed": options.seed, "n": n, "deduplicate": bool(deduplicate)} | collected.describe()
    rows: Sequence[Drawn] = collected.rows
    if draws is not None:
        fitting_prefix(model, given.text, max(len(row.token_ids) for row in rows), given.templated)
        rows, settings["log_prob_difference"] = draws.scored(rows, batch_size)
        settings["sampler"] = draws.describe()
    metadata = {"sampling": settings, **how_asked(given)}
    counts = {"count": torch.tensor(collected.counts)}
    return as_set(model, given.prompt, given.text, ids, collected.texts, rows, weights, metadata, counts)


@standard_modes()
def score_continuations(
    model: HostModel,
    prefix: Prompt,
    continuations: Sequence[str] | Sequence[Sequence[int]],
    *,
    weights: str | Sequence[float | int] = "uniform",
    chat_template: bool = False,
    chat_template_options: Mapping[str, Any] | None = None,
    batch_size: int = 16,
) -> ContinuationSet:
    """Make a set of continuations that you have already, in their order, and find how likely the model holds them.

    Args:
        prefix: as for :func:`sample_continuations`, and likewise the chat template.
        continuations: texts, with their leading space where there is one, which get the tokens that they have behind
            the prefix (see :func:`ids_after`); or token ids, which alone say how a sampled text was cut.
        weights: the name of a rule or one positive number per continuation.
        batch_size: continuations per forward pass.

    Raises:
        ValueError: no continuation, one without a token or with an id outside the vocabulary, a prefix and continuation
            longer than the model's context, or weights that are not positive.
    """
    _checks.positive(batch_size, "batch_size")
    given = asked(tokenizer_of(model), prefix, chat_template=bool(chat_template), options=chat_template_options)
    text, templated = given.text, given.templated
    ones = texts_or_ids(continuations, "continuations")
    rows = [ids_after(model, text, [one], templated=templated)[0] if isinstance(one, str) else one for one in ones]
    _check_ids(model, rows)
    ids = fitting_prefix(model, text, max(map(len, rows)), templated)
    with evaluating(model):
        scores = continuation_log_probs(model, ids, rows, batch_size=batch_size)
    pairs = zip(ones, rows, strict=True)
    texts = [one if isinstance(one, str) else text_after(model, ids.tolist(), row) for one, row in pairs]
    drawn = [Drawn(row, score, "given") for row, score in zip(rows, scores, strict=True)]
    metadata = {"given": len(rows), **how_asked(given)}
    return as_set(model, given.prompt, text, ids, texts, drawn, weights, metadata)


def how_asked(given: Asked) -> dict[str, Any]:
    """What a set's metadata say of its prompt."""
    messages = {} if given.messages is None else {"messages": given.messages}
    return {"chat_template": given.templated, **messages}


def as_set(
    model: HostModel,
    prompt: str,
    prefix: str,
    ids: Tensor,
    texts: Sequence[str],
    rows: Sequence[Drawn],
    weights: str | Sequence[float | int],
    metadata: Mapping[str, Any],
    columns: Mapping[str, Tensor] | None = None,
) -> ContinuationSet:
    """The set of some drawn or given continuations."""
    made = ContinuationSet(
        prompt=prompt,
        prefix=prefix,
        prefix_ids=tuple(ids.tolist()),
        token_ids=pad_rows([row.token_ids for row in rows], PADDING, torch.int64),
        lengths=torch.tensor([len(row.token_ids) for row in rows]),
        texts=tuple(texts),
        log_probs=pad_rows([row.log_probs for row in rows], 0.0, torch.float32),
        weights=torch.full((len(rows),), 1 / len(rows), dtype=torch.float64),
        columns=dict(columns or {}),
        metadata={
            **metadata,
            "model": describe_model(model),
            "prepend_bos": begins_with_bos(tokenizer_of(model), ids.tolist()),
        },
    ).with_weights(weights)
    logger.info("%d continuations, worth %.1f equally weighted ones", len(made), made.effective_sample_size)
    return made


def _stop_texts(stop: str | Sequence[str]) -> list[str]:
    stops = [stop] if isinstance(stop, str) and stop else list(stop)
    if "" in stops:
        raise ValueError("stop holds an empty text, which is in every text; leave it out.")
    return stops


def fitting_prefix(model: HostModel, text: str, room: int, templated: bool) -> Tensor:
    """The tokens of a prefix; ValueError where a continuation of ``room`` tokens does not fit behind them."""
    ids = prompt_ids(model, text, templated=templated)
    context = int(model.cfg.n_ctx)
    if len(ids) + room > context:
        raise ValueError(
            f"The prefix has {len(ids)} tokens and a continuation up to {room}; together they must fit into this "
            f"model's context of {context}. Shorten one of them."
        )
    return ids


def texts_or_ids(values: Any, name: str) -> list[str | list[int]]:
    """Continuations, each a text or token ids; ValueError for what is neither, or no continuation."""
    found: list[str | list[int]] = []
    for number, one in enumerate(_checks.listed(values, name, "continuation")):
        which = f"Number {number} of the {name}"
        if isinstance(one, str):
            found.append(_checks.text(one, which))
            continue
        try:
            found.append([operator.index(i) for i in one])
        except TypeError as error:
            raise ValueError(f"{which} must be a text or a list of token ids, got {one!r:.100}.") from error
    return found


def _check_ids(model: HostModel, rows: Sequence[Sequence[int]]) -> None:
    empty = [i for i, row in enumerate(rows) if not len(row)]
    if empty:
        raise ValueError(f"Continuations {empty[:10]} are empty; leave them out.")
    size = int(model.cfg.d_vocab)
    wrong = [(i, t) for i, row in enumerate(rows) for t in row if not 0 <= t < size]
    if wrong:
        row, token = wrong[0]
        raise ValueError(f"Continuation {row} has token id {token}; this model's ids are 0 to {size - 1}.")
