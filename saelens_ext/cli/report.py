"""``report``: the HTML page about a saved dictionary."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from transformers import AutoTokenizer

from saelens_ext import _files
from saelens_ext.analysis.labels import FORMAT as LABELS
from saelens_ext.analysis.labels import Labels, label_latents
from saelens_ext.analysis.logit_lens import LensResult, logit_lens
from saelens_ext.analysis.match import match_dictionaries
from saelens_ext.analysis.profile import DictionaryProfile, profile_dictionary
from saelens_ext.cli import opening
from saelens_ext.cli.errors import UsageError
from saelens_ext.cli.options import DEMO, ReadingOptions, ReportOptions
from saelens_ext.cli.output import Context, Result
from saelens_ext.dictionaries.fit_result import ExemplarFitResult
from saelens_ext.dictionaries.hierarchy import HierarchicalSNMF
from saelens_ext.dictionaries.snmf_fit_result import SNMFFitResult
from saelens_ext.host.hook_names import is_in_stream
from saelens_ext.host.mlp_output import residual_directions
from saelens_ext.host.models import tokenizer_of
from saelens_ext.hub.contents import Contents
from saelens_ext.report.dictionary.compared import ComparedWith
from saelens_ext.report.dictionary.dictionary_report import write_dictionary_report
from saelens_ext.report.dictionary.snmf_section import SNMFLevel, SNMFSection
from saelens_ext.runner.config import DictionaryRunnerConfig
from saelens_ext.runner.results import EVALS_FILENAME

N_RANDOM = 10
"""Random examples kept of each latent, which labels are scored on."""

logger = logging.getLogger(__name__)


def report(options: ReportOptions, context: Context) -> Result:
    """Write the report on a dictionary."""
    contents = opening.open_contents(options.dictionary, options.device)
    is_folder = Path(options.dictionary).is_dir()
    profiles = _profiles(options, contents, context) if is_folder or contents.profile is None else [contents.profile]
    others = [opening.open_contents(_name(name), options.device) for name in options.compare]
    model, tokenizer, name = _host(options, contents)
    target = Path(options.html or (Path(options.dictionary) / "report.html" if is_folder else "report.html"))
    first = contents.sae
    shown = {
        "evidence": contents.evidence,
        "tokenizer": tokenizer,
        "title": options.title or f"{first.cfg.metadata.hook_name} of {name}",
    }
    paths = [path for _, path in opening.dictionaries_in(contents, options.dictionary)]
    how = {"make": options.labels}
    labels = [labels_of(path, one, tokenizer, contents, **how) for path, one in zip(paths, profiles)]
    if others:
        shown["compared"] = _compared(first, others[0], _name(options.compare[0]), options, tokenizer)
    evals = Path(options.dictionary) / EVALS_FILENAME
    found = {"evals": _files.read_json(evals) if evals.exists() else None}
    if isinstance(contents.fit, ExemplarFitResult):
        fit = replace(contents.fit, dictionary=opening.attach(contents.fit.dictionary, model))
        fits = [other.fit for other in others if isinstance(other.fit, ExemplarFitResult)]
        found |= {"fits": [*fits, fit], "chosen": fit, "profile": profiles[0], "labels": labels[0]}
        path = write_dictionary_report(target, lens=lens_of(model, fit.dictionary), **found, **shown)
    elif contents.fit is None and not isinstance(contents.dictionary, HierarchicalSNMF):
        sae = opening.attach(contents.dictionary, model)
        found |= {"sae": sae, "profile": profiles[0], "labels": labels[0]}
        path = write_dictionary_report(target, lens=lens_of(model, sae), **found, **shown)
    else:
        path = write_dictionary_report(target, snmf=_section(contents, profiles, labels, model), **shown)
    return Result(data={"report": path.resolve()}, text=f"The report: {path.resolve()}")


def _profiles(options: ReportOptions, contents: Contents, context: Context) -> list[DictionaryProfile]:
    """The profiles beside the dictionaries of a folder, or one made now of a dictionary that has a name only."""
    if Path(options.dictionary).is_dir():
        return [_profile(path, sae) for sae, path in opening.dictionaries_in(contents, options.dictionary)]
    names = ("dictionary", "model_name", "model_class_name", "dataset_path", "device")
    reading = ReadingOptions(**{name: getattr(options, name) for name in names})
    config = opening.reading_config(contents, contents.sae, reading, training_tokens=options.training_tokens)
    stream = opening.open_stream(config)
    n = f"{config.training_tokens:,}"
    logger.info("No profile lies beside it: reading %s activations of %s", n, stream.hook_names[0])
    sae = opening.attach(contents.sae, stream.model)
    return [profile_dictionary(sae, stream, n_random=N_RANDOM, progress=context.progress)]


def labels_of(
    path: Path, profile: DictionaryProfile, tokenizer: Any, contents: Contents, *, make: bool
) -> Labels | None:
    """The labels saved beside a profile, else, where they are to be made, labels by contexts."""
    if (path / LABELS.names[0]).exists():
        return Labels.load(path, profile)
    if contents.labels is not None:
        return contents.labels
    if not make or not bool((profile.top.token_ids >= 0).any()):
        return None
    return label_latents(profile, tokenizer)


def _compared(first: SAE[Any], other: Contents, name: str, options: ReportOptions, tokenizer: Any) -> ComparedWith:
    """How the directions of another dictionary match those of the first."""
    second = other.sae
    with torch.no_grad():
        match = match_dictionaries(first, second)
    labels = other.labels
    if labels is None and other.profile is not None:
        labels = labels_of(Path(name), other.profile, tokenizer, other, make=options.labels)
    return ComparedWith(name=name, match=match, labels=labels)


def _profile(path: Path, sae: SAE[Any]) -> DictionaryProfile:
    if not (path / "profile.json").exists():
        raise FileNotFoundError(f"{path} holds no profile to show; make it with `saelens-ext profile {path}`.")
    return DictionaryProfile.load(path, sae)


def _name(given: str | list[str]) -> str:
    return given[0] if isinstance(given, list) else given


def _host(options: ReportOptions, contents: Contents) -> tuple[Any, Any, str]:
    """The model, None where it is not needed, its tokenizer, and its name."""
    recorded = opening.recorded_settings(contents, contents.sae)
    name = options.model_name or recorded.get("model_name")
    if not name:
        raise UsageError(f"{options.dictionary} does not say which model it is of: --model_name=NAME.")
    if options.model_name is not None:
        opening.check_model(contents.sae, name)
    kind = options.model_class_name or recorded.get("model_class_name") or "SAETransformerBridge"
    if options.lens and kind == "AutoModelForCausalLM":
        kind = "SAETransformerBridge"  # the lens needs a model that shows its last norm and unembedding
    arguments = recorded.get("model_from_pretrained_kwargs") if options.model_name is None else None
    how = {"model_class_name": kind, "model_from_pretrained_kwargs": arguments, "device": options.device}
    config = DictionaryRunnerConfig(hook_name="unread", model_name=name, **how)
    if options.lens or name == DEMO:
        model = opening.open_model(config)
        return model if options.lens else None, tokenizer_of(model), str(model.cfg.model_name)
    try:
        return None, AutoTokenizer.from_pretrained(name), name
    except (OSError, ValueError) as error:
        raise ValueError(f"The tokenizer of {name!r} could not be loaded: {str(error).splitlines()[0]}") from error


def lens_of(model: Any, dictionary: SAE[Any]) -> LensResult | None:
    """What a dictionary's directions promote, those over an MLP's neurons by what they write into the residual stream;
    None where they are of other activations.
    """
    written = dictionary.cfg.metadata.hook_name_out or dictionary.cfg.metadata.hook_name
    if model is None or not written:
        return None
    try:
        in_stream = is_in_stream(model, written)
        return logit_lens(model, dictionary.W_dec if in_stream else residual_directions(model, dictionary))
    except ValueError as error:
        logger.warning("There is no logit lens: %s", error)
        return None


def _section(
    contents: Contents, profiles: list[DictionaryProfile], labels: Sequence[Labels | None], model: Any
) -> SNMFSection:
    hierarchy = contents.dictionary if isinstance(contents.dictionary, HierarchicalSNMF) else None
    fit = contents.fit if isinstance(contents.fit, SNMFFitResult) else None
    saved: list[Any] = [contents.dictionary] if hierarchy is None else hierarchy.dictionaries
    losses = [None] * len(saved) if fit is None else [fit.held_out_loss]
    levels = [
        SNMFLevel(dictionary=one, profile=profile, lens=lens_of(model, opening.attach(one, model)), held_out_loss=loss)
        for one, profile, loss in zip(saved, profiles, losses)
    ]
    return SNMFSection(levels=levels, fit=fit, hierarchy=hierarchy)
