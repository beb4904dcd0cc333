"""Reading a text with dictionaries, token by token, and continuing it steered beside unsteered.

It needs no browser: the page only shows what is found here. One thing at a time; nothing is written anywhere.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saelens_ext.concepts.token_activations import read_texts
from saelens_ext.host.chat_template import Asked, Prompt, asked
from saelens_ext.host.continued_text import text_after
from saelens_ext.host.flat_sae import encode_flat
from saelens_ext.host.hook_pass import limits_of
from saelens_ext.host.models import HostModel, tokenizer_of
from saelens_ext.host.prompt_passes import prompt_ids, text_ids
from saelens_ext.host.tokens import special_token_ids, token_strings
from saelens_ext.ops.modes import evaluating
from saelens_ext.serve.served import Served
from saelens_ext.steering.divergence_search import divergence, log_probabilities
from saelens_ext.steering.interventions import add_direction, latent_directions, scale_latent
from saelens_ext.steering.sampling import Drawing, SamplingOptions
from saelens_ext.steering.strength import MatchedStrength, match_strength

TOLERANCE = 0.05
"""Largest relative error of a matched divergence."""
_REMEMBERED = 500


@dataclass(frozen=True, kw_only=True)
class LiveLimits:
    """How much is taken at once."""

    characters: int = 20_000
    """In a text."""
    tokens: int = 512
    """In a text, its template included; the model's own limit where that is lower."""
    new_tokens: int = 200
    """In a continuation."""
    nats: float = 5.0
    """Divergence that one latent is steered to."""
    changes: int = 8
    """Latents steered or ablated at once."""
    latents: int = 6
    """Latents shown at a token."""


@dataclass(frozen=True, kw_only=True)
class ReadLatent:
    """A latent that is active at a token."""

    latent: int
    value: float
    """Its code."""


@dataclass(frozen=True, kw_only=True)
class ReadToken:
    """What a dictionary says about one token."""

    text: str
    special: bool
    """Whether it is structure rather than text."""
    latents: tuple[ReadLatent, ...]
    """Those of the largest codes in magnitude, none of them 0."""
    region: int | None = None
    """The nearest region, of a partition."""
    novelty: float | None = None
    """Cosine distance to it."""


@dataclass(frozen=True, kw_only=True)
class LatentChange:
    """A latent that is steered or ablated."""

    dictionary: str
    """Name of a served one."""
    latent: int
    nats: float = 0.0
    """How far it moves the next token's prediction on its own, with the sign of the direction; 0 does not steer."""
    ablate: bool = False
    """Set its code to 0 instead."""


@dataclass(frozen=True, kw_only=True)
class SteeredSoFar:
    """Two continuations from the same random numbers, as far as they are."""

    stage: str
    """What is being done, in words."""
    unsteered: str = ""
    steered: str = ""
    n_tokens: int = 0
    """Tokens of the longer one."""
    divergence: float | None = None
    """Of the next token's prediction under all changes together, in nats; None before it is known."""
    strengths: tuple[MatchedStrength | None, ...] = ()
    """Of every change, None for one that is not steered; those not reached are used as they are."""
    done: bool = False


@dataclass
class _Pair:
    """The two drawings of one prompt."""

    drawings: tuple[Drawing, Drawing]
    contexts: Sequence[AbstractContextManager[Any]]
    divergence: float | None = field(default=None)

    def step(self, model: HostModel) -> bool:
        """A token more of each that has not ended; whether there was any."""
        first = self.divergence is None
        for drawing, contexts in zip(self.drawings, ((), self.contexts), strict=True):
            if not drawing.done:
                with evaluating(model), ExitStack() as stack:
                    for context in contexts:
                        stack.enter_context(context)
                    drawing.step()
        if first:
            base, steered = (log_probabilities(drawing.logits) for drawing in self.drawings)
            self.divergence = float(divergence(base, steered))
        return not all(drawing.done for drawing in self.drawings)


class LiveModel:
    """A model and dictionaries of it, which a text is read and continued with.

    Args:
        model: any TransformerLens model.
        dictionaries: at least one, all under hook names of the model, each of another name.
        limits: how much is taken at once.

    Raises:
        ValueError: no dictionary, two of one name, or one that does not fit the model.
    """

    def __init__(self, model: HostModel, dictionaries: Sequence[Served], limits: LiveLimits = LiveLimits()):
        if not dictionaries:
            raise ValueError("No dictionary was given; the live page needs at least one.")
        self.model, self.tokenizer = model, tokenizer_of(model)
        self.dictionaries = {one.name: one for one in dictionaries}
        if len(self.dictionaries) < len(dictionaries):
            raise ValueError(f"Two dictionaries have one name: {', '.join(one.name for one in dictionaries)}.")
        self.limits = limits
        self.max_tokens = min(limits.tokens, limits_of(model)[0] or limits.tokens)
        self._special = set(special_token_ids(self.tokenizer))
        self._strengths: dict[Any, MatchedStrength] = {}
        for one in dictionaries:
            self._check_fit(one)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model takes conversations."""
        return bool(self.tokenizer.chat_template)

    def _check_fit(self, one: Served) -> None:
        try:
            self._read([one], "A word or two.", None)
            latent_directions(self.model, one.sae, 0)
        except ValueError as error:
            raise ValueError(f"The dictionary {one.name} does not fit the model: {error}") from error

    def dictionary(self, name: Any) -> Served:
        """A served dictionary; ValueError for a name that is none."""
        if not isinstance(name, str) or name not in self.dictionaries:
            raise ValueError(f"There is no dictionary {name!r:.60} here; there are {', '.join(self.dictionaries)}.")
        return self.dictionaries[name]

    # --- reading ---

    def read(
        self, prompt: Prompt, *, chat_template_options: Mapping[str, Any] | None = None
    ) -> dict[str, list[ReadToken]]:
        """What every dictionary says about each token of a text, by the dictionary's name, in one pass of the model.

        Args:
            prompt: what to read; a text, or a conversation, which the tokenizer's chat template writes.
            chat_template_options: passed to the template.

        Raises:
            ValueError: an empty text or message, one that is too long or that holds half a character, or a conversation
                without a template.
        """
        self.given(prompt, chat_template_options)
        return self._read(list(self.dictionaries.values()), prompt, chat_template_options)

    def given(self, prompt: Any, chat_template_options: Mapping[str, Any] | None = None) -> Asked:
        """The prompt as the model gets it; ValueError unless it is one that is neither empty nor too long."""
        name = "The text" if isinstance(prompt, str) else "The conversation"
        found = asked(self.tokenizer, prompt, options=chat_template_options, name=name)
        said = [found.prompt] if found.messages is None else [one["content"] for one in found.messages]
        if not all(text.strip() for text in said):
            what = f"{name} is" if found.messages is None else "A message is"
            raise ValueError(f"{what} empty; type or paste at least one word.")
        if (length := sum(map(len, said))) > self.limits.characters:
            raise ValueError(
                f"{name} has {length:,} characters, and at most {self.limits.characters:,} are taken; shorten it."
            )
        n = len(text_ids(self.model, found.text, templated=found.templated))
        if n > self.max_tokens:
            raise ValueError(f"{name} has {n:,} tokens, and at most {self.max_tokens:,} are taken; shorten it.")
        return found

    @torch.no_grad()
    def _read(
        self, dictionaries: list[Served], prompt: Prompt, options: Mapping[str, Any] | None
    ) -> dict[str, list[ReadToken]]:
        hooks = list(dict.fromkeys(str(one.sae.cfg.metadata.hook_name) for one in dictionaries))
        batch = read_texts(self.model, hooks, [prompt], positions="all", chat_template_options=options)
        texts = token_strings(self.tokenizer, batch.token_ids)
        special = [int(i) in self._special for i in batch.token_ids]
        found = {}
        for one in dictionaries:
            x = batch.activations[str(one.sae.cfg.metadata.hook_name)].to(one.sae.device)
            codes = encode_flat(one.sae, x)
            nowhere = [(None, None)] * len(x)
            places = nowhere if one.partition is None else zip(*map(Tensor.tolist, one.partition.assign(x)))
            found[one.name] = [
                ReadToken(
                    text=texts[row],
                    special=special[row],
                    latents=self._strongest(codes[row]),
                    region=region,
                    novelty=novelty,
                )
                for row, (region, novelty) in enumerate(places)
            ]
        return found

    def _strongest(self, codes: Tensor) -> tuple[ReadLatent, ...]:
        best = codes.abs().topk(min(self.limits.latents, len(codes))).indices.tolist()
        return tuple(ReadLatent(latent=i, value=float(codes[i])) for i in best if codes[i] != 0)

    # --- steering ---

    def steer(
        self,
        prompt: Prompt,
        changes: Sequence[LatentChange] = (),
        options: SamplingOptions = SamplingOptions(max_new_tokens=40),
        *,
        chat_template_options: Mapping[str, Any] | None = None,
    ) -> Iterator[SteeredSoFar]:
        """Continue a text twice from the same random numbers, as the model is and with latents changed, token by token.

        Latents are ablated first, then directions are added, at every token. Each steered latent is added so far that
        it alone moves the next token's prediction by its nats.

        Args:
            prompt: what is continued; a text, or a conversation, which is answered or whose last message, of the
                assistant, is gone on from.
            changes: the latents, of any of the dictionaries.
            options: how to sample.
            chat_template_options: passed to the chat template.

        Yields:
            Both continuations so far; a caller stops by asking for no more. The unsteered one is
            :func:`~saelens_ext.steering.sampling.sample_texts`'.

        Raises:
            ValueError: a prompt that :meth:`read` refuses, or a change or an option out of range; before anything is
                yielded.
        """
        given = self.given(prompt, chat_template_options)
        self.check_changes(changes, options)
        return self._steer(given, tuple(changes), options)

    def check_changes(self, changes: Sequence[LatentChange], options: SamplingOptions) -> None:
        """ValueError for a change or an option out of range."""
        limits = self.limits
        if options.max_new_tokens > limits.new_tokens:
            raise ValueError(f"At most {limits.new_tokens} new tokens are sampled, got {options.max_new_tokens}.")
        if len(changes) > limits.changes:
            raise ValueError(f"At most {limits.changes} latents are changed at once, got {len(changes)}; remove some.")
        for change in changes:
            one = self.dictionary(change.dictionary)
            latent = one.check(change.latent)
            if not -limits.nats <= change.nats <= limits.nats:
                raise ValueError(
                    f"{one.noun.capitalize()} {latent} can be steered to at most {limits.nats:g} nats along or against "
                    f"its direction, got {change.nats:g}."
                )
            if change.nats and not bool(latent_directions(self.model, one.sae, latent).directions.any()):
                raise ValueError(
                    f"{one.noun.capitalize()} {latent} of {one.name} has a direction of zeros and cannot be steered "
                    "with; remove it."
                )

    def _steer(
        self, given: Asked, changes: tuple[LatentChange, ...], options: SamplingOptions
    ) -> Iterator[SteeredSoFar]:
        strengths: list[MatchedStrength | None] = []
        for change in changes:
            if change.nats:
                yield SteeredSoFar(stage=f"finding the strength of {self._named(change)}")
            strengths.append(self._strength(given, change) if change.nats else None)
        ids = prompt_ids(self.model, given.text, templated=given.templated)
        pair = _Pair(self._drawings(ids, options), self._contexts(changes, strengths))
        more = True
        while more:
            more = pair.step(self.model)
            drawn = [drawing.drawn[0] for drawing in pair.drawings]
            said = [text_after(self.model, ids.tolist(), one.token_ids) for one in drawn]
            yield SteeredSoFar(
                stage="continuing" if more else "done",
                unsteered=said[0],
                steered=said[1],
                n_tokens=max(len(one.token_ids) for one in drawn),
                divergence=pair.divergence,
                strengths=tuple(strengths),
                done=not more,
            )

    def _named(self, change: LatentChange) -> str:
        return f"{self.dictionaries[change.dictionary].noun} {change.latent}"

    def _drawings(self, ids: Tensor, options: SamplingOptions) -> tuple[Drawing, Drawing]:
        first, second = (Drawing(self.model, ids, [0], options) for _ in range(2))
        return first, second

    def _strength(self, given: Asked, change: LatentChange) -> MatchedStrength:
        """The coefficient that has the divergence asked for on this prompt; remembered, since sliders move back."""
        key = (given.text, given.templated, change.dictionary, change.latent, change.nats)
        if key not in self._strengths:
            hook, direction, norm = latent_directions(
                self.model, self.dictionaries[change.dictionary].sae, change.latent
            )
            target, sign = abs(change.nats), 1 if change.nats > 0 else -1
            how: dict[str, Any] = {"signs": (sign,), "tolerance": TOLERANCE, "typical_norm": norm}
            how |= {"prompts": given.text, "templated": given.templated}
            found = match_strength(self.model, hook, direction, (target,), **how)
            if len(self._strengths) >= _REMEMBERED:
                self._strengths.clear()
            self._strengths[key] = found.at(sign, target)
        return self._strengths[key]

    def _contexts(
        self, changes: Sequence[LatentChange], strengths: Sequence[MatchedStrength | None]
    ) -> list[AbstractContextManager[Any]]:
        """The interventions, in the order in which they act."""
        ablated: dict[str, list[int]] = {}
        for change in changes:
            if change.ablate:
                ablated.setdefault(change.dictionary, []).append(change.latent)
        contexts: list[AbstractContextManager[Any]] = [
            scale_latent(self.model, self.dictionaries[name].sae, latents, 0) for name, latents in ablated.items()
        ]
        for change, strength in zip(changes, strengths, strict=True):
            if strength is not None:
                sae = self.dictionaries[change.dictionary].sae
                hook, direction, _ = latent_directions(self.model, sae, change.latent)
                contexts.append(add_direction(self.model, hook, direction, strength.coefficient))
        return contexts
