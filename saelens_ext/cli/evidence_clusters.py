"""The commands ``evidence clusters`` and ``evidence supernodes``: many prompts, and what causes continuations."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saelens_ext.cli import opening
from saelens_ext.cli.audit import check_named, subject_of
from saelens_ext.cli.errors import UsageError
from saelens_ext.cli.evidence import finish, prepare
from saelens_ext.cli.evidence_options import ClusterInputs, ResultOptions, SupernodeInputs
from saelens_ext.cli.output import Context, Result
from saelens_ext.continuations.audit_stages.config import AuditConfig
from saelens_ext.continuations.audit_stages.kept import Stages, own_folder
from saelens_ext.continuations.audit_stages.questions import questions
from saelens_ext.evals.continuations.clusterings import compare_clusterings
from saelens_ext.evals.continuations.clusters import evaluate_clusters
from saelens_ext.evals.continuations.supernodes import evaluate_supernodes, read_swaps
from saelens_ext.evals.evidence import Evidence
from saelens_ext.host.chat_template import Prompt

logger = logging.getLogger(__name__)


def clusters(inputs: ClusterInputs, settings: Any, results: ResultOptions, audited: Any, context: Context) -> Result:
    """Steer along joint clusters of many prefixes, and judge the clusterings on the same continuations."""
    prepare(results)
    if inputs.prefixes is None:
        raise UsageError("No prefixes were named: --prefixes=FILE, a JSON list, or a text in each line.")
    check_named(inputs)
    prefixes = opening.texts_in(Path(inputs.prefixes), conversations=True)
    config, folder = AuditConfig(**vars(audited)), Path(results.output_path) / "prefixes"
    cells = {"cells": inputs.cells} if inputs.cells else {}
    model, saes = subject_of(inputs, settings.n_workers)
    context.kept.append(f"Prefixes that were finished are in {folder}; the same command goes on from there.")
    found = evaluate_clusters(
        model, prefixes, saes, embedder=inputs.embedder, second_embedder=inputs.second_embedder, audit=config,
        sampler=inputs.sampler.made(inputs.model_name, folder), generate=config.generate, folder=folder,
        actor_options=inputs.actor_options, progress=context.progress, **cells, **vars(settings),
    )  # fmt: skip
    judged = _clusterings(found, prefixes, folder, config, settings) if inputs.clusterings else ()
    return finish(found, None, results, settings, *judged)


def _clusterings(
    found: Evidence, prefixes: Sequence[Prompt], folder: Path, config: AuditConfig, settings: Any
) -> list[Evidence]:
    """The clusterings of the continuations that were kept of these prefixes, judged on a part of them."""
    betas, gammas = (list(dict.fromkeys(axis)) for axis in zip(*found.settings["cells"], strict=True))
    options = {name: getattr(settings, name) for name in ("n_permutations", "confidence")}
    options |= {"held_out": config.held_out, "seed": config.seed}
    fewest = config.smallest_mode(round(config.n * (1 - config.held_out)))
    try:
        kept = [Stages(own_folder(folder, one)).continuations() for one in questions(prefixes, None)]
        sets = [one for one in kept if one is not None]
        return [compare_clusterings(sets, betas=betas, gammas=gammas, min_cluster_size=fewest, **options)]
    except ValueError as error:  # prefixes with too few continuations are named in the evidence
        logger.warning("The clusterings were not judged on held-out continuations: %s", error)
        return []


def supernodes(
    inputs: SupernodeInputs, settings: Any, results: ResultOptions, audited: Any, context: Context
) -> Result:
    """Group latents that act together over prompts, and judge whether the groups follow names or their roles."""
    prepare(results)
    if inputs.swaps is None:
        raise UsageError(
            'No prompts were named: --swaps=FILE, with {"prompt": …, "first": …, "second": …} in each line, two names '
            "that are in the prompt once each."
        )
    check_named(inputs)
    swaps, folder = read_swaps(inputs.swaps), Path(results.output_path) / "prompts"
    sampler = inputs.sampler.made(inputs.model_name, folder)
    model, saes = subject_of(inputs, settings.n_workers)
    context.kept.append(f"Prompts that were finished are in {folder}; the same command goes on from there.")
    found = evaluate_supernodes(
        model, swaps, saes, audit=AuditConfig(**vars(audited)), sampler=sampler, folder=folder,
        actor_options=inputs.actor_options, progress=context.progress, **vars(settings),
    )  # fmt: skip
    return finish(found, None, results, settings)
