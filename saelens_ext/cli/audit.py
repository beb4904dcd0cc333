"""``audit``: why a model continues texts in different ways."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sae_lens import SAE

from saelens_ext import _files
from saelens_ext.analysis.labels import Labels
from saelens_ext.analysis.profile import DictionaryProfile
from saelens_ext.audit.audit import Audit, AuditConfig, audit_continuations
from saelens_ext.cli import opening
from saelens_ext.cli.audit_options import AuditInputs, SubjectInputs
from saelens_ext.cli.errors import UsageError
from saelens_ext.cli.output import Context, Result, shown, table, write_csv
from saelens_ext.continuations.audit_stages.questions import read_continuations
from saelens_ext.host.models import HostModel
from saelens_ext.runner.config import DictionaryRunnerConfig
from saelens_ext.runner.tracking import WandbTracker, check_login

_CONTINUATIONS, _MODES, _REPORT = "continuations.csv", "modes.csv", "report.html"


def audit(inputs: AuditInputs, settings: AuditConfig, context: Context) -> Result:
    """Audit one prefix or several."""
    prefixes, continuations = _prefixes(inputs)
    folder = _folder(inputs)
    check_named(inputs)
    opening.check_writable(folder, "output_path")
    sampler = inputs.sampler.made(inputs.model_name, folder)
    if inputs.logger.log_to_wandb:
        check_login()
    model, dictionaries = subject_of(inputs, inputs.n_workers)
    if folder is not None:
        context.kept.append(f"Stages that were finished are in {folder}; the same command goes on from there.")
    found = audit_continuations(
        model,
        prefixes,
        dictionaries,
        inputs.embedder,
        continuations=continuations,
        sampler=sampler,
        folder=folder,
        n_workers=inputs.n_workers,
        workers=inputs.workers,
        actor_options=inputs.actor_options,
        on_failure="record",
        progress=context.progress,
        **{field.name: getattr(settings, field.name) for field in fields(AuditConfig)},
    )
    data = _data(found)
    if folder is not None:
        data["files"] = {name: str(path) for name, path in _write(found, folder, inputs.dictionaries).items()}
    _log(inputs, settings, found)
    return Result(data=data, text=_text(found, data))


def check_named(inputs: SubjectInputs) -> None:
    """Raise UsageError where no dictionary is named."""
    if not inputs.dictionaries:
        raise UsageError("No dictionary was named: --dictionaries=FOLDER, several with commas between.")


def subject_of(
    inputs: SubjectInputs, n_workers: int
) -> tuple[Callable[[], HostModel], Callable[[HostModel], list[SAE[Any]]]]:
    """What opens the model, and the dictionaries on it. These are opened before: a name may be wrong."""
    loaded = [opening.open_dictionary(name, inputs.device) for name in inputs.dictionaries]
    attached = partial(_attached, loaded if n_workers == 1 else list(inputs.dictionaries), inputs.device)
    return partial(opening.open_model, _model_config(inputs, loaded)), attached


def _prefixes(inputs: AuditInputs) -> tuple[list[Any], dict[str, list[Any]] | None]:
    """The texts given one by one, then those of the file, or else those of the continuations; and these, if given."""
    given = [text for one in inputs.prefix for text in (one if isinstance(one, list) else [one])]
    if inputs.prefixes is not None:
        given += opening.texts_in(Path(inputs.prefixes), conversations=True)
    continuations = None
    if inputs.continuations is not None:
        prompts, continuations = read_continuations(inputs.continuations, samples=inputs.samples or None)
        given = given or prompts
    elif inputs.samples:
        raise UsageError("--samples are those of a log of Inspect: --continuations=FILE.eval.")
    if not given:
        raise UsageError(
            "No prefix was given: --prefix=TEXT, which may be repeated, --prefixes=FILE, or --continuations=FILE."
        )
    return given, continuations


def _attached(dictionaries: Sequence[SAE[Any] | str], device: str, model: HostModel) -> list[SAE[Any]]:
    """Dictionaries on a model; workers open them by name rather than have them sent."""
    opened = (opening.open_dictionary(one, device) if isinstance(one, str) else one for one in dictionaries)
    return [opening.attach(sae, model) for sae in opened]


def _folder(inputs: AuditInputs) -> Path | None:
    """Where results go. Points of a sweep have other settings, and so folders of their own."""
    if inputs.output_path is None:
        return None
    swept = "WANDB_SWEEP_ID" in os.environ
    return Path(inputs.output_path) / os.environ.get("WANDB_RUN_ID", "") if swept else Path(inputs.output_path)


def _model_config(inputs: SubjectInputs, saes: list[SAE[Any]]) -> DictionaryRunnerConfig:
    """How to load the model, in the runner's terms."""
    if inputs.model_class_name == "AutoModelForCausalLM":
        raise UsageError("An audit needs --model_class_name=SAETransformerBridge or HookedTransformer, with hooks.")
    return DictionaryRunnerConfig(
        hook_name=saes[0].cfg.metadata.hook_name or "unknown",
        model_name=inputs.model_name,
        model_class_name=inputs.model_class_name,
        model_from_pretrained_kwargs=inputs.model_from_pretrained_kwargs,
        device=inputs.device,
    )


def _beside(names: Sequence[str], found: Audit, kind: Any, file: str) -> dict[str, Any] | None:
    """What lies beside the dictionaries, their profiles or labels, by the name of the hook; None for nothing."""
    folders = [Path(name) for name in names]
    present = [(one, path) for one, path in zip(found.about["dictionaries"], folders) if (path / file).exists()]
    return {one["hook_name"]: kind.load(path) for one, path in present} or None


# --- what is told ---


def _data(found: Audit) -> dict[str, Any]:
    """The audit for ``--json``."""
    parts = [
        {
            "prompt": one.prompt,
            "prefix": one.modes["prefix"].iloc[0],
            "n_continuations": one.n_continuations,
            **one.figures,
            "modes": one.modes.drop(columns=["prompt", "prefix"]).to_dict(orient="records"),
            "verdict": one.verdict.to_dict(),
            "not_validated": one.not_validated or None,
        }
        for one in found.outlines
    ]
    claim = None if found.validation is None else found.validation.claim()
    told = {"verdict": found.verdict.to_dict(), "prefixes": parts, "failures": dict(found.failures), "claim": claim}
    return told | {"about": dict(found.about)}


def _text(found: Audit, data: dict[str, Any]) -> str:
    """The audit for people."""
    lines = []
    for one, part in zip(found.outlines, data["prefixes"]):
        counts = f"{shown(part['n_continuations'])} continuations, {shown(len(part['modes']))} modes"
        lines.append(f"{one.prompt!r}: {counts} (stability {shown(part['stability'])})")
        lines.append(table([_mode_row(mode) for mode in part["modes"]]))
        lines.append(part["verdict"]["headline"] if len(data["prefixes"]) > 1 else "")
    lines.extend(f"{prompt!r} could not be audited: {why}" for prompt, why in found.failures.items())
    lines.append(str(found.verdict))
    lines.append("".join(f"\n{name}: {path}" for name, path in data.get("files", {}).items()).strip())
    return "\n".join(line for line in lines if line)


def _mode_row(mode: dict[str, Any]) -> dict[str, Any]:
    return {
        "mode": mode["cluster"],
        "weight": f"{mode['weight']:.0%}",
        "members": f"{mode['n_members']} (smallest size)" if mode["at_floor"] else mode["n_members"],
        "label": mode["label"],
        "typical": repr(mode["text"]),
    }


def _write(found: Audit, folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Tables and the report, beside the folders of the stages."""
    tables = {_CONTINUATIONS: found.to_dataframe(), _MODES: found.modes()}
    _files.write_together({folder / name: partial(write_csv, rows) for name, rows in tables.items()})
    profiles = _beside(names, found, DictionaryProfile, "profile.json")
    labels = _beside(names, found, Labels, "labels.json")
    beside: dict[str, Any] = {"profiles": profiles, "labels": labels}
    several = len(found.prefixes) + len(found.failures) > 1
    report = found.save_index(folder, **beside) if several else found.save_html(folder / _REPORT, **beside)
    return {"continuations": folder / _CONTINUATIONS, "modes": folder / _MODES, "report": report}


def _log(inputs: AuditInputs, settings: AuditConfig, found: Audit) -> None:
    """Log the figures, their means over the prefixes where there are several, to a wandb run."""
    if not inputs.logger.log_to_wandb:
        return
    each = [one.figures for one in found.outlines]
    means = pd.DataFrame(each).mean().dropna()
    figures = {f"metrics/{name}": float(value) for name, value in means.items()}
    for i, one in enumerate(each if len(each) > 1 else ()):
        figures |= {f"metrics/prefix_{i:03d}/{name}": value for name, value in one.items() if np.isfinite(value)}
    content = {name: value for name, value in asdict(inputs).items() if name != "logger"}
    config = _files.json_safe(content | asdict(settings) | {"logger": asdict(inputs.logger)})
    with WandbTracker(inputs.logger, config) as tracker:
        tracker.open(["audit"])
        tracker.log_result("audit", figures)
