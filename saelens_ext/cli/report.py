"""``report``: the HTML page about a saved dictionary."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from sae_lens import SAE
from transformers import AutoTokenizer

from saelens_ext import _files
from saelens_ext.analysis.logit_lens import LensResult, logit_lens
from saelens_ext.analysis.profile import DictionaryProfile
from saelens_ext.cli import opening
from saelens_ext.cli.errors import UsageError
from saelens_ext.cli.options import DEMO, ReportOptions
from saelens_ext.cli.output import Context, Result
from saelens_ext.dictionaries.fit_result import ExemplarFitResult
from saelens_ext.dictionaries.hierarchy import HierarchicalSNMF
from saelens_ext.dictionaries.snmf_fit_result import SNMFFitResult
from saelens_ext.host.hook_names import is_in_stream
from saelens_ext.host.models import tokenizer_of
from saelens_ext.hub.contents import Contents
from saelens_ext.report.dictionary.dictionary_report import write_dictionary_report
from saelens_ext.report.dictionary.latents import LatentSection
from saelens_ext.report.dictionary.snmf_section import SNMFLevel, SNMFSection
from saelens_ext.runner.config import DictionaryRunnerConfig
from saelens_ext.runner.results import EVALS_FILENAME

logger = logging.getLogger(__name__)


def report(options: ReportOptions, context: Context) -> Result:
    """Write the report on a saved dictionary."""
    folder = Path(options.dictionary)
    contents = opening.read_folder(options.dictionary)
    profiles = [_profile(path, sae) for sae, path in opening.dictionaries_in(contents, options.dictionary)]
    others = [_other(name) for name in options.compare] if isinstance(contents.fit, ExemplarFitResult) else []
    model, tokenizer, name = _host(options, contents)
    target = Path(options.html) if options.html is not None else folder / "report.html"
    common = {"tokenizer": tokenizer, "title": options.title or f"{_first(contents).cfg.metadata.hook_name} of {name}"}
    evals = _files.read_json(folder / EVALS_FILENAME) if (folder / EVALS_FILENAME).exists() else None
    if isinstance(contents.fit, ExemplarFitResult):
        fit = replace(contents.fit, dictionary=opening.attach(contents.fit.dictionary, model))
        path = write_dictionary_report(
            target,
            fits=[*others, fit],
            chosen=fit,
            profile=profiles[0],
            lens=_lens(model, fit.dictionary),
            evals=evals,
            **common,
        )
    elif contents.fit is None and not isinstance(contents.dictionary, HierarchicalSNMF):
        dictionary = opening.attach(contents.dictionary, model)
        latents = LatentSection(dictionary=dictionary, profile=profiles[0], lens=_lens(model, dictionary), evals=evals)
        path = write_dictionary_report(target, latents=latents, **common)
    else:
        path = write_dictionary_report(target, snmf=_section(contents, profiles, model), **common)
    return Result(data={"report": path.resolve()}, text=f"The report: {path.resolve()}")


def _profile(path: Path, sae: SAE[Any]) -> DictionaryProfile:
    if not (path / "profile.json").exists():
        raise FileNotFoundError(
            f"{path} holds no profile, which the report shows; make it with `saelens-ext profile {path}`."
        )
    return DictionaryProfile.load(path, sae)


def _other(name: str | list[str]) -> ExemplarFitResult:
    """A partition to compare with."""
    folder = name[0] if isinstance(name, list) else name
    fit = opening.read_folder(folder).fit
    if not isinstance(fit, ExemplarFitResult):
        raise ValueError(f"--compare={folder}: it holds no fit of an ExemplarPartition.")
    return fit


def _first(contents: Contents) -> SAE[Any]:
    return (
        contents.dictionary.dictionaries[0]
        if isinstance(contents.dictionary, HierarchicalSNMF)
        else contents.dictionary
    )


def _host(options: ReportOptions, contents: Contents) -> tuple[Any, Any, str]:
    """The model, None where it is not needed, its tokenizer, and its name."""
    recorded = opening.recorded_settings(contents, _first(contents))
    name = options.model_name or recorded.get("model_name")
    if not name:
        raise UsageError(f"{options.dictionary} does not say which model it is of: --model_name=NAME.")
    if options.model_name is not None:
        opening.check_model(_first(contents), name)
    kind = options.model_class_name or recorded.get("model_class_name") or "SAETransformerBridge"
    if options.lens and kind == "AutoModelForCausalLM":
        kind = "SAETransformerBridge"  # the lens needs a model that shows its last norm and unembedding
    arguments = recorded.get("model_from_pretrained_kwargs") if options.model_name is None else None
    config = DictionaryRunnerConfig(
        hook_name="unread",
        model_name=name,
        model_class_name=kind,
        model_from_pretrained_kwargs=arguments,
        device=options.device,
    )
    if options.lens or name == DEMO:
        model = opening.open_model(config)
        return model if options.lens else None, tokenizer_of(model), str(model.cfg.model_name)
    try:
        return None, AutoTokenizer.from_pretrained(name), name
    except (OSError, ValueError) as error:
        raise ValueError(f"The tokenizer of {name!r} could not be loaded: {str(error).splitlines()[0]}") from error


def _lens(model: Any, dictionary: SAE[Any]) -> LensResult | None:
    """What directions in the residual stream promote; None for those of other activations."""
    written = dictionary.cfg.metadata.hook_name_out or dictionary.cfg.metadata.hook_name
    if model is None or not written or not is_in_stream(model, written):
        return None
    return logit_lens(model, dictionary.W_dec)


def _section(contents: Contents, profiles: list[DictionaryProfile], model: Any) -> SNMFSection:
    """The part on SNMF dictionaries."""
    hierarchy = contents.dictionary if isinstance(contents.dictionary, HierarchicalSNMF) else None
    fit = contents.fit if isinstance(contents.fit, SNMFFitResult) else None
    saved: list[Any] = [contents.dictionary] if hierarchy is None else hierarchy.dictionaries
    losses = [None] * len(saved) if fit is None else [fit.held_out_loss]
    levels = [
        SNMFLevel(
            dictionary=one, profile=profile, lens=_neuron_lens(model, opening.attach(one, model)), held_out_loss=loss
        )
        for one, profile, loss in zip(saved, profiles, losses)
    ]
    return SNMFSection(levels=levels, fit=fit, hierarchy=hierarchy)


def _neuron_lens(model: Any, dictionary: Any) -> LensResult | None:
    """What features of neurons promote; None for a dictionary of other activations."""
    try:
        return None if model is None else logit_lens(model, dictionary.residual_directions(model))
    except ValueError as error:
        logger.warning("The report has no logit lens: %s", error)
        return None
