"""Which regions of a dictionary hold the prompts that bring a behaviour about.

Symbols
    N       activations of the build prompts in a region; coherence: length of the mean of their unit directions
    members choose prompts whose last position is in the region
    rate    mean verdict over members
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from sae_lens import SAE
from scipy import stats
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.concepts.token_activations import read_texts
from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from saelens_ext.evals.behaviour.behaviour import OpeningOdds, PromptSplit
from saelens_ext.evals.behaviour.passes import Asking, Verdict, given_verdicts
from saelens_ext.host.chat_template import in_words
from saelens_ext.host.flat_sae import encode_flat, hooks_of
from saelens_ext.host.models import HostModel, describe_model
from saelens_ext.ops.modes import standard_modes
from saelens_ext.ops.precision import wide
from saelens_ext.ops.spherical import unit_directions
from saelens_ext.ops.statistics import holm
from saelens_ext.steering.behaviour import Behaviour

NO_REGION = -1


class Candidate(NamedTuple):
    """A region that may hold the behaviour."""

    region: int
    members: int
    rate: float
    p: float
    """Fisher's exact test, one-sided, of its members against all other prompts."""
    p_holm: float
    """Corrected over all regions with enough members."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Localisation:
    """Where a behaviour may live: candidates, and what was measured of every region. There may be no candidate."""

    candidates: tuple[Candidate, ...]
    """The best first, by rate times members."""
    regions: pd.DataFrame
    """Every region: region, n (N), coherence, members, shown (members that show the behaviour), rate, p, p_holm."""
    prompts: pd.DataFrame
    """Every prompt of ``choose``: prompt (of a conversation its roles and what each says), region (-1: none), shown,
    odds, text."""
    dictionary: SAE[Any]
    difference: Tensor
    """Mean of the last positions of prompts that show the behaviour minus that of the others, where the dictionary
    writes, ``(d,)``."""
    lacking: Tensor
    """Mean of the last positions of prompts that do not show the behaviour, there, ``(d,)``."""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def center(self) -> Tensor:
        """c, where the dictionary writes, ``(d,)``."""
        return center_of(self.dictionary)

    def claim(self) -> str:
        """What was found, in words; a candidate counts where its corrected p-value is below .05."""
        n, shown = len(self.prompts), int((self.prompts["shown"] >= 0.5).sum())
        start = f"{shown} of {n} prompts show the behaviour."
        if not self.candidates:
            return (
                f"{start} No region has {self.settings['min_members']} of them as members and shows it at a rate of "
                f"{self.settings['min_rate']:g}: nothing suggests a region for it."
            )
        texts = [
            f"region {one.region} ({one.rate:.0%} of {one.members} members, corrected p = {one.p_holm:.2g}"
            f"{'' if one.p_holm < 0.05 else ', which is not a claim'})"
            for one in self.candidates
        ]
        return f"{start} They gather in {', '.join(texts)}."

    def summary(self) -> pd.DataFrame:
        """The candidates as a table."""
        return pd.DataFrame(self.candidates, columns=list(Candidate._fields))


@standard_modes(gradients=False)
def localise_behaviour(
    model: HostModel,
    dictionary: SAE[Any],
    split: PromptSplit,
    behaviour: Behaviour | OpeningOdds,
    *,
    chat_template: bool = True,
    chat_template_options: Mapping[str, Any] | None = None,
    max_new_tokens: int = 60,
    min_members: int = 5,
    min_rate: float | int = 0.3,
    n_candidates: int = 5,
    asked: pd.DataFrame | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Localisation:
    """Find the regions whose members, prompts by their last position, show a behaviour more often than others do.

    Args:
        model: any TransformerLens model.
        dictionary: an `ExemplarPartition`, best fitted to ``split.build``; or any SAELens SAE or transcoder, whose
            regions are then its latents: a prompt belongs to the strongest one.
        split: prompts; ``build`` gives the regions' sizes and ``choose`` is asked here.
        behaviour: judges greedy answers, or `OpeningOdds`.
        chat_template: make each text a user's message; conversations are written by the template in any case.
        chat_template_options: passed to the chat template, for example ``{"enable_thinking": False}``.
        max_new_tokens: of an answer.
        min_members: prompts that a candidate must have.
        min_rate: rate that it must have, in (0, 1].
        n_candidates: candidates at most.
        asked: what :func:`~saelens_ext.evals.behaviour.passes.measure_behaviour` gave for ``split.choose`` with the
            same behaviour and options, where they were asked already, or a table of your own labels: prompt and shown,
            in [0, 1]. By default they are asked here.
        batch_size: answers in a forward pass.
        progress: show a progress bar.

    Returns:
        Candidates, which may be none, ranked by rate times members, with Fisher's exact test of each against all other
        prompts, corrected over all regions with enough members.

    Raises:
        ValueError: the behaviour is shown by all or none of ``choose``, no chat template, a prompt that is too long, a
            dictionary without a hook, an option out of range, or ``asked`` of other prompts than ``split.choose``.

    Examples:
        >>> ask = [f"The cat number {i} sat down." for i in range(20)]
        >>> split = sx.PromptSplit(build=ask[:8], choose=ask[8:14], test=ask[14:])
        >>> sides = {"shows": [" and"], "lacks": [" or"]}
        >>> odds = sx.measure_behaviour(model, split.choose, sx.OpeningOdds(**sides), chat_template=False)["odds"]
        >>> odds = sx.OpeningOdds(**sides, threshold=odds.median())
        >>> found = sx.localise_behaviour(model, partition, split, odds, chat_template=False, min_members=1)
        >>> found.claim().startswith("3 of 6 prompts show the behaviour.")
        True

    Source: arXiv 2605.14347, refusal localisation, which has neither held-out prompts nor tests.
    """
    _checks.between(min_rate, 0, 1, "min_rate", closed_high=True)
    for value, name in ((min_members, "min_members"), (n_candidates, "n_candidates")):
        _checks.positive(value, name)
    template: dict[str, Any] = {"chat_template": chat_template, "chat_template_options": chat_template_options}
    asking = Asking(
        model=model, behaviour=behaviour, max_new_tokens=max_new_tokens, batch_size=batch_size, **template
    )  # fmt: skip
    given = None if asked is None else given_verdicts(asked, split.choose, "split.choose")
    read, write = hooks_of(dictionary)
    last = read_texts(model, list({read: 0, write: 0}), split.choose, positions="last", **template)
    verdicts = asking.ask(split.choose, progress=progress)[0] if given is None else given
    check_both_shown(verdicts)
    built = read_texts(model, read, split.build, **template).activations[read]
    settings = {"min_members": min_members, "min_rate": min_rate, "n_candidates": n_candidates}
    found = localise_read(dictionary, built, last.activations[read], last.activations[write], verdicts, **settings)
    options = template | {"max_new_tokens": max_new_tokens, "model": describe_model(model)}
    options |= {"hook_name": read, "hook_name_out": write, "n_prompts": split.sizes()}
    table = found.prompts.assign(prompt=list(map(in_words, split.choose)))
    return replace(found, prompts=table, settings=found.settings | options)


def check_both_shown(verdicts: Sequence[Verdict]) -> None:
    """Raise ValueError unless some of the prompts show the behaviour and some do not."""
    shown = np.array([verdict.shown for verdict in verdicts])
    known = shown[~np.isnan(shown)]
    n_shown = int((known >= 0.5).sum())
    if 0 < n_shown < len(known):
        return
    rates = f"{n_shown / len(known):.0%} show it, {1 - n_shown / len(known):.0%} do not" if len(known) else "no verdict"
    raise ValueError(
        f"The behaviour is {'never' if n_shown == 0 else 'always'} shown by the {len(shown)} prompts of choose "
        f"({rates}), so no region can be told from the rest. Give prompts of both kinds; or, where the model does not "
        "differ in words, measure how near it is with OpeningOdds and a threshold between its values."
    )


def localise_read(
    dictionary: SAE[Any],
    built: Tensor,
    last: Tensor,
    last_out: Tensor,
    verdicts: Sequence[Verdict],
    *,
    min_members: int,
    min_rate: float | int,
    n_candidates: int,
) -> Localisation:
    """:func:`localise_behaviour` from activations that were read.

    Args:
        dictionary: see there.
        built: activations of the build prompts where the dictionary reads, ``(n, d_in)``.
        last: those of the last positions of the choose prompts, ``(m, d_in)``.
        last_out: the same where the dictionary writes, ``(m, d)``.
        verdicts: on the choose prompts, m of them.
        min_members: see there, and likewise ``min_rate`` and ``n_candidates``.
    """
    shown = np.array([verdict.shown for verdict in verdicts], dtype=np.float64)
    regions = assign_regions(dictionary, last)
    table = _sizes(dictionary, built).merge(_shown_by_region(regions, shown, min_members), on="region", how="left")
    table[["members", "shown"]] = table[["members", "shown"]].fillna(0).astype(int)
    able = table[(table["members"] >= min_members) & (table["rate"] >= min_rate)]
    ranked = able.assign(score=able["rate"] * able["members"]).sort_values("score", ascending=False, kind="stable")
    rows = ranked[list(Candidate._fields)].head(n_candidates).itertuples(index=False)
    is_shown = torch.from_numpy(shown >= 0.5).to(last_out.device)
    known = torch.from_numpy(~np.isnan(shown)).to(last_out.device)
    rows_of = [wide(last_out[side]).mean(dim=0) for side in (known & is_shown, known & ~is_shown)]
    return Localisation(
        candidates=tuple(Candidate(int(r[0]), int(r[1]), *map(float, r[2:])) for r in rows),
        regions=table,
        prompts=pd.DataFrame(
            {
                "region": regions,
                "shown": shown,
                "odds": [verdict.odds for verdict in verdicts],
                "text": [verdict.text for verdict in verdicts],
            }
        ),
        dictionary=dictionary,
        difference=(rows_of[0] - rows_of[1]).to(torch.promote_types(last_out.dtype, torch.float32)),
        lacking=rows_of[1].float(),
        settings={"min_members": min_members, "min_rate": float(min_rate), "n_candidates": n_candidates},
    )


def center_of(dictionary: SAE[Any]) -> Tensor:
    """Where a dictionary's directions start, at the hook that it writes to; 0 where its input is normalised."""
    center = dictionary.b_dec.detach().to(torch.promote_types(dictionary.b_dec.dtype, torch.float32))
    return center if dictionary.cfg.normalize_activations == "none" else torch.zeros_like(center)


def assign_regions(dictionary: SAE[Any], x: Tensor) -> np.ndarray:
    """The region of each activation: the nearest exemplar, or the strongest latent (-1 where none is active)."""
    x = x.to(dictionary.W_dec.device)
    if isinstance(dictionary, ExemplarPartition):
        return dictionary.assign(x).regions.numpy(force=True)
    strengths, latents = zip(
        *(encode_flat(dictionary, rows.to(dictionary.dtype)).max(dim=-1) for rows in x.split(4096))
    )
    return torch.where(torch.cat(strengths) > 0, torch.cat(latents), NO_REGION).numpy(force=True)


def _sizes(dictionary: SAE[Any], built: Tensor) -> pd.DataFrame:
    """N and coherence of every region."""
    k = int(dictionary.cfg.d_sae)
    regions = torch.from_numpy(assign_regions(dictionary, built))
    same_space = dictionary.b_dec.shape[0] == built.shape[1]  # a transcoder's lies where it writes
    origin = center_of(dictionary).to(built.device) if same_space else built.float().mean(dim=0)
    units = wide(unit_directions(built, origin)[0].cpu())
    has = regions >= 0
    counts = torch.bincount(regions[has], minlength=k)
    sums = units.new_zeros(k, units.shape[1]).index_add(0, regions[has], units[has])
    coherence = (sums.norm(dim=1) / counts).numpy(force=True)
    return pd.DataFrame({"region": range(k), "n": counts.numpy(force=True), "coherence": coherence})


def _shown_by_region(regions: np.ndarray, shown: np.ndarray, min_members: int) -> pd.DataFrame:
    """Members with a verdict, how many show the behaviour, their rate, and the test against all other prompts."""
    known = ~np.isnan(shown)
    regions, shown = regions[known], shown[known]
    total, n = int((shown >= 0.5).sum()), len(shown)
    rows = []
    for region in np.unique(regions[regions >= 0]):
        own = shown[regions == region]
        k, m = int((own >= 0.5).sum()), len(own)
        p = np.nan
        if m >= min_members:
            result: Any = stats.fisher_exact([[k, m - k], [total - k, n - m - total + k]], alternative="greater")
            p = float(result.pvalue)
        rows.append((int(region), m, k, float(own.mean()), p))
    table = pd.DataFrame(rows, columns=["region", "members", "shown", "rate", "p"])
    return table.assign(p_holm=holm(table["p"].to_numpy(dtype=np.float64)))
