"""The commands ``evidence …``: evaluations that end in a claim."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from sae_lens import SAE

from saelens_ext._files import json_safe
from saelens_ext.activations.stream import ActivationStream
from saelens_ext.cli import opening
from saelens_ext.cli.errors import UsageError
from saelens_ext.cli.evidence_options import (
    BehaviourInputs,
    DocumentInputs,
    EvidenceInputs,
    ModelInputs,
    OtherModelInputs,
    ReplicaInputs,
    ResultOptions,
    TargetInputs,
)
from saelens_ext.cli.output import Context, Result, table
from saelens_ext.continuations.subject import let_go
from saelens_ext.dictionaries.fit_result import ExemplarFitResult
from saelens_ext.evals.behaviour.ablation import ablate_behaviour
from saelens_ext.evals.behaviour.behaviour import PromptSplit
from saelens_ext.evals.behaviour.localisation import localise_behaviour
from saelens_ext.evals.behaviour.sweep import localisation_sweep
from saelens_ext.evals.checkpoints.checkpoints import compare_checkpoints
from saelens_ext.evals.checkpoints.model_comparison import compare_models
from saelens_ext.evals.checkpoints.overlap import overlap_by_tokens
from saelens_ext.evals.dictionaries.decomposition import decompose_dictionary
from saelens_ext.evals.dictionaries.nesting import partition_nesting
from saelens_ext.evals.dictionaries.stability import dictionary_stability
from saelens_ext.evals.dictionaries.synthetic import evaluate_on_synthetic
from saelens_ext.evals.evidence import Evidence
from saelens_ext.evals.novelty.novelty import evaluate_novelty
from saelens_ext.evals.results import PAGE_FILENAME, save_evidence, write_beside
from saelens_ext.host.models import HostModel
from saelens_ext.runner.config import DictionaryRunnerConfig
from saelens_ext.runner.tracking import WandbTracker, check_login
from saelens_ext.steering.behaviour import REFUSALS, begins_with

_LOCALISING = ("chat_template", "chat_template_options", "max_new_tokens", "min_members", "min_rate")
_OF_MODELS = ("hook_name", "dataset_path", "text_column", "model_class_name", "device")


def novelty(
    inputs: EvidenceInputs, documents: DocumentInputs, settings: Any, results: ResultOptions, context: Context
) -> Result:
    """Judge how well the distance to the nearest exemplar finds unfamiliar text."""
    prepare(results)
    if documents.inside is None:
        raise UsageError(
            "No documents were named that the dictionary was not fitted to: --inside=FILE, a JSON list of texts or a "
            "text in each line, of the kind that it was fitted to."
        )
    inside, outside = opening.texts_in(Path(documents.inside)), named_files(documents.outside)
    stream, saes, _ = opened(inputs)
    found = evaluate_novelty(stream.model, saes, stream, inside, outside, progress=context.progress, **vars(settings))
    return finish(found, inputs, results, settings)


def behaviour(
    inputs: EvidenceInputs, prompts: BehaviourInputs, settings: Any, results: ResultOptions, context: Context
) -> Result:
    """Localise a behaviour in a dictionary, and judge what ablating its regions does."""
    prepare(results)
    if prompts.shows is None or prompts.lacks is None:
        raise UsageError(
            "No prompts were named: --shows=FILE and --lacks=FILE, a JSON list or lines of texts and conversations."
        )
    shows, lacks = (opening.texts_in(Path(file), conversations=True) for file in (prompts.shows, prompts.lacks))
    phrases = REFUSALS if prompts.phrases is None else opening.texts_in(Path(prompts.phrases))
    neutral = [] if prompts.neutral is None else opening.texts_in(Path(prompts.neutral))
    judge, split = begins_with(phrases, within=prompts.within), PromptSplit.divide(shows, lacks, seed=settings.seed)
    stream, saes, _ = opened(inputs)
    if len(saes) > 1:
        raise UsageError("A behaviour is localised in one dictionary; run the command once for each.")
    (sae,) = saes.values()
    options: dict[str, Any] = {name: getattr(prompts, name) for name in _LOCALISING}
    options["progress"] = context.progress
    found = localise_behaviour(stream.model, sae, split, judge, **options)
    ablated = ablate_behaviour(
        stream.model, found, split, judge, neutral_texts=neutral, progress=context.progress, **vars(settings)
    )
    if not prompts.sweep:
        return finish(ablated, inputs, results, settings)
    swept = localisation_sweep(
        stream.model, stream.hook_names[0], split, judge, asked=found.prompts,
        folder=Path(results.output_path) / "cells", **options,
    )  # fmt: skip
    return finish(ablated, inputs, results, settings, swept)


def stability(inputs: ReplicaInputs, settings: Any, results: ResultOptions, context: Context) -> Result:
    """Look for the directions of a dictionary in its replicas."""
    prepare(results)
    if not inputs.compare:
        raise UsageError("No other replica was named: --compare=FOLDER, a dictionary built as this one but for a seed.")
    found = dictionary_stability(_replicas([inputs.dictionary, *inputs.compare]), **vars(settings))
    return finish(found, inputs, results, settings)


def checkpoints(
    inputs: ReplicaInputs, other: OtherModelInputs, settings: Any, results: ResultOptions, context: Context
) -> Result:
    """Tell what training changed in a dictionary, by replicas of both models'."""
    prepare(results)
    if not inputs.compare or len(other.second) < 2:
        raise UsageError(
            f"Each model needs at least 2 replicas, got {1 + len(inputs.compare)} and {len(other.second)}: "
            "--compare=FOLDER for the first model, --second=FOLDER --second=FOLDER for the other."
        )
    sides = _replicas([inputs.dictionary, *inputs.compare]), _replicas(other.second)
    return finish(compare_checkpoints(*sides, **vars(settings)), inputs, results, settings)


def overlap(inputs: EvidenceInputs, settings: Any, results: ResultOptions, context: Context) -> Result:
    """Compare dictionaries by the tokens on which their latents are strongest."""
    return _compared(overlap_by_tokens, inputs, settings, results)


def nesting(inputs: EvidenceInputs, settings: Any, results: ResultOptions, context: Context) -> Result:
    """Find where the regions of partitions go in coarser ones."""
    return _compared(partition_nesting, inputs, settings, results)


def _compared(function: Any, inputs: EvidenceInputs, settings: Any, results: ResultOptions) -> Result:
    prepare(results)
    if not inputs.compare:
        raise UsageError("No other dictionary was named: --compare=FOLDER, of the same hook.")
    stream, saes, _ = opened(inputs)
    return finish(function(saes, stream, **vars(settings)), inputs, results, settings)


def decompose(inputs: TargetInputs, settings: Any, results: ResultOptions, context: Context) -> Result:
    """Write a dictionary's directions as sums of a few of another's."""
    prepare(results)
    if inputs.basis is None:
        raise UsageError("No basis was named: --basis=FOLDER, the dictionary whose directions are the terms.")
    target, basis = (opening.open_dictionary(folder) for folder in (inputs.dictionary, inputs.basis))
    return finish(decompose_dictionary(target, basis, **vars(settings)), inputs, results, settings)


def models(inputs: ModelInputs, settings: Any, results: ResultOptions, context: Context) -> Result:
    """Compare two models by the regions of their activations on the same texts."""
    prepare(results)
    if inputs.hook_name is None:
        raise UsageError("No hook was named: --hook_name=HOOK, where both models are read.")
    prompts = named_files(inputs.prompts, "--prompts", conversations=True)
    options = {name: getattr(inputs, name) for name in _OF_MODELS}
    options = {name: value for name, value in options.items() if value is not None}
    configs = [DictionaryRunnerConfig(model_name=name, **options) for name in (inputs.base, inputs.tuned)]
    texts = opening.open_dataset(configs[0])
    base, tuned = map(opening.open_model, configs)
    found = compare_models(
        base, tuned, texts, hook_name=inputs.hook_name, prompts=prompts, max_tokens=inputs.training_tokens,
        chat_template_options=inputs.chat_template_options, progress=context.progress, **vars(settings),
    )  # fmt: skip
    told = finish(found.checkpoints, None, results, settings, found.shift)
    found.save_html(Path(results.output_path) / PAGE_FILENAME)
    files, lines = dict(told.data["files"]), [told.text]
    for name, regions in (("gained", found.gained()), ("lost", found.lost())):
        files[name] = Path(results.output_path) / f"{name}.csv"
        regions.to_csv(files[name], index=False)
        lines.append(f"{name}: {files[name]}, {len(regions)} regions of replica 0")
    return Result(data={**told.data, "verdict": found.verdict(), "files": files}, text="\n".join(lines))


def synthetic(settings: Any, results: ResultOptions, context: Context) -> Result:
    """Compare dictionaries with the features of SAELens' synthetic models."""
    prepare(results)
    found = evaluate_on_synthetic(progress=context.progress, **vars(settings))
    return finish(found, None, results, settings)


# --- what is read ---


def prepare(results: ResultOptions) -> None:
    """Refuse before anything is computed what could not be kept: no writable folder, no login."""
    opening.check_writable(results.output_path, "output_path")
    if results.logger.log_to_wandb:
        check_login()


def _replicas(folders: Sequence[str]) -> dict[str, SAE[Any] | ExemplarFitResult]:
    """Dictionaries by name, with the statistics of their fits where these lie beside them."""
    opened = [
        ExemplarFitResult.load(folder) if (Path(folder) / "fit.json").exists() else opening.open_dictionary(folder)
        for folder in folders
    ]
    return dict(zip(_names(folders), opened, strict=True))


def _names(folders: Sequence[str]) -> list[str]:
    """The names of the folders, or their paths where two have one name."""
    names = [Path(folder).name for folder in folders]
    if len(set(folders)) < len(folders):
        raise UsageError(f"A dictionary was named twice among {', '.join(folders)}; name each once.")
    return names if len(set(names)) == len(names) else list(folders)


def opened(inputs: EvidenceInputs) -> tuple[ActivationStream, dict[str, SAE[Any]], Callable[[], HostModel]]:
    """The stream that the first dictionary was fitted to, all dictionaries by the names of their folders, and what
    opens the model again.
    """
    folders = [inputs.dictionary, *inputs.compare]
    names = _names(folders)
    contents = opening.read_folder(inputs.dictionary)
    first = opening.open_dictionary(inputs.dictionary, inputs.device)
    saes = [first, *(opening.open_dictionary(folder, inputs.device) for folder in inputs.compare)]
    config = opening.reading_config(contents, first, inputs, training_tokens=inputs.training_tokens)
    stream = opening.open_stream(config)
    attached = {name: opening.attach(sae, stream.model) for name, sae in zip(names, saes, strict=True)}
    return stream, attached, partial(_reopened, config)


def _reopened(config: DictionaryRunnerConfig) -> HostModel:
    """The model again, once what was opened before is let go."""
    let_go()
    return opening.open_model(config)


def named_files(given: Sequence[str], option: str = "--outside", **how: bool) -> dict[str, list[Any]]:
    """The texts of files that are given as NAME=FILE, by name."""
    found = {}
    for entry in given:
        name, separator, file = entry.partition("=")
        if not (name and separator and file):
            raise UsageError(f"{option} takes NAME=FILE, got {entry!r}.")
        found[name] = opening.texts_in(Path(file), **how)
    return found


# --- what is told ---


def finish(
    found: Evidence,
    inputs: EvidenceInputs | ReplicaInputs | TargetInputs | None,
    results: ResultOptions,
    settings: Any,
    *more: Evidence,
) -> Result:
    """Write the page and the results, put the figures where people look, and say what was found."""
    about = {} if inputs is None else {"dictionary": inputs.dictionary, "model": found.settings.get("model", "")}
    files = save_evidence([found, *more], Path(results.output_path), about={k: v for k, v in about.items() if v})
    if inputs is not None and inputs.save:
        write_beside(found, Path(inputs.dictionary))
    _log(found, inputs, results, settings)
    summary = found.summary()
    rows = summary[summary["metric"] == found.headline].drop(columns="metric").to_dict("records")
    data = {"verdict": found.verdict(), "summary": rows, "failures": list(map(str, found.failures)), "files": files}
    said = [one.verdict() for one in (found, *more)]
    lines = [table([json_safe(row) for row in rows]), "", *said, *map(str, found.failures)]
    return Result(data=data, text="\n".join([*lines, "", *(f"{name}: {path}" for name, path in files.items())]))


def _log(
    found: Evidence, inputs: EvidenceInputs | ReplicaInputs | TargetInputs | None, results: ResultOptions, settings: Any
) -> None:
    """Log the estimates to a wandb run, under ``metrics/evidence/``."""
    if not results.logger.log_to_wandb:
        return
    content = {} if inputs is None else {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    config = json_safe(content | vars(settings) | {"logger": asdict(results.logger)})
    with WandbTracker(results.logger, config) as tracker:
        tracker.open(["evidence"])
        tracker.log_result("evidence", {f"metrics/{name}": value for name, value in found.figures().items()})
