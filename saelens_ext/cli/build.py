"""``exemplars`` and ``snmf``: a run of the DictionaryRunner."""

import shlex
from typing import Any

from saelens_ext.cli import opening
from saelens_ext.cli.output import Context, Result, table
from saelens_ext.runner.checkpoints import list_checkpoints
from saelens_ext.runner.config import DictionaryRunnerConfig
from saelens_ext.runner.results import BuiltDictionary, RunResult
from saelens_ext.runner.runner import DictionaryRunner
from saelens_ext.runner.tracking import check_login


def build(config: DictionaryRunnerConfig, context: Context) -> Result:
    """Build the dictionaries of a config."""
    config.progress = config.progress or context.progress
    opening.check_writable(config.output_path, "output_path")
    opening.check_writable(config.checkpoint_path, "checkpoint_path")
    if config.logger.log_to_wandb:
        check_login()
    dataset = opening.open_dataset(config)
    model = opening.open_model(config) if config.model_name or config.cached_activations_path is None else None
    runner = DictionaryRunner(config, model=model, dataset=dataset, as_named=True)
    try:
        result = runner.run()
    except KeyboardInterrupt as error:
        context.kept += _finished(runner.result) + _how_to_go_on(runner.result)
        raise KeyboardInterrupt from error
    return Result(data=result.to_dict(), text=_text(result))


def _how_to_go_on(result: RunResult | None) -> list[str]:
    """What resumes the run, a second Ctrl-C during the pass included."""
    found = [] if result is None or result.checkpoint_path is None else list_checkpoints(result.checkpoint_path)
    if not found:
        return ["There is no checkpoint to go on from: the same command starts anew."]
    return [f"The same command with --resume_from_checkpoint={shlex.quote(str(found[-1]))} goes on from there."]


def _finished(result: RunResult | None) -> list[str]:
    built = [] if result is None else result.dictionaries.values()
    names = [str(one.path) for one in built if one.path is not None]
    return [f"Finished and saved: {', '.join(names)}."] if names else []


def _text(result: RunResult) -> str:
    where = "" if result.output_path is None else f"\n\nSaved in {result.output_path}, each in a folder of its name."
    return table([_row(built) for built in result.dictionaries.values()]) + where


def _row(built: BuiltDictionary) -> dict[str, Any]:
    figures = built.figures()
    return {
        "dictionary": built.name,
        "latents": int(built.dictionary.cfg.d_sae),
        "activations": built.fit.n_seen,
        "stopped because": built.fit.stopped_because,
        "explained variance": figures.get("metrics/explained_variance"),
        "l0": figures.get("metrics/l0"),
    }
