"""How likely a model finds continuations while latents of their prefix are scaled.

The change is made at the prefix alone, which is the same for all continuations. So the prefix is run once per
direction and strength, and its continuations go on from its KV cache. With hooks of the user's on the model, which may
count positions, and on models without a KV cache, prefix and continuation are run in one piece.

Symbols
    M, T   tokens of the prefix; of the longest continuation of a batch
    S      settings: pairs of a direction and a strength
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from saelens_ext.continuations.attribution.gradients import batch_ids
from saelens_ext.continuations.attribution.target import Target
from saelens_ext.continuations.continuation_set import ContinuationSet
from saelens_ext.continuations.steering.latents import LatentScaler, Setting
from saelens_ext.host.hook_edits import hooked
from saelens_ext.host.models import HostModel
from saelens_ext.host.prompt_passes import KVCache, device_of, is_resumable, length_batches, logits_of, position_chunks
from saelens_ext.ops.modes import evaluating
from saelens_ext.ops.precision import wide

MEASURES = ("demeaned_logit", "mean_log_prob", "log_prob")


class SteeredPasses:
    """Measures continuations under settings, in batches of ``batch_size`` rows."""

    def __init__(self, model: HostModel, scaler: LatentScaler, continuations: ContinuationSet, batch_size: int):
        self._model, self._scaler, self._set, self._batch_size = model, scaler, continuations, batch_size
        self._target = Target(model, "mean")

    def measure(
        self, settings: Sequence[Setting], jobs: Sequence[tuple[int, int]], *, progress: bool = False
    ) -> Tensor:
        """Measure continuations, each job being a pair of a setting and a row of the set.

        Returns:
            `MEASURES` of each job, float64 ``(n, 3)``: the mean demeaned logit of its tokens, and its log-probability
            in nats per token and in total; of its answer's, where answers are marked.
        """
        found = torch.zeros(len(jobs), len(MEASURES), dtype=torch.float64)
        groups = self._groups(settings, jobs)
        with evaluating(self._model), tqdm(total=len(jobs), desc="steering", disable=not progress) as bar:
            for members, under_them in groups:
                prefix = self._run_prefix([settings[i] for i in members]) if self._cached else None
                lengths = self._set.lengths[[jobs[i][1] for i in under_them]] + len(self._set.prefix_ids)
                # Continuations of like length share a batch, so that little of it is padding.
                for places in length_batches(lengths.tolist(), self._batch_size):
                    batch = [under_them[i] for i in places]
                    rows = [jobs[i][1] for i in batch]
                    if prefix is None:
                        found[batch] = self._run_whole([settings[jobs[i][0]] for i in batch], rows)
                    else:
                        found[batch] = self._run_on(prefix, [members.index(jobs[i][0]) for i in batch], rows)
                    bar.update(len(batch))
        return found

    @property
    def _cached(self) -> bool:
        return is_resumable(self._model)

    def _groups(
        self, settings: Sequence[Setting], jobs: Sequence[tuple[int, int]]
    ) -> list[tuple[list[int], list[int]]]:
        """Settings that share a pass over the prefix, and the jobs under them."""
        of_setting: dict[int, list[int]] = {}
        for job, (setting, _) in enumerate(jobs):
            of_setting.setdefault(setting, []).append(job)
        used = list(of_setting)
        parts = [used[first : first + self._batch_size] for first in range(0, len(used), self._batch_size)]
        return [(part, [job for setting in part for job in of_setting[setting]]) for part in parts]

    # --- in one piece ---

    def _run_whole(self, settings: Sequence[Setting], rows: Sequence[int]) -> Tensor:
        tokens = self._tokens(rows)
        ids = batch_ids(self._set.prefix_ids, tokens, device_of(self._model))
        columns = slice(len(self._set.prefix_ids) - 1, -1)
        with hooked(self._model, self._scaler.hooks(settings)), _Head(self._model, columns) as head:
            logits = logits_of(self._model, ids)
        return self._measures([self._scores(head.final, logits, tokens)], rows)

    # --- in two pieces ---

    def _run_prefix(self, settings: Sequence[Setting]) -> "_Prefix":
        ids = torch.tensor(self._set.prefix_ids, device=device_of(self._model)).expand(len(settings), -1)
        cache = KVCache(self._model, len(settings))
        with hooked(self._model, self._scaler.hooks(settings)), _Head(self._model, slice(-1, None)) as head:
            logits = cache.run(ids)
        return _Prefix(cache, head.final, logits)

    def _run_on(self, prefix: "_Prefix", members: Sequence[int], rows: Sequence[int]) -> Tensor:
        tokens = self._tokens(rows)
        scores = [self._scores(prefix.final[members], prefix.logits[members], tokens[:, :1])]
        ids = torch.where(tokens >= 0, tokens, self._set.prefix_ids[0])[:, :-1].to(device_of(self._model))
        cache = prefix.cache.select(members) if ids.shape[1] else prefix.cache
        # A long row is run in chunks.
        size = position_chunks(len(self._set.prefix_ids) + tokens.shape[1])[0].stop if len(rows) == 1 else ids.shape[1]
        for first in range(0, ids.shape[1], size or 1):
            part = slice(first, first + size)
            with _Head(self._model, slice(None)) as head:
                logits = cache.run(ids[:, part])
            scores.append(self._scores(head.final, logits, tokens[:, 1:][:, part]))
        return self._measures(scores, rows)

    # --- numbers ---

    def _tokens(self, rows: Sequence[int]) -> Tensor:
        longest = int(self._set.lengths[list(rows)].max())
        return self._set.token_ids[list(rows), :longest]

    def _scores(self, final: Tensor, logits: Tensor, tokens: Tensor) -> Tensor:
        """Demeaned logits and log-probabilities of tokens ``(b, T)`` from what the unembedding received and gave at the
        columns that predict them: ``(2, b, T)``.
        """
        tokens = tokens.to(logits.device)
        chosen = logits.gather(-1, tokens.clamp_min(0)[..., None])[..., 0].float()
        # The normaliser row by row: the float32 of a whole batch's vocabulary would be a second copy of the logits.
        normaliser = torch.stack([row.float().logsumexp(dim=-1) for row in logits])
        return torch.stack([self._target.demeaned_logits(final, tokens).to(chosen), chosen - normaliser])

    def _measures(self, scores: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        """`MEASURES` ``(b, 3)`` of rows from :meth:`_scores` of their tokens, in pieces."""
        demeaned, log_probs = torch.cat(list(scores), dim=2)
        real = (self._set.targeted_ids(rows) >= 0).to(demeaned.device)
        n = wide(real).sum(dim=1)
        total = wide(torch.where(real, log_probs, 0)).sum(dim=1)
        return torch.stack([wide(torch.where(real, demeaned, 0)).sum(dim=1) / n, total / n, total], dim=1).cpu()


@dataclass(frozen=True)
class _Prefix:
    """A prefix that was run under S settings."""

    cache: KVCache
    final: Tensor
    """What the unembedding received at the last token, ``(S, 1, d)``."""
    logits: Tensor
    """``(S, 1, d_vocab)``."""


class _Head:
    """Inside the context the unembedding sees some columns alone, and what it receives is kept as ``final``."""

    def __init__(self, model: HostModel, columns: slice):
        self._model, self._columns = model, columns
        self.final: Tensor = torch.empty(0)

    def __enter__(self) -> "_Head":
        def keep(module: torch.nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            self.final = arguments[0][:, self._columns]
            return (self.final, *arguments[1:])

        self._handle = self._model.unembed.register_forward_pre_hook(keep)
        return self

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()
