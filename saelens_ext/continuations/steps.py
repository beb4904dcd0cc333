"""Sampling a chain of reasoning steps: candidates for each step, one of which is committed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saelens_ext import _checks, _files
from saelens_ext.continuations.collected import Collected
from saelens_ext.continuations.continuation_set import ContinuationSet
from saelens_ext.continuations.sample import as_set, fitting_prefix, how_asked
from saelens_ext.continuations.step_tree import JSON_FILENAME, VERSION, StepTree, step_folder
from saelens_ext.host.chat_template import Asked, Prompt, asked
from saelens_ext.host.models import HostModel, describe_model, tokenizer_of
from saelens_ext.host.prompt_passes import device_of
from saelens_ext.ops.modes import standard_modes
from saelens_ext.steering.sampling import SamplingOptions

COMMITS = ("mean_log_prob", "path", "random")

_DRAWS = 4
"""For each candidate wanted, at most."""


@standard_modes()
def sample_steps(
    model: HostModel,
    prompt: Prompt,
    *,
    n_candidates: int = 64,
    max_steps: int = 12,
    delimiter: str = "\n\n",
    commit: str = "mean_log_prob",
    temperature: float | int = 0.7,
    top_p: float | int = 0.95,
    max_step_tokens: int = 512,
    final: str | Sequence[str] = ("####", "\\boxed"),
    seed: int = 0,
    chat_template: bool = False,
    chat_template_options: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    folder: str | Path | None = None,
    progress: bool = False,
) -> StepTree:
    """Let a model reason step by step, with several candidates for every step.

    Candidates that neither reach the delimiter nor end are left out. The chain ends with a committed step that holds a
    final marker or that the model ended, or after ``max_steps``.

    Args:
        model: any TransformerLens model, with a tokenizer.
        prompt: the problem, a text or a conversation as for ``sample_continuations``.
        n_candidates: different candidates of each step; fewer, where four times as many draws do not bring more.
        max_steps: steps at most.
        delimiter: the text that ends a step, and belongs to it.
        commit: which candidate the next step goes on from: the one of highest "mean_log_prob" (per token), of highest
            probability as a whole ("path"), or one drawn at "random".
        temperature: of sampling.
        top_p: of sampling.
        max_step_tokens: of a candidate.
        final: texts that say that a step is the last one.
        seed: of the draws.
        chat_template: make the prompt a user's message.
        chat_template_options: passed to the template, for example ``{"enable_thinking": True}``.
        batch_size: draws per forward pass.
        folder: where each step is kept when it is done; what is there from the same call is used.
        progress: show a bar.

    Raises:
        ValueError: no candidate of a step reaches the delimiter or ends; a chain that does not fit into the model's
            context; a folder with steps of other settings; or a number out of range.

    Source: arXiv 2606.08236, reasoning experiment.
    """
    options = SamplingOptions(
        max_new_tokens=max_step_tokens, temperature=temperature, top_p=top_p, top_k=None, seed=seed
    )
    numbers = {"n_candidates": n_candidates, "max_steps": max_steps, "batch_size": batch_size}
    for name, value in numbers.items():
        _checks.positive(value, name)
    _checks.choice(commit, COMMITS, "commit")
    if not _checks.text(delimiter, "delimiter"):
        raise ValueError("delimiter is empty; give the text that ends a step, such as a blank line or a newline.")
    marks = [_checks.text(mark, "final") for mark in ([final] if isinstance(final, str) else final)]
    if "" in marks:
        raise ValueError("final holds an empty text, which is in every step; leave it out, or give final=() for none.")
    given = asked(
        tokenizer_of(model), prompt, chat_template=bool(chat_template), options=chat_template_options, name="prompt"
    )
    start = fitting_prefix(model, given.text, options.max_new_tokens, given.templated)
    settings: dict[str, Any] = {"prompt_ids": start.tolist(), "n_candidates": n_candidates, "max_steps": max_steps}
    settings |= {"delimiter": delimiter, "commit": commit, "final": marks, **how_asked(given)}
    settings |= {name: getattr(options, name) for name in ("temperature", "top_p", "max_new_tokens", "seed")}
    chain = _Chain(model, given, start.tolist(), options, settings | {"model": describe_model(model)}, folder)
    while not chain.ended_by:
        chain.extend(batch_size, progress)
    return StepTree(
        steps=tuple(chain.steps), committed=tuple(chain.committed), ended_by=chain.ended_by, settings=chain.settings
    )


class _Chain:
    """The steps so far, in a folder if there is one."""

    def __init__(
        self,
        model: HostModel,
        given: Asked,
        ids: list[int],
        options: SamplingOptions,
        settings: Mapping[str, Any],
        folder: str | Path | None,
    ) -> None:
        self._model, self._options, self._folder, self._asked = model, options, folder, how_asked(given)
        self._prompt, self._text, self._ids = given.prompt, given.text, ids
        self.settings = _files.json_safe(settings)
        self.steps: list[ContinuationSet] = []
        self.committed: list[int] = []
        self.ended_by = ""
        if folder is not None and (Path(folder) / JSON_FILENAME).exists():
            self._resume(Path(folder))

    def _resume(self, folder: Path) -> None:
        content = _files.read_json(folder / JSON_FILENAME, VERSION, ("committed", "ended_by", "settings"))
        for name, value in self.settings.items():
            if content["settings"].get(name) != value:
                was = content["settings"].get(name)
                raise ValueError(
                    f"{folder} holds steps with another {name}: {was!r} there, {value!r} now. Use another folder."
                )
        for number, row in enumerate(content["committed"]):
            self._go_on(ContinuationSet.load(step_folder(folder, number)), row)
        self.ended_by = content["ended_by"]

    def _go_on(self, step: ContinuationSet, row: int) -> None:
        self.steps.append(step)
        self.committed.append(row)
        self._ids = [*step.prefix_ids, *step.ids_of(row)]
        self._text, self._prompt = step.prefix + step.texts[row], step.prompt + step.texts[row]

    def extend(self, batch_size: int, progress: bool) -> None:
        """Sample and commit one more step, or find that there is none."""
        self._check_room()
        n = self.settings["n_candidates"]
        found = Collected(self._model, torch.tensor(self._ids, device=device_of(self._model)), n, deduplicate=True)
        found.draw(self._options, [self.settings["delimiter"]], _DRAWS * n, batch_size, progress)
        if not found.rows and self.steps:
            self.ended_by = "eos"
        else:
            step, ends = self._candidates(found)
            row = self._choose(step)
            if self._folder is not None:
                step.save(step_folder(self._folder, len(self.steps)))
            self._go_on(step, row)
            self.ended_by = ends[row] or ("max_steps" if len(self.steps) == self.settings["max_steps"] else "")
        if self._folder is not None:
            content = {"committed": self.committed, "ended_by": self.ended_by, "settings": self.settings}
            _files.write_json(Path(self._folder) / JSON_FILENAME, {"format_version": VERSION, **content})

    def _candidates(self, found: Collected) -> tuple[ContinuationSet, list[str]]:
        """The candidates that are whole, and for each how it ends the chain ("": it does not)."""
        drawn = found.describe()
        ends = [
            "final" if any(mark in text for mark in self.settings["final"]) else "eos" if row.ended_by == "eos" else ""
            for text, row in zip(found.texts, found.rows, strict=True)
        ]
        whole = [i for i, row in enumerate(found.rows) if ends[i] or row.ended_by == "stop"]
        if not whole:
            raise ValueError(
                f"No candidate of step {len(self.steps) + 1} holds the delimiter {self.settings['delimiter']!r} or "
                f"ends within max_step_tokens={self._options.max_new_tokens}; the first reads "
                f"{found.texts[0][:300]!r}. Give the delimiter that this model writes, or more tokens."
            )
        sampling = {name: self.settings[name] for name in ("temperature", "top_p", "max_new_tokens", "seed")}
        sampling |= {"stop": [self.settings["delimiter"]], "n_unfinished": len(found.rows) - len(whole)}
        metadata = {"sampling": sampling | drawn, **self._asked}
        texts, rows = [found.texts[i] for i in whole], [found.rows[i] for i in whole]
        counts = {"count": torch.tensor([found.counts[i] for i in whole])}
        ids = torch.tensor(self._ids)
        made = as_set(self._model, self._prompt, self._text, ids, texts, rows, "uniform", metadata, counts)
        return made, [ends[i] for i in whole]

    def _choose(self, step: ContinuationSet) -> int:
        rule = self.settings["commit"]
        if rule == "random":
            return int(np.random.default_rng([self._options.seed, len(self.steps)]).integers(len(step)))
        scores = step.mean_log_probs if rule == "mean_log_prob" else step.total_log_probs
        return int(scores.argmax())

    def _check_room(self) -> None:
        context, room = int(self._model.cfg.n_ctx), self._options.max_new_tokens
        if len(self._ids) + room > context:
            raise ValueError(
                f"Prompt and {len(self.steps)} steps have {len(self._ids)} tokens and step {len(self.steps) + 1} up to "
                f"{room}; this model's context is {context}. Set max_steps={max(1, len(self.steps))} or a lower "
                "max_step_tokens."
            )
