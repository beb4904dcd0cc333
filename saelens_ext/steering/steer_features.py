"""One continuation for each feature of a dictionary, all steered equally far.

A feature is a row of the directions given, such as a latent's. Equally far means by one divergence of the next token's
prediction, see :mod:`saelens_ext.steering.strength`. All continuations, the unsteered one included, are sampled with
the same random numbers, so that they differ by the steering alone. The strengths of all features are searched for
together, many to a forward pass, which is what makes a whole dictionary affordable.

t is the typical norm of the activations at the hook.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelens_ext import _files
from saelens_ext.host.chat_template import Prompt, in_words
from saelens_ext.host.models import HostModel
from saelens_ext.ops.modes import standard_modes
from saelens_ext.steering.divergence_search import MatchedStrength
from saelens_ext.steering.interventions import unit_rows
from saelens_ext.steering.sampling import SamplingOptions, sample_steered
from saelens_ext.steering.strength import match_strengths

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class SteeredText:
    """What one feature does to a prompt, at one sign."""

    feature: int
    """Row of the directions given."""
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
    """What was continued; of a conversation its roles and what each says."""
    target: float
    """Divergence of the next token's prediction that each was steered to, in nats."""
    unsteered: str
    """The continuation without steering, from the same random numbers."""
    texts: tuple[SteeredText, ...]
    """By feature, and for each by the signs asked for. A feature that is 0 has none."""

    def save(self, path: str | Path) -> Path:
        """Write everything as one JSON file."""
        path = Path(path)
        content = {"format_version": FORMAT_VERSION} | asdict(self)
        _files.write_json(path, content)
        return path


@standard_modes()
def steer_features(
    model: HostModel,
    hook_name: str,
    directions: Tensor,
    *,
    prompt: Prompt = "I think that",
    target: float | int = 0.25,
    features: Sequence[int] | None = None,
    signs: Sequence[int] = (1,),
    tolerance: float = 0.05,
    max_strength: float | int = 100.0,
    typical_norm: float | int | None = None,
    options: SamplingOptions = SamplingOptions(max_new_tokens=25),
    chat_template_options: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> SteeredFeatures:
    """Continue a prompt once for each direction, steered along it so far that the next token's prediction moves by
    ``target``.

    Args:
        model: any TransformerLens model.
        hook_name: where they are added.
        directions: the directions of features ``(m, d)``, one that is 0 left out; :func:`latent_directions` gives those
            of a dictionary, with the hook.
        prompt: what is continued, and where the divergence is measured: at its last position. A text, or a
            conversation as for :func:`sample_texts`.
        target: divergence from the unsteered prediction in nats, above 0.
        features: which of them, in [0, m); by default all.
        signs: +1 along a feature, -1 against it, or both.
        tolerance: largest ``|D / target - 1|`` that counts as reached, in (0, 1).
        max_strength: limit of the coefficient, in units of the typical norm.
        typical_norm: t; by default the median over the prompt's tokens.
        options: how to sample.
        chat_template_options: passed to the chat template of a conversation.
        batch_size: continuations per forward pass.
        progress: show a progress bar of the search, which takes most of the time.

    Returns:
        A strength for every feature and sign, and a continuation for those at which the target can be reached.

    Raises:
        ValueError: no such feature, or none that is not 0, an unknown hook, or an argument out of range as for
            :func:`~saelens_ext.steering.strength.match_strength`.

    Examples:
        >>> hook, directions, norm = sx.latent_directions(model, partition)
        >>> options = sx.SamplingOptions(max_new_tokens=3)
        >>> steered = sx.steer_features(model, hook, directions, features=[0, 1], target=0.05, options=options)
        >>> [text.feature for text in steered.texts]
        [0, 1]

    Source: arXiv 2506.10920, causal steering.
    """
    chosen = _checked_features(features, directions)
    rows = directions[chosen]
    asked: dict[str, Any] = {"chat_template_options": chat_template_options, "batch_size": batch_size}
    searches = match_strengths(
        model,
        hook_name,
        rows,
        (target,),
        prompts=prompt,
        signs=signs,
        tolerance=tolerance,
        max_strength=max_strength,
        typical_norm=typical_norm,
        progress=progress,
        **asked,
    )
    strengths = [
        (index, unit, strength)
        for index, unit, search in zip(chosen, unit_rows(rows), searches, strict=True)
        for strength in search.strengths
    ]
    reached = [(index, unit, strength) for index, unit, strength in strengths if strength.reached]
    offsets = [torch.zeros_like(rows[0]), *(unit * strength.coefficient for _, unit, strength in reached)]
    said = sample_steered(model, hook_name, torch.stack(offsets), prompt, n=1, options=options, **asked)
    unsteered, *texts = (text for ((text,),) in said)
    text_of = {(index, strength.sign): text for (index, _, strength), text in zip(reached, texts, strict=True)}
    return SteeredFeatures(
        hook_name=hook_name,
        prompt=in_words(prompt),
        target=float(target),
        unsteered=unsteered,
        texts=tuple(SteeredText(feature=i, strength=s, text=text_of.get((i, s.sign))) for i, _, s in strengths),
    )


def _checked_features(features: Sequence[int] | None, directions: Tensor) -> list[int]:
    """Those of the features that are not 0."""
    if not isinstance(directions, Tensor) or directions.ndim != 2:
        got = tuple(directions.shape) if isinstance(directions, Tensor) else f"a {type(directions).__name__}"
        raise ValueError(f"directions must be a tensor of shape (m, d), got {got}.")
    chosen = list(range(len(directions))) if features is None else [int(index) for index in features]
    wrong = [index for index in chosen if not 0 <= index < len(directions)]
    if wrong or not chosen:
        raise ValueError(f"features must be one or several of 0 to {len(directions) - 1}, got {wrong[:5] or chosen}.")
    alive = [index for index in chosen if bool(directions[index].any())]
    if not alive:
        raise ValueError(f"Every direction of the features {chosen[:5]} is zero: it points nowhere.")
    return alive
