"""The commands ``evidence detection``, ``evidence probes`` and ``evidence steering``: evaluations of many concepts."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor

from saelens_ext.activations.kept_stream import KeptStream
from saelens_ext.activations.stream import ActivationStream
from saelens_ext.cli import opening
from saelens_ext.cli.errors import UsageError
from saelens_ext.cli.evidence import finish, opened, prepare
from saelens_ext.cli.evidence_options import (
    ConceptChoice,
    ConceptInputs,
    EvidenceInputs,
    ResultOptions,
    SteeringInputs,
    WorkInputs,
)
from saelens_ext.cli.output import Context, Result
from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from saelens_ext.evals.baselines import matched_controls
from saelens_ext.evals.concepts_data import Concept, packaged_concepts, read_concepts
from saelens_ext.evals.detection.detection import evaluate_detection
from saelens_ext.evals.detection.probing import evaluate_probes
from saelens_ext.evals.methods import Method
from saelens_ext.evals.steering.steering import compare_steering
from saelens_ext.host.flat_sae import hooks_of
from saelens_ext.steering.judges import EmbeddingJudge, Judge
from saelens_ext.steering.openai_judge import OpenAIJudge
from saelens_ext.steering.sampling import SamplingOptions


def detection(
    inputs: EvidenceInputs,
    concepts: ConceptInputs,
    work: WorkInputs,
    settings: Any,
    results: ResultOptions,
    context: Context,
) -> Result:
    """Judge what dictionaries detect over many concepts."""
    prepare(results)
    how = _work(work, context)
    given = _concepts(concepts)
    stream, saes, load = opened(inputs)
    methods = _methods(saes)
    x = _activations(stream)
    for name, sae in saes.items():
        controls = matched_controls(sae, x, n_draws=concepts.n_coresets, seed=settings.seed)
        of = f" of {name}" if len(saes) > 1 else ""
        methods += [replace(control, name=control.name + of) for control in controls]
    model = stream.model if work.n_workers == 1 else load
    del stream
    found = evaluate_detection(model, methods, given, **how, **vars(settings))
    return finish(found, inputs, results, settings)


def probes(
    inputs: EvidenceInputs,
    concepts: ConceptInputs,
    work: WorkInputs,
    settings: Any,
    results: ResultOptions,
    context: Context,
) -> Result:
    """Probe for many concepts through dictionaries."""
    prepare(results)
    how = _work(work, context)
    given = _concepts(concepts)
    stream, saes, load = opened(inputs)
    activations = dict.fromkeys((hooks_of(sae)[0] for sae in saes.values()), _activations(stream))
    model = stream.model if work.n_workers == 1 else load
    del stream
    found = evaluate_probes(model, saes, given, activations=activations, **how, **vars(settings))
    return finish(found, inputs, results, settings)


def steering(
    inputs: EvidenceInputs,
    concepts: ConceptChoice,
    work: WorkInputs,
    steered: SteeringInputs,
    settings: Any,
    results: ResultOptions,
    context: Context,
) -> Result:
    """Judge what dictionaries bring about over many concepts."""
    prepare(results)
    how = _work(work, context)
    if steered.prompts is None:
        raise UsageError("No prompts were named: --prompts=FILE, a JSON list or lines of texts and conversations.")
    if (steered.judge_url is None) != (steered.judge_model is None):
        raise UsageError("A judge at an endpoint needs both --judge_url=URL and --judge_model=NAME.")
    prompts, given = opening.texts_in(Path(steered.prompts), conversations=True), _concepts(concepts)
    stream, saes, load = opened(inputs)
    model = stream.model if work.n_workers == 1 else load
    del stream
    template: dict[str, Any] = {"chat_template_options": steered.chat_template_options}
    options = SamplingOptions(
        max_new_tokens=steered.max_new_tokens, temperature=steered.temperature, seed=settings.seed
    )
    if steered.judge_url is None or steered.judge_model is None:
        judges: dict[str, Judge] = {"embeddings": EmbeddingJudge(None, model, options=options, **template)}
    else:
        judges = {steered.judge_model: OpenAIJudge(steered.judge_url, steered.judge_model)}
    found = compare_steering(
        model, _methods(saes), given, judges, prompts=prompts, options=options, **how, **template,
        **vars(settings),
    )  # fmt: skip
    return finish(found, inputs, results, settings)


def _concepts(inputs: ConceptChoice) -> list[Concept]:
    if inputs.concepts is not None:
        return read_concepts(inputs.concepts)
    return packaged_concepts(inputs.names or None, n_per_side=inputs.n_per_side)


def _work(work: WorkInputs, context: Context) -> dict[str, Any]:
    """How an evaluation of concepts is done, as its keywords."""
    opening.check_writable(work.folder, "folder")
    if work.folder is not None:
        context.kept.append(f"Concepts that were finished are in {work.folder}; the same command goes on from there.")
    return vars(work) | {"progress": context.progress}


def _activations(stream: ActivationStream) -> Tensor:
    """What controls are made of."""
    kept = KeptStream(stream)
    return torch.cat([rows for batch in kept for rows in batch.activations.values()])


def _methods(saes: Mapping[str, SAE[Any]]) -> list[Method]:
    """The dictionaries as methods, a partition by either of its bases."""
    return [
        Method.from_dictionary(f"{name} {basis}" if basis else name, sae, basis=basis)
        for name, sae in saes.items()
        for basis in (("exemplar", "mean") if isinstance(sae, ExemplarPartition) else (None,))
    ]
