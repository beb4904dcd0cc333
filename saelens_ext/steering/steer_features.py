"""One continuation for each feature of a dictionary, all steered equally far.

Equally far means by one divergence of the next token's prediction, see :mod:`saelens_ext.steering.strength`. All
continuations, the unsteered one included, are sampled with the same random numbers, so that they differ by the
steering alone. The strengths of all features are searched for together, many to a forward pass, which is what makes a
whole dictionary affordable; for one direction with several targets or prompts there is
:func:`~saelens_ext.steering.strength.match_strength`, which runs the same search.

t is the typical norm of the activations at the hook.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from saelens_ext import _checks, _files
from saelens_ext._modes import standard_modes
from saelens_ext.host.bos import text_start, warn_of_other_bos
from saelens_ext.host.continued_text import text_after
from saelens_ext.host.flat_sae import hooks_of, latent_indices
from saelens_ext.host.hook_edits import edit_point, hooked
from saelens_ext.host.models import HostModel
from saelens_ext.host.prompt_passes import evaluating, prompt_ids
from saelens_ext.steering.divergence_search import (
    DivergenceMeter,
    DivergenceSearch,
    MatchedStrength,
    adding_rows,
    check_limits,
    checked_signs,
)
from saelens_ext.steering.sampling import SamplingOptions, draw_continuations

FORMAT_VERSION = 1


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
        model: any TransformerLens model.
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
    chosen = latent_indices(sae, features)
    check_limits(target, tolerance, max_strength, batch_size)
    signs = checked_signs(signs)
    units = torch.nn.functional.normalize(_checks.finite(sae.W_dec.detach(), "W_dec").float(), dim=1)
    pairs = [(index, sign) for index in chosen if bool(units[index].any()) for sign in signs]
    rows = torch.stack([sign * units[index] for index, sign in pairs]) if pairs else units[:0]
    with evaluating(model), tqdm(desc="matching strengths", unit="row", disable=not progress) as bar:
        meter = DivergenceMeter(model, hook_name, rows, [prompt], batch_size, on_rows=bar.update)
        # A transcoder's is of what it reads.
        recorded = sae.cfg.metadata.typical_norm if hook_name == read else None
        norm = next(value for value in (typical_norm, recorded, meter.typical_norm) if value is not None)
        _checks.between(norm, 0, math.inf, "typical_norm")
        search = DivergenceSearch(meter.divergences, [sign for _, sign in pairs])
        limit = norm * max_strength
        matched = search.run([float(target)], tolerance, norm=norm, limit=limit, batch_size=batch_size)
    strengths = [(index, strength) for (index, _), strength in zip(pairs, matched, strict=True)]
    reached = [(index, strength) for index, strength in strengths if strength.reached]
    offsets = [torch.zeros_like(units[0]), *(units[index] * strength.coefficient for index, strength in reached)]
    unsteered, *texts = _continue_each(model, hook_name, prompt, offsets, options, batch_size)
    text_of = {(index, strength.sign): text for (index, strength), text in zip(reached, texts, strict=True)}
    return SteeredFeatures(
        hook_name=hook_name,
        prompt=prompt,
        target=float(target),
        unsteered=unsteered,
        texts=tuple(SteeredText(feature=i, strength=s, text=text_of.get((i, s.sign))) for i, s in strengths),
    )


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
            with hooked(model, [(point, adding_rows(rows, hook_name))]):
                drawn = draw_continuations(model, ids, [0] * len(rows), options)
            texts += [text_after(model, ids.tolist(), one.token_ids) for one in drawn]
    return texts
