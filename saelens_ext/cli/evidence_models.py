"""The command ``evidence models``: two models by name instead of saved dictionaries."""

from pathlib import Path
from typing import Any

from saelens_ext.cli import opening
from saelens_ext.cli.errors import UsageError
from saelens_ext.cli.evidence import finish, named_files, prepare
from saelens_ext.cli.evidence_options import ModelInputs, ResultOptions
from saelens_ext.cli.output import Context, Result
from saelens_ext.evals.model_comparison import compare_models
from saelens_ext.evals.results import PAGE_FILENAME
from saelens_ext.runner.config import DictionaryRunnerConfig

_OF_MODELS = ("hook_name", "dataset_path", "text_column", "model_class_name", "device")


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
