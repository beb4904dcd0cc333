"""The mechanistic view: what in the prefix made each continuation likely, as one signature per continuation.

An entry of a signature is  <gradient of the continuation's target at a hook and position, the source's vector there>:
for a latent, how much its activation adds to the mean demeaned logit of the continuation's tokens, by the rules of
the backend (`frozen_model`). The gradient is linear in the target, so one backward pass per batch of
continuations gives every entry for all of its tokens at once.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from saelens_ext import _checks
from saelens_ext.continuations.attribution.columns import by_kind, fixed_columns, known_sources
from saelens_ext.continuations.attribution.completeness import (
    Completeness,
    check_linear,
    measure_completeness,
    rounding,
)
from saelens_ext.continuations.attribution.frozen_model import Trace, traced
from saelens_ext.continuations.attribution.gradients import Passes
from saelens_ext.continuations.attribution.shown import check_backend, runs_in_chunks
from saelens_ext.continuations.attribution.sites import (
    BACKENDS,
    Refusal,
    Site,
    base_sites,
    dictionary_sites,
    plan_sites,
)
from saelens_ext.continuations.attribution.sources import PrefixPass, SiteSources, read_prefix, sources_of
from saelens_ext.continuations.attribution.target import OBSERVABLE, Target, check_target
from saelens_ext.continuations.continuation_set import PADDING, ContinuationSet
from saelens_ext.continuations.source_table import KINDS, SourceTable
from saelens_ext.host.bos import warn_of_other_bos
from saelens_ext.host.flat_sae import dictionaries_of
from saelens_ext.host.models import HostModel, tokenizer_of
from saelens_ext.host.prompt_passes import device_of, length_batches, position_chunks
from saelens_ext.host.tokens import special_token_ids, token_strings
from saelens_ext.ops.largest_entries import largest_entries
from saelens_ext.ops.memory import memory_for
from saelens_ext.ops.modes import out_of_inference, standard_modes

logger = logging.getLogger(__name__)

_DEFAULT_KINDS = ("latent", "error", "mlp", "embedding")


@standard_modes(model_too=True)
def attribute_continuations(
    model: HostModel,
    dictionaries: SAE[Any] | Sequence[SAE[Any]],
    continuations: ContinuationSet,
    *,
    backend: str = "linear",
    target: str | Tensor = "mean",
    sources: SourceTable | None = None,
    max_sources: int = 4096,
    kinds: Sequence[str] = _DEFAULT_KINDS,
    special_positions: bool = False,
    batch_size: int = 16,
    max_bytes: int = 2**30,
    verify: bool = True,
    progress: bool = False,
) -> ContinuationSet:
    """Give each continuation its attribution signature over the sources of the prefix.

    With dictionaries of MLP outputs, neurons, attention outputs or with transcoders, the sources are their latents,
    error nodes and decoder biases, the outputs of the other MLPs, and the embeddings. A dictionary on the residual
    stream takes the place of everything below it, embeddings included. Of several such dictionaries the one nearest to
    the output does; the others are attributed all the same (see `sites`).

    Args:
        model: any TransformerLens model, no SAE attached.
        dictionaries: SAELens SAEs and transcoders at their own hooks, any number, none included.
        continuations: from ``sample_continuations`` or ``score_continuations`` with this model.
        backend: ``"linear"``: direct effects through frozen attention patterns, norm scales and MLPs. ``"gradient"``:
            activation times gradient of the real model. ``"relp"``: the same with relevance rules.
        target: over a continuation's tokens, the ``"mean"`` or ``"sum"`` of their demeaned logits, or that of the
            ``"first"``. A sum makes length an axis of its own. Where answers are marked (:func:`mark_answers`), over
            the answer's tokens. A tensor ``(d_vocab,)`` asks about an observable
            instead: that weighted sum of the logits (its mean weight subtracted), averaged over the positions that
            predict the continuation's tokens; for example 1 / m for each of m tokens of a class and 0 elsewhere.
        sources: attribute to exactly these columns, in this order, instead of those with the largest effect; 0 where a
            latent is not active in this prefix. ``ContinuationSet.sources`` of another set: its own draws, other
            draws of the prefix, or a prefix that differs in single tokens.
        max_sources: columns at most: those with the largest mean absolute effect over the whole set. Without effect
            where ``sources`` are given.
        kinds: which kinds of sources may be columns: ``"latent"``, ``"error"``, ``"bias"`` (a dictionary's decoder
            bias), ``"mlp"`` (an MLP without dictionary; linear backend), ``"embedding"``.
        special_positions: let sources at BOS and other special tokens be columns too; they are when the prefix has no
            other token.
        batch_size: continuations per forward and backward pass, at most. Longer ones are fewer at a time, so that
            prefix and continuations of a pass have no more than 4096 tokens in all, nor more than 2^20 pairs of tokens
            in an attention pattern. One that has more by itself (above 1024 tokens with its prefix) is taken in chunks
            of positions, which gives the same up to rounding in a pass more. So neither the number of continuations nor
            their length makes a pass larger: what grows with a length are its keys and values and their gradients.
            Hooks of your own, and models without a KV cache, keep a continuation whole.
        max_bytes: memory for sources and signatures; a dictionary with more active latents than fit loses the weakest.
        verify: on the first two continuations, check that the sources add up to the target, for the backends where
            they must (``"linear"``, ``"relp"``).
        progress: show a bar.

    Returns:
        The set with ``signatures`` (float32, in units of logits), ``sources`` in the order of hooks and positions, and
        the columns ``target``, ``prefix_effect`` and ``continuation_effect``: the target, and the sums over ALL sources
        of the cut at the prefix and at the continuation's own tokens. For the linear backend target minus both is
        what the model's biases give. ``metadata["attribution"]`` says what fraction of the absolute effect is in the
        columns (``share_of_effect``), what fraction each kind of source has, other columns included
        (``share_by_kind``), and the mean over continuations of each kind's signed sum (``sum_by_kind``), which with the
        linear backend, all kinds and ``special_positions`` add up to the mean of ``prefix_effect``. With the other
        backends an effect that runs from an embedding through a latent is counted at both, and ``kinds_overlap`` says
        so.

    Raises:
        ValueError: an unknown option; a dictionary at a hook that the model lacks or of another width; two
            dictionaries at one hook; a prefix that does not fit the context; a model on which what the backend freezes
            does not stay frozen, or dictionaries that its paths do not lead on from, naming the backends that were
            found to work here; no source of the kinds wanted; ``sources`` that these dictionaries, this backend or this
            prefix do not have; a target of another size than the vocabulary.

    Source: arXiv 2606.08236, attribution signatures, with targets read at the position that predicts each token.
    """
    _checks.choice(backend, BACKENDS, "backend")
    check_target(target, model)
    for kind in kinds:
        _checks.choice(kind, KINDS, "kinds")
    for value, name in ((max_sources, "max_sources"), (batch_size, "batch_size"), (max_bytes, "max_bytes")):
        _checks.positive(value, name)
    saes = dictionaries_of(dictionaries)
    for sae in saes:
        starts = continuations.metadata.get("prepend_bos")
        warn_of_other_bos(sae.cfg.metadata.get("prepend_bos"), starts, "these continuations' prefixes")
    with _naming_what_remains(model, saes, continuations, backend, target):
        run = _Run.of(model, saes, continuations, backend, target)
        if verify:
            run.check(range(min(2, len(continuations))))
        wanted = None if sources is None else run.known(sources)
        parts = run.sources(kinds, special_positions, max_bytes, wanted)
        effects, columns = run.effects(parts, batch_size, progress)
    strength = effects.abs().sum(dim=0)
    table = SourceTable.joined([part.table(run.tokens) for part in parts])
    if wanted is None:
        chosen = largest_entries(strength, min(max_sources, len(strength))).sort().values
        signatures, table = effects[:, chosen], table.select(chosen.tolist())
    else:
        signatures, table = fixed_columns(effects, table, wanted)
    fraction = float(signatures.abs().sum()) / (float(strength.sum()) or 1.0)
    logger.info("%d of %d sources: %.1f %% of the absolute effect", len(table), len(strength), 100 * fraction)
    named = target if isinstance(target, str) else OBSERVABLE
    described = {"backend": backend, "target": named, "n_sources": len(strength), "share_of_effect": fraction}
    described |= by_kind(parts, effects, backend)
    attributed = continuations.with_signatures(signatures, table).with_columns(columns)
    described |= {"cut": [site.hook for site in run.sites if site.in_cut]}
    return replace(attributed, metadata={**attributed.metadata, "attribution": described})


@standard_modes(model_too=True)
def attribution_completeness(
    model: HostModel,
    dictionaries: SAE[Any] | Sequence[SAE[Any]],
    continuations: ContinuationSet,
    *,
    target: str | Tensor = "mean",
    batch_size: int = 16,
) -> Completeness:
    """Take the target of every continuation apart with the linear backend, biases measured on their own.

    Arguments and errors are those of :func:`attribute_continuations`.

    Returns:
        Target, prefix, continuation and bias parts; their :attr:`Completeness.gap` is rounding on a model that the
        linear backend is right for.
    """
    check_target(target, model)
    _checks.positive(batch_size, "batch_size")
    saes = dictionaries_of(dictionaries)
    with _naming_what_remains(model, saes, continuations, "linear", target):
        run = _Run.of(model, saes, continuations, "linear", target)
        return run.completeness(range(len(continuations)), batch_size)


@dataclass(frozen=True)
class _Run:
    model: HostModel
    saes: list[SAE[Any]]
    continuations: ContinuationSet
    backend: str
    target: Target
    prefix: PrefixPass
    sites: list[Site]

    @classmethod
    def of(
        cls, model: HostModel, saes: list[SAE[Any]], continuations: ContinuationSet, backend: str, target: str | Tensor
    ) -> "_Run":
        _check_fits(model, continuations)
        for module in (model, *saes):
            out_of_inference(module)
        described, base = dictionary_sites(model, saes), base_sites(model, backend)
        check_backend(model, backend)
        ids = torch.tensor(continuations.prefix_ids, device=device_of(model))
        hooks = [name for site in [*described, *base] for name in (site.read or site.hook, site.hook)]
        prefix = read_prefix(model, ids, hooks)
        sites = plan_sites(model, described, base, prefix.order, backend)
        made = Target(model, target)
        return cls(model, saes, continuations, backend, made, prefix, sites)

    @property
    def tokens(self) -> list[str]:
        return token_strings(tokenizer_of(self.model), self.continuations.prefix_ids)

    def completeness(self, rows: Sequence[int], batch_size: int) -> Completeness:
        """The parts of the targets of some rows."""
        found = torch.zeros(4, len(rows))
        for batch, chunks in self._batches(rows, batch_size):
            asked = [rows[i] for i in batch]
            ids = self.continuations.prefix_ids, self._ids(asked)
            how = self.backend, self.continuations.targeted_ids(asked), chunks
            parts = measure_completeness(self.model, self.sites, self.saes, self.target, *ids, *how)
            found[:, batch] = torch.stack([parts.target, parts.prefix, parts.continuation, parts.bias])
        return Completeness(*found.unbind())

    def check(self, rows: Sequence[int]) -> None:
        """Refuse dictionaries that no path leads on from, or sources that do not make up the target, on some rows."""
        if self.backend != "gradient":
            tolerance = rounding(next(iter(self.model.parameters())).dtype, self.backend)
            return check_linear(self.completeness(rows, len(rows)), tolerance)
        batches = self._batches(rows, len(rows))
        with traced(self.model, self.sites, self.saes, self.backend) as trace:
            for batch, chunks in batches:
                self._passes(trace, [rows[i] for i in batch], chunks).gradients(self.sites)

    def _batches(self, rows: Sequence[int], batch_size: int) -> list[tuple[list[int], list[slice]]]:
        """Places of some rows in batches, and the columns of each chunk of a batch that is one long row."""
        lengths = (self.continuations.lengths[list(rows)] + len(self.continuations.prefix_ids)).tolist()
        found = []
        for batch in length_batches(lengths, batch_size):
            chunks = position_chunks(lengths[batch[0]]) if len(batch) == 1 else []
            found.append((batch, chunks if len(chunks) > 1 and runs_in_chunks(self.model, self.backend) else []))
        return found

    def _passes(self, trace: Trace, rows: Sequence[int], chunks: Sequence[slice]) -> Passes:
        ids = self.continuations.prefix_ids, self._ids(rows), self.continuations.targeted_ids(rows)
        return Passes(self.model, trace, self.target, *ids, chunks)

    def known(self, table: SourceTable) -> SourceTable:
        """A table of sources under the names of this model, each one that the sites have."""
        return known_sources(self.model, self.saes, self._column_sites, len(self.continuations.prefix_ids), table)

    @property
    def _column_sites(self) -> list[Site]:
        return [site for site in self.sites if site.has_dictionary or site.in_cut]

    def sources(
        self, kinds: Sequence[str], special_positions: bool, max_bytes: int, wanted: SourceTable | None
    ) -> list[SiteSources]:
        """The sources of every site that can be a column, those that are wanted among them."""
        keys = [] if wanted is None else wanted.keys
        kinds = list(dict.fromkeys([*kinds, *(key[0] for key in keys)]))
        positions = self._positions(special_positions)
        if not {key[2] for key in keys} <= set(positions):
            positions = self._positions(special_positions=True)
        n_described = sum(site.has_dictionary for site in self.sites)
        parts = []
        for site in self._column_sites:
            width = self.prefix.activations[site.hook].shape[-1]
            limit = max(1, max_bytes // (4 * (width + len(self.continuations)) * max(1, n_described)))
            sae = self.saes[site.dictionary] if site.has_dictionary else None
            kept = [key[2:] for key in keys if key[0] == "latent" and key[1] == site.hook]
            parts.append(sources_of(site, sae, self.prefix, kinds, positions, limit, kept))
        if not any(len(part.kinds) for part in parts):
            raise ValueError(
                f"The prefix has no source of the kinds {', '.join(map(repr, kinds))}: no latent is active there, or "
                "none of these kinds occurs with these dictionaries. Give other dictionaries or kinds."
            )
        return parts

    def _positions(self, special_positions: bool) -> list[int]:
        ids = self.continuations.prefix_ids
        special = set() if special_positions else set(special_token_ids(tokenizer_of(self.model)))
        return [p for p, token in enumerate(ids) if token not in special] or list(range(len(ids)))

    def effects(self, sources: list[SiteSources], batch_size: int, progress: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Every source's effect on every continuation ``(n, m)``, and the totals by name, each ``(n,)``."""
        n = len(self.continuations)
        m = sum(len(part.kinds) for part in sources)
        remedy = "Lower max_bytes, give fewer kinds, or attribute fewer continuations at a time."
        with memory_for(f"Effects of {m:,} sources on {n:,} continuations", 4 * n * m, remedy):
            effects = torch.zeros(n, m)
        totals = {name: torch.zeros(n) for name in ("target", "prefix_effect", "continuation_effect")}
        batches = self._batches(range(n), batch_size)
        with traced(self.model, self.sites, self.saes, self.backend) as trace:
            for rows, chunks in tqdm(batches, desc="attributing", unit="batch", disable=not progress):
                what = f"A pass over {len(rows)} continuations and their prefix"
                with memory_for(what, None, f"Lower batch_size (now {batch_size})."):
                    found = self._passes(trace, rows, chunks).gradients(self.sites)
                of_sites = [part.effects(found.gradients[part.site.hook]).cpu() for part in sources]
                effects[rows] = torch.cat(of_sites, dim=1)
                for total, values in zip(totals.values(), (found.targets, found.prefix, found.continuation)):
                    total[rows] = values
        return _checks.finite(effects, "The signature"), totals

    def _ids(self, rows: Sequence[int]) -> Tensor:
        """Tokens of some continuations, as wide as the longest of them, ``(b, T)``."""
        lengths = self.continuations.lengths[list(rows)]
        return self.continuations.token_ids[list(rows), : int(lengths.max())].clone()


@contextmanager
def _naming_what_remains(
    model: HostModel, saes: list[SAE[Any]], continuations: ContinuationSet, backend: str, target: str | Tensor
) -> Iterator[None]:
    """Let a refusal name the other backends that work on this model with these dictionaries, each of them tried."""
    try:
        yield
    except Refusal as refusal:
        works = []
        for other in BACKENDS:
            try:
                if other != backend:
                    _Run.of(model, saes, continuations, other, target).check([0])
                    works.append(repr(other))
            except ValueError:
                continue
        remain = f"backend={' and '.join(works)} remain{'s' if len(works) == 1 else ''}." if works else "No other does."
        raise ValueError(f"backend={backend!r} does not work here. {refusal} {remain}") from refusal


def _check_fits(model: HostModel, continuations: ContinuationSet) -> None:
    length = len(continuations.prefix_ids) + int(continuations.lengths.max())
    context, size = int(model.cfg.n_ctx), int(model.cfg.d_vocab)
    if length > context:
        raise ValueError(f"Prefix and continuation have up to {length} tokens, and this model's context is {context}.")
    largest = max(*continuations.prefix_ids, int(continuations.token_ids.max()), PADDING)
    if largest >= size:
        raise ValueError(f"The set has token id {largest}, this model {size} tokens: it was made with another model.")
