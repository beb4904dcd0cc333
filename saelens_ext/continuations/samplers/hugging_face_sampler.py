"""Continuations from the ``generate`` of a Hugging Face model."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from saelens_ext import _checks
from saelens_ext.continuations.samplers.sampler import Draw
from saelens_ext.host.continued_text import text_behind, text_read_as
from saelens_ext.host.weights_fingerprint import weights_fingerprint
from saelens_ext.ops.modes import callers_autocast, evaluating, standard_modes
from saelens_ext.steering.sampling import SamplingOptions, seed_of


class HuggingFaceSampler:
    """Draws continuations with ``generate`` of a causal language model of transformers.

    It may be quantised, have adapters, or be another model than the one that is examined; with another tokenizer it
    reads the prefix as its own makes it. Draws that are made together share random numbers, so a set depends on the
    batch size; the global random state is left as it was.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        generate_options: passed to ``generate``, for example ``{"min_p": 0.05}``; defaults that the model's generation
            config names, such as a repetition penalty, hold too.

    Raises:
        ValueError: a model without ``generate``, or an option that an argument of sampling decides.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        generate_options: Mapping[str, Any] | None = None,
    ):
        if not callable(getattr(model, "generate", None)):
            raise ValueError(
                f"model must be a causal language model of transformers, with generate, got a {type(model).__name__}; "
                "of a bridge give bridge.original_model."
            )
        self.model, self.tokenizer = model, cast("Any", tokenizer)
        self.generate_options = _checks.plain(dict(generate_options or {}), "generate_options")
        decided = {"max_new_tokens", "temperature", "top_p", "top_k", "do_sample", "stop_strings"}
        if wrong := decided & set(self.generate_options):
            raise ValueError(
                f"generate_options has {', '.join(sorted(wrong))}, which the arguments of sampling decide."
            )

    def describe(self) -> dict[str, Any]:
        """What decides the draws; see :class:`Sampler`."""
        name = str(getattr(self.model.config, "_name_or_path", "") or "")
        about = {"name": name, "class": type(self.model).__name__, "dtype": str(self.model.dtype).split(".")[-1]}
        return {
            "kind": "generate",
            "model": about | {"weights": weights_fingerprint(self.model)},
            "generate_options": self.generate_options,
        }

    @standard_modes()
    def draw(
        self,
        prefix: str,
        prefix_ids: Sequence[int],
        numbers: Sequence[int],
        options: SamplingOptions,
        stop: Sequence[str],
    ) -> list[Draw]:
        """See :class:`Sampler`."""
        ids = self._start(prefix, prefix_ids)
        given = torch.tensor([ids] * len(numbers), device=self.model.device)
        ends = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ends = self.tokenizer.eos_token_id if ends is None else ends
        ends = [one for one in (ends if isinstance(ends, list) else [ends]) if one is not None]
        padding = next((one for one in (self.tokenizer.pad_token_id, *ends) if one is not None), None)
        how: dict[str, Any] = {"do_sample": False}
        if options.temperature:
            how = {"do_sample": True, "temperature": float(options.temperature), "top_p": float(options.top_p)}
            how["top_k"] = options.top_k or 0
        how |= {"stop_strings": list(stop), "tokenizer": self.tokenizer} if stop else {}
        scores = _Scores()
        devices = [given.device] if given.device.type == "cuda" else []
        with evaluating(self.model), callers_autocast(), torch.random.fork_rng(devices):
            torch.manual_seed(seed_of(options.seed, numbers[0], ids))
            made: Any = self.model.generate(
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=options.max_new_tokens,
                pad_token_id=padding,
                logits_processor=LogitsProcessorList([scores]),
                **how,
                **self.generate_options,
            )
        rows = made[:, len(ids) :].cpu()
        likely = scores.of(made, rows.shape[1])
        return [self._draw(ids, rows[i].tolist(), likely[i], {*ends, padding}, ends, stop) for i in range(len(rows))]

    def _start(self, prefix: str, prefix_ids: Sequence[int]) -> list[int]:
        """The prefix in this tokenizer: the model's ids where they are of the same vocabulary."""
        if text_read_as(self.tokenizer, prefix, prefix_ids) is not None:
            return [int(i) for i in prefix_ids]
        ids = list(self.tokenizer(prefix, verbose=False)["input_ids"])
        # What a tokenizer puts behind every text would end the text that is to be continued.
        while len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id and not prefix.endswith(self.tokenizer.eos_token):
            ids.pop()
        if not ids:
            raise ValueError(f"The prefix {prefix!r} has no token for this sampler's tokenizer; give it a word.")
        return ids

    def _draw(
        self,
        prompt: list[int],
        row: list[int],
        scores: list[float],
        closing: set[int | None],
        ends: list[int],
        stop: Sequence[str],
    ) -> Draw:
        length = next((i for i, one in enumerate(row) if one in closing), len(row))
        ids = row[:length]
        text = text_behind(self.tokenizer, prompt, ids)
        stopped = any(one in text for one in stop)
        ended = "stop" if stopped else "eos" if length < len(row) and row[length] in ends else "length"
        tokens = {"token_ids": ids, "log_probs": scores[:length] or None}
        return Draw(text=text, ended_by=ended, prompt_tokens=len(prompt), **tokens)


class _Scores(LogitsProcessor):
    """Log-probabilities of what is drawn, before temperature and top-p, which come behind a processor of the caller's.

    Only those of the last step are held whole.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._found: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._take(input_ids)
        self._last = scores.float().log_softmax(dim=-1)
        return scores

    def _take(self, ids: Tensor) -> None:
        if self._last is not None:
            self._found.append(self._last.gather(-1, ids[:, -1:]))

    def of(self, ids: Tensor, n_new: int) -> list[list[float]]:
        """For each row of the whole sequences, those of its new tokens; none where they were not drawn one by one."""
        self._take(ids)
        if len(self._found) != n_new:
            return [[] for _ in ids]
        return torch.cat(self._found, dim=1).tolist()
