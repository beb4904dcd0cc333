"""The modes of a prefix as the page shows them: members, distinguishing sources, and what their latents respond to."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from saelens_ext.analysis.labels import Labels
from saelens_ext.analysis.profile import DictionaryProfile
from saelens_ext.continuations.prefix_audit import PrefixAudit
from saelens_ext.continuations.validation.figures import decimals_of, fixed
from saelens_ext.host.tokens import token_strings
from saelens_ext.report.audit.wording import quoted, shortened
from saelens_ext.report.format import count, percentage, significant

N_EXEMPLARS = 5
"""Members shown of each mode before the fold, its medoid among them."""
N_LATENTS, N_OTHERS = 6, 4
"""Distinguishing latents and other sources shown of each mode; the rest of the ten where there are too few of one."""
N_EXAMPLES = 4
"""Examples shown of what a latent responds to."""
CONTEXT_REACH = 36
"""Characters of the prefix shown on either side of a source's token."""

_LAYER = re.compile(r"(?:blocks|layers|h)\.(\d+)\b")
_NOUNS = {"error": "error", "bias": "decoder bias", "mlp": "MLP output", "embedding": "token embedding"}


class Marked(NamedTuple):
    """A text with one part marked."""

    before: str
    mark: str
    after: str


@dataclass(frozen=True)
class Mode:
    """One mode."""

    number: int
    mark: int
    """Which of the page's marks stands for it."""
    n: str
    label: str
    """What it could be called; empty where nothing sets its continuations apart."""
    score: str
    """The label's held-out score in words."""
    sure: bool
    """Whether the label does better than chance."""
    at_floor: bool
    """Whether it is as small as the clustering allows."""
    share: str
    drawn: str
    """Fraction of the texts drawn; empty where it is not known."""
    percent: float
    medoid: SimpleNamespace
    exemplars: list[SimpleNamespace]
    members: list[SimpleNamespace]
    latents: list[SimpleNamespace]
    """Those that can be steered."""
    others: list[SimpleNamespace]
    """Errors, MLP outputs, biases, embeddings, and whatever a matrix of the user's has."""


N_MARKS = 8
"""Colours and shapes of modes; further ones pair them otherwise."""


def mark_of(mode: int) -> int:
    """Which mark stands for a mode: its colour is ``mark % 8``, its shape ``mark // 8``."""
    colour = mode % N_MARKS
    return colour + N_MARKS * ((colour + mode // N_MARKS) % N_MARKS)


def modes_of(audit: PrefixAudit, finder: "ExampleFinder", tokens: Sequence[str]) -> list[Mode]:
    """All modes of one prefix by falling weight; ``tokens`` are the prefix's, by position (:func:`prefix_tokens`)."""
    table = audit.modes()
    members, counts = _members(audit), audit.continuations.columns.get("count")
    found = []
    for row in table.to_dict("records"):
        cluster, weight = int(row["cluster"]), float(row["weight"])
        label = audit.mode_labels[cluster]
        latents, others = _sources(audit, cluster, finder, tokens, several=len(table) > 1)
        found.append(
            Mode(
                drawn="" if counts is None else percentage(float(counts[audit.labels == cluster].sum() / counts.sum())),
                number=cluster,
                mark=mark_of(cluster),
                n=count(int(row["n_members"])),
                label=quoted(label.text),
                score=label.score_text,
                sure=label.distinguishes,
                at_floor=bool(row["at_floor"]),
                share=percentage(weight),
                percent=round(100 * weight, 2),
                medoid=members[int(row["medoid"])],
                exemplars=[members[i] for i in audit.exemplary_members(cluster, N_EXEMPLARS)],
                members=[members[i] for i in _by_weight(audit, cluster)],
                latents=latents,
                others=others,
            )
        )
    return found


def weighs_draws(audit: PrefixAudit) -> bool:
    """Whether weights are fractions of the texts drawn, so that their sum over a mode estimates its probability."""
    counts = audit.continuations.columns.get("count")
    return counts is not None and torch.allclose(
        audit.continuations.weights.double(), counts.double() / counts.sum(), rtol=1e-6
    )


def _by_weight(audit: PrefixAudit, cluster: int) -> list[int]:
    rows = np.flatnonzero(audit.labels == cluster)
    weights, scores = audit.continuations.weights.numpy(), audit.continuations.total_log_probs.numpy()
    return sorted(rows.tolist(), key=lambda i: (-weights[i], -scores[i], i))


def _members(audit: PrefixAudit) -> list[SimpleNamespace]:
    rows = audit.continuations
    counts = rows.columns.get("count")
    return [
        SimpleNamespace(
            row=i,
            text=quoted(rows.texts[i]),
            weight=percentage(float(rows.weights[i])),
            log_prob=fixed(float(rows.total_log_probs[i]), 1),
            n_tokens=count(int(rows.lengths[i])),
            seen="" if counts is None or int(counts[i]) < 2 else count(int(counts[i])),
        )
        for i in range(len(rows))
    ]


# --- sources ---


def prefix_tokens(audit: PrefixAudit, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """The prefix's tokens by position, from the tokenizer or else as far as the sources name them."""
    ids = audit.continuations.prefix_ids
    if tokenizer is not None:
        return token_strings(tokenizer, list(ids))
    tokens, sources = [""] * len(ids), audit.continuations.sources
    for position, token in () if sources is None else zip(sources.positions, sources.tokens, strict=True):
        if 0 <= position < len(tokens):
            tokens[position] = token
    return tokens


def _sources(
    audit: PrefixAudit, cluster: int, finder: "ExampleFinder", tokens: Sequence[str], *, several: bool
) -> tuple[list[SimpleNamespace], list[SimpleNamespace]]:
    """The latents and the other sources that set a mode apart, each by falling size; bars of both on one scale."""
    table = audit.distinguishing_sources(cluster, audit.continuations.both_views()[1].shape[1])
    table["value"] = table["difference"] if several else table["effect"]
    is_latent = table["kind"] == "latent" if "kind" in table else np.zeros(len(table), dtype=bool)
    latents, others = table[is_latent], table[~is_latent]
    n_latents = max(N_LATENTS, N_LATENTS + N_OTHERS - len(others))
    n_others = max(N_OTHERS, N_LATENTS + N_OTHERS - len(latents))
    shown = [latents.head(n_latents), others.head(n_others)]
    largest = max((float(part["value"].abs().max()) for part in shown if len(part)), default=0.0) or 1.0
    decimals = decimals_of(*(x for part in shown for name in ("effect", "elsewhere") for x in part[name]))
    first, second = (
        [_source_row(cast(Any, row), largest, decimals, finder, tokens) for row in part.to_dict("records")]
        for part in shown
    )
    return first, second


def _source_row(
    row: Mapping[str, Any], largest: float, decimals: int, finder: "ExampleFinder", tokens: Sequence[str]
) -> SimpleNamespace:
    value = float(row["value"])
    hook, position = str(row.get("hook", "")), int(row.get("position", -1))
    layer = _LAYER.search(hook)
    return SimpleNamespace(
        name=_source_name(row),
        layer=layer.group(1) if layer else "",
        hook=hook,
        position=str(position) if position >= 0 else "",
        context=_context(tokens, position),
        effect=fixed(row["effect"], decimals, plus=True),
        elsewhere=fixed(row["elsewhere"], decimals, plus=True),
        difference=fixed(value, decimals, plus=True),
        is_positive=value > 0,
        bar=round(100 * abs(value) / largest, 1),
        t=fixed(row["t"], 1, plus=True) if np.isfinite(row["t"]) else "",
        responds=finder.of(hook, int(row.get("dictionary", -1)), int(row.get("latent", -1)))
        if row.get("kind") == "latent"
        else None,
    )


def _source_name(row: Mapping[str, Any]) -> str:
    kind = row.get("kind")
    if kind is None:
        return f"source {row['source']}"
    return f"latent {row['latent']}" if kind == "latent" else _NOUNS.get(str(kind), quoted(str(kind)))


def _context(tokens: Sequence[str], position: int) -> Marked | None:
    if not 0 <= position < len(tokens):
        return None
    before, after = quoted("".join(tokens[:position])), quoted("".join(tokens[position + 1 :]))
    cut_before, cut_after = len(before) > CONTEXT_REACH, len(after) > CONTEXT_REACH
    return Marked(
        ("…" + before[-CONTEXT_REACH:]) if cut_before else before,
        token_label(tokens[position]),
        (after[:CONTEXT_REACH] + "…") if cut_after else after,
    )


def token_label(token: str, longest: int = 80) -> str:
    """A marked token: its spaces shown where there is nothing else."""
    text = quoted(token)
    if not text.strip():
        text = "␣" * min(len(text), 8) or "∅"
    return shortened(text, longest)


class ExampleFinder:
    """Looks up what a latent responds to, in the profiles and labels that there are.

    Both are by the hook that the dictionary reads or writes at, under any of its names; ``hooks`` are those of the
    audit's dictionaries, in their order. Profiles need the model's tokenizer.
    """

    def __init__(
        self,
        profiles: Mapping[str, DictionaryProfile] | None,
        tokenizer: PreTrainedTokenizerBase | None,
        hooks: Sequence[str],
        labels: Mapping[str, Labels] | None = None,
    ) -> None:
        self._known: dict[str, tuple[DictionaryProfile, Labels | None]] = {}
        for key, profile in (profiles or {}).items():
            names = (key, profile.hook_name, *profile.hook_aliases)
            own = next((labels[name] for name in names if labels and name in labels), None)
            if own is not None:
                own.check_belongs(profile)
            for name in names:
                self._known.setdefault(name, (profile, own))
        self._tokenizer, self._hooks = tokenizer, hooks

    def of(self, hook: str, dictionary: int, latent: int) -> SimpleNamespace | None:
        """What is known of a latent; None where no profile is of its hook, or the profile has no such latent."""
        read_at = self._hooks[dictionary] if 0 <= dictionary < len(self._hooks) else hook
        profile, labels = self._known.get(hook) or self._known.get(read_at) or (None, None)
        if profile is None or not 0 <= latent < profile.d_sae:
            return None
        label = None if labels is None or not labels.texts[latent] else labels[latent]
        rate = int(profile.counts[latent]) / max(1, profile.n_activations)
        return SimpleNamespace(
            label="" if label is None else quoted(label.text),
            score="" if label is None else label.score_text,
            rate=f"{percentage(rate)} of {count(profile.n_activations)} activations profiled",
            heading="Strongest tokens, each after its activation"
            if profile.coherence is None
            else "Nearest tokens, each after its cosine distance",
            examples=self._examples(profile, latent),
        )

    def _examples(self, profile: DictionaryProfile, latent: int) -> list[SimpleNamespace]:
        places = (profile.top.positions[latent] >= 0).nonzero().flatten()[:N_EXAMPLES].tolist()
        return [
            SimpleNamespace(
                value=significant(float(f"{float(profile.top.values[latent, i]):.3g}")),
                text=self._text(profile.top.contexts[latent, i]),
            )
            for i in places
        ]

    def _text(self, context: torch.Tensor) -> Marked:
        middle = len(context) // 2
        before, after = context[:middle], context[middle + 1 :]
        parts = [self._strings(ids[ids >= 0]) for ids in (before, context[middle : middle + 1], after)]
        return Marked(quoted("".join(parts[0])), token_label("".join(parts[1])), quoted("".join(parts[2])))

    def _strings(self, ids: torch.Tensor) -> list[str]:
        assert self._tokenizer is not None  # the report refuses profiles without one
        # A vocabulary can hold tokens of thousands of characters.
        return [text if len(text) <= 80 else text[:40] + "…" for text in token_strings(self._tokenizer, ids)]
