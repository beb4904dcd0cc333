"""``profile``, ``eval`` and ``match``: what a dictionary responds to, how good it is, what it shares with another."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens import SAE

from saelens_ext import _files
from saelens_ext.activations.stream import ActivationStream
from saelens_ext.analysis.match import match_dictionaries
from saelens_ext.analysis.profile import DictionaryProfile, profile_dictionaries
from saelens_ext.cli import opening
from saelens_ext.cli.errors import UsageError
from saelens_ext.cli.options import EvalOptions, MatchOptions, ProfileOptions, ReadingOptions
from saelens_ext.cli.output import Context, Result, shown, table
from saelens_ext.dictionaries.hierarchy import HierarchicalSNMF
from saelens_ext.runner import evaluation
from saelens_ext.runner.results import EVALS_FILENAME, BuiltDictionary

logger = logging.getLogger(__name__)


def profile(options: ReadingOptions, how: ProfileOptions, context: Context) -> Result:
    """Profile a saved dictionary, or the levels of a hierarchy."""
    contents = opening.read_folder(options.dictionary)
    named = opening.dictionaries_in(contents, options.dictionary)
    config = opening.reading_config(contents, named[0][0], options, training_tokens=how.training_tokens)
    stream = opening.open_stream(config)
    saes = [opening.attach(sae, stream.model) for sae, _ in named]
    logger.info("Reading %s activations of %s", f"{config.training_tokens:,}", config.hook_names[0])
    sizes: dict[str, Any] = {"n_examples": how.n_examples, "n_boundary": how.n_boundary, "context": how.context}
    found = profile_dictionaries(saes, stream, progress=context.progress, **sizes)
    for one, (_, path) in zip(found, named):
        if contents.fit is None:
            one.save(path)
        else:
            BuiltDictionary(name=path.name, fit=contents.fit, path=path, profile=one).save_profile()
    rows = [_profile_row(one, path) for one, (_, path) in zip(found, named)]
    return Result(data={"profiles": rows}, text=table(rows))


def _profile_row(found: DictionaryProfile, path: Path) -> dict[str, Any]:
    firing = found.counts[found.counts > 0].double()
    return {
        "path": str(path),
        "activations": found.n_activations,
        "latents": found.d_sae,
        "never active": int((found.counts == 0).sum()),
        "median count": float(firing.median()) if len(firing) else 0.0,
    }


def evaluate(options: ReadingOptions, how: EvalOptions, context: Context) -> Result:
    """Evaluate a saved dictionary with SAELens' run_evals."""
    if how.n_eval_batches < 1:
        raise UsageError(f"--n_eval_batches must be at least 1, got {how.n_eval_batches}.")
    contents = opening.read_folder(options.dictionary)
    if isinstance(contents.dictionary, HierarchicalSNMF):
        raise ValueError(f"{options.dictionary} is a hierarchy; evaluate one level, {options.dictionary}/level_0 say.")
    config = opening.reading_config(contents, contents.dictionary, options)
    if not config.model_name:
        raise UsageError("An evaluation runs the model: --model_name=NAME, the folder of a saved one, or demo.")
    stream = opening.open_stream(config)
    dictionary = opening.attach(contents.dictionary, stream.model)
    size = how.eval_batch_size_prompts or config.store_batch_size_prompts
    built_from = opening.recorded_settings(contents, dictionary)
    same = config.dataset_path == built_from.get("dataset_path") and "training_tokens" in built_from
    last = _last_document(stream, config.training_tokens) if same else -1
    windows = evaluation.eval_windows(stream, last, size, how.n_eval_batches)
    if windows is None:
        raise ValueError(f"{config.dataset_path or config.cached_activations_path} holds no text to evaluate on.")
    logger.info("Evaluating on %d windows of %d tokens", len(windows.windows), config.context_size)
    groups = evaluation.evaluate(dictionary, stream, windows)
    if not same:
        # Whether the dictionary saw other text is not known here.
        groups["token_stats"]["unseen_documents"] = None
    if how.save:
        _files.write_json(Path(options.dictionary) / EVALS_FILENAME, groups)
    figures = [(group, *pair) for group, figures in groups.items() for pair in figures.items()]
    rows = [{"group": group, "metric": name, "value": shown(value)} for group, name, value in figures]
    return Result(data=groups, text=table(rows))


def _last_document(stream: ActivationStream, n_activations: int) -> int:
    """The document that the last of so many activations of a stream is from; the model is not run."""
    excluded, seen, last = set(stream.excluded_ids), 0, -1
    for document, token_ids in stream.token_windows():
        if seen >= n_activations:
            break
        seen += sum(token not in excluded for token in token_ids[slice(*stream.seqpos_slice)])
        last = document
    return last


def match(options: MatchOptions, context: Context) -> Result:
    """Match the directions of two dictionaries."""
    first, second = opening.open_dictionary(options.first), opening.open_dictionary(options.second)
    with torch.no_grad():
        found = match_dictionaries(
            first,
            second,
            center=cast(Any, options.center),  # one of its choices, as the parser has seen
            null=cast(Any, options.null),
            level=options.level,
            n_null=options.n_null,
            seed=options.seed,
        )
    summary = found.summary()
    if options.csv is not None:
        _files.write_together({Path(options.csv): lambda path: found.to_dataframe().to_csv(path)})
    data = {**summary, "csv": options.csv, "names": [options.first, options.second]}
    return Result(data=data, text=_match_text(summary, options, first, second))


def _match_text(summary: Mapping[str, Any], options: MatchOptions, first: SAE[Any], second: SAE[Any]) -> str:
    rows = [
        {
            "dictionary": name,
            "latents": int(sae.cfg.d_sae),
            "cutoff": side["cutoff"],
            "above it": f"{side['share_above_cutoff']:.1%}",
            "mutual and above": f"{side['share_mutual_above_cutoff']:.1%}",
            "median cosine": side["median_cosine"],
        }
        for name, sae, side in ((options.first, first, summary["first"]), (options.second, second, summary["second"]))
    ]
    chance = f"By chance {summary['share_expected_by_chance']:.1%} would be above the cutoff."
    return f"{table(rows)}\n{chance}" + (f"\nEvery latent: {options.csv}" if options.csv else "")
