"""What a sampler is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from saelens_ext.steering.sampling import SamplingOptions


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One continuation that a sampler gives, with what it knows of it."""

    text: str
    """Without the prefix, with its leading space."""
    token_ids: Sequence[int] | None = None
    """Its tokens in the sampler's vocabulary. They are used where they read as the text in that of the model."""
    tokens: Sequence[str] | None = None
    """The texts of its tokens, in their order."""
    log_probs: Sequence[float | None] | None = None
    """Log-probabilities of its tokens in nats; there may be fewer than tokens, and None is unknown."""
    ended_by: str = "length"
    """Why it ended, in the sampler's words."""
    prompt_tokens: int | None = None
    """How many tokens the sampler read as the prefix."""


@runtime_checkable
class Sampler(Protocol):
    """Where continuations come from; :func:`sample_continuations` scores their texts with the model.

    :class:`EndpointSampler` and :class:`HuggingFaceSampler` are samplers, and any object with these methods.
    """

    def draw(
        self,
        prefix: str,
        prefix_ids: Sequence[int],
        numbers: Sequence[int],
        options: SamplingOptions,
        stop: Sequence[str],
    ) -> Sequence[Draw]:
        """Continuations of a prefix.

        Args:
            prefix: the text that the model's tokenizer, with the special tokens that it adds, turns into
                ``prefix_ids``; a conversation as the chat template wrote it.
            prefix_ids: what the model reads as the prefix.
            numbers: which draws, as many as there are numbers. The same number of the same prefix should be the same
                draw again, as far as the sampler can.
            options: temperature, top-p, the most tokens, and the seed.
            stop: texts that end a continuation.

        Returns:
            One draw for each number, in order; some of the first where there are no more, at least one.
        """
        ...

    def describe(self) -> Mapping[str, Any]:
        """What the sampler is, JSON-safe and without secrets; a stored audit is reused only with the same."""
        ...
