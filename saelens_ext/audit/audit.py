"""The audit of a model's continuations as one call: sample, embed, attribute, cluster, test by steering.

Each stage leaves its result in a folder, if one is given, and is not repeated when the same audit is called again with
that folder: an audit that was interrupted goes on where it was.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Unpack

from saelens_ext import _checks
from saelens_ext.audit.config import AuditConfig, AuditOptions
from saelens_ext.audit.progress import AuditBar
from saelens_ext.audit.questions import Continuations, Question, questions
from saelens_ext.audit.result import Audit
from saelens_ext.audit.stages import NOT_ASKED, KeptAudits, Stages, folder_for, own_folder
from saelens_ext.audit.subject import Dictionaries, Inputs, Model, Sampling, Subject, let_go
from saelens_ext.continuations.answers import mark_answers
from saelens_ext.continuations.attribution.attribute import attribute_continuations
from saelens_ext.continuations.clustering.joint_clusterer import JointClusterer, rate_distortion_path
from saelens_ext.continuations.clustering.stability import NoEligiblePoint, choose_point
from saelens_ext.continuations.continuation_set import ContinuationSet
from saelens_ext.continuations.embed import embed_continuations, embed_visible, visible_rows
from saelens_ext.continuations.prefix_audit import PrefixAudit
from saelens_ext.continuations.sample import sample_continuations
from saelens_ext.continuations.validation.controls import NothingToTest
from saelens_ext.continuations.validation.validate import validate_clusters
from saelens_ext.host.chat_template import Prompt
from saelens_ext.host.models import tokenizer_of
from saelens_ext.ops.modes import standard_modes
from saelens_ext.workers.spread import WORKERS, Job, spread

logger = logging.getLogger(__name__)


@_checks.names_options(AuditConfig)
@standard_modes()
def audit_continuations(
    model: Model,
    prefixes: Prompt | Sequence[Prompt],
    dictionaries: Dictionaries,
    embedder: Any = None,
    *,
    continuations: Continuations | str | None = None,
    sampler: Sampling = None,
    folder: str | Path | None = None,
    n_workers: int = 1,
    workers: str = "joblib",
    actor_options: dict[str, Any] | None = None,
    on_failure: str = "raise",
    progress: bool = False,
    **options: Unpack[AuditOptions],
) -> Audit:
    """Ask why a model continues a prefix in different ways, and test the answer.

    Args:
        model: any TransformerLens model, no SAE attached, or a function without arguments that loads it.
        prefixes: one or several, each a text, or a conversation: messages with "role" and "content", of which the last
            may be the beginning of the answer.
        dictionaries: SAEs or transcoders whose latents the continuations are attributed to, and steered by, or a
            function of the model that loads them.
        embedder: a sentence-transformers model, its name or folder, or None for the packaged one.
        continuations: what is audited instead of samples, scored with the model: of one prefix a list of texts or of
            token ids, of several a mapping from each prefix to such a list, or a JSONL file or log of Inspect that
            :func:`read_continuations` reads. Equal ones are one, with their ``count``.
        sampler: where continuations are sampled instead of from the model, which scores them, or a function without
            arguments that makes it; see :func:`sample_continuations`.
        folder: where results are kept, stage by stage; what is there from the same audit is used. With it, an audit
            of several prefixes holds one of them in memory at a time.
        n_workers: prefixes audited at a time, each by a worker with a model of its own: ``model`` must then be a
            function, and ``folder`` must be on storage that all share. The function is called here too, to tell what
            is audited; that model is let go before workers load theirs. With the same number of threads the results
            are the same to the bit.
        workers: "joblib", processes or what ``joblib.parallel_config`` names ("dask", for example); or "ray", actors
            on the cluster that ``ray.init`` was called for, or on this machine.
        actor_options: Ray's resources of an actor, such as ``{"num_gpus": 1}``; one CPU by default.
        on_failure: "raise" a ValueError when all prefixes were tried and one could not be audited, or "record" it in
            ``Audit.failures``, unless all failed.
        progress: show progress bars.
        **options: fields of :class:`AuditConfig`.

    Returns:
        For each prefix its modes, what distinguishes them, and the effects of steering along them with all controls.

    Raises:
        ValueError: no prefix, or one twice; an unknown option; both continuations and a sampler; a folder that holds an
            audit with other settings, models, dictionaries or samplers; several workers without a folder, or with a
            model that is not a function; and what the stages raise.
        RuntimeError: a worker died, or an endpoint did not answer; the same call goes on from what was finished.

    Examples:
        >>> audit = sx.audit_continuations(
        ...     model, "The assert statement", [partition], n=16, max_new_tokens=4, n_clusters=(1, 8), betas=(1.0,),
        ...     gammas=(0.5,), validate=False,
        ... )
        >>> sorted({"text", "weight"} - set(audit.modes().columns))
        []
    """
    given = questions(prefixes, continuations)
    if sampler is not None and continuations is not None:
        raise ValueError("continuations and sampler are both given; continuations that are there are not sampled.")
    config = _checks.from_options(AuditConfig, options, "The audit")
    if config.chat_template_options and not config.chat_template and all(isinstance(q.prompt, str) for q in given):
        raise ValueError("chat_template_options do nothing for texts; set chat_template=True, or give conversations.")
    _checks.choice(on_failure, ("raise", "record"), "on_failure")
    inputs = Inputs(model=model, dictionaries=dictionaries, embedder=embedder, sampler=sampler)
    _checks.choice(workers, WORKERS, "workers")
    inputs.check_workers(_checks.positive(n_workers, "n_workers"))
    if n_workers > 1 and folder is None:
        raise ValueError(
            f"n_workers={n_workers} needs folder=, on storage that all workers share: they leave their results there."
        )
    subject = inputs.load()
    tokenizer, about = tokenizer_of(subject.model), subject.about
    stages = [Stages(folder_for(folder, one, config, about)) for one in given]
    missing = [number for number, own in enumerate(stages) if not own.finished(config.validate)]
    found: dict[int, PrefixAudit] = {}
    if n_workers > 1 and missing:
        del subject
        let_go()
        load = partial(_job, inputs, about, tuple(given), config, Path(folder or ""))
        errors = spread(load, missing, workers, n_workers, actor_options, progress)
    else:
        keep = folder is None or len(given) == 1
        errors = _here(subject, given, missing, stages, config, progress, found if keep else None)
    if errors and (on_failure == "raise" or len(errors) == len(given)):
        number, error = next(iter(sorted(errors.items())))
        raise ValueError(
            f"{len(errors)} of {len(given)} prefixes could not be audited; {given[number].words!r}: {error}"
        )
    audits = [number for number in range(len(given)) if number not in errors]
    several = folder is not None and len(given) > 1
    return Audit(
        prefixes=KeptAudits([stages[number] for number in audits])
        if several
        else tuple(found[n] if n in found else stages[n].finished_audit() for n in audits),
        config=config,
        about=about,
        tokenizer=tokenizer,
        failures={given[number].words: error for number, error in sorted(errors.items())},
    )


def _here(
    subject: Subject,
    given: Sequence[Question],
    missing: Sequence[int],
    stages: Sequence[Stages],
    config: AuditConfig,
    progress: bool,
    found: dict[int, PrefixAudit] | None,
) -> dict[int, str]:
    """Audit in this process; errors by number. What is found is put into ``found``, if it is to be held."""
    errors: dict[int, str] = {}
    with AuditBar(len(missing), progress) as bar:
        for number in missing:
            try:
                audited = _audit(subject, given[number], config, stages[number], progress, bar)
                if found is not None:
                    found[number] = audited
                del audited  # before the next prompt
            except ValueError as error:
                if len(given) == 1:
                    raise
                # The others are finished first; their results are in the folder.
                errors[number] = str(error)
            bar.end_prompt()
    return errors


def _job(inputs: Inputs, about: Mapping[str, Any], given: Sequence[Question], config: AuditConfig, folder: Path) -> Job:
    """What a worker does for the number of a prefix; the model is loaded here."""
    subject = inputs.load_as(about)

    def work(number: int) -> str | None:
        try:
            own = Stages(own_folder(folder, given[number]))
            _audit(subject, given[number], config, own, progress=False, bar=AuditBar(1, show=False))
        except ValueError as error:
            return str(error)
        return None

    return work


def _audit(
    subject: Subject, question: Question, config: AuditConfig, stages: Stages, progress: bool, bar: AuditBar
) -> PrefixAudit:
    """All stages of one prefix."""
    model, saes, embedder = subject.model, subject.saes, subject.embedder
    rows = attributed(subject, question, config, stages, progress, bar)
    state = stages.clustering()
    if state is None:
        bar.begin("clustering")
        state = stages.keep_clustering(choose_clustering(rows, config).clustering_state())
    found = PrefixAudit.with_clusters(rows, state, None)
    reason = found.not_validated or ("" if config.validate else NOT_ASKED)
    validation = stages.validation()
    if validation is None and not reason:
        bar.begin("testing by steering")
        embed = partial(embed_visible, embedder=embedder, mode=config.embedding, **config.per_pass)
        more: dict[str, Any] = {"generate": config.generate, "embed": embed, "progress": progress, **config.per_pass}
        try:
            validation = validate_clusters(model, saes, rows, found.clusterer, config.validation_options(), **more)
            stages.keep_validation(validation)
        except NothingToTest as error:
            # Modes without two members or without a latent are a finding, not the end of the audit.
            logger.warning("The modes of %r could not be tested by steering: %s", rows.prompt, error)
            reason = str(error)
            stages.keep_clustering(state | {"not_validated": reason})
    return replace(found, validation=validation, not_validated=reason)


def sampled(
    subject: Subject, question: Question, config: AuditConfig, *, n: int, seed: int, progress: bool = False
) -> ContinuationSet:
    """Continuations of a prefix as an audit draws them, with its answers marked."""
    names = ("temperature", "top_p", "max_new_tokens", "stop", "weights", "chat_template", "chat_template_options")
    options: dict[str, Any] = {name: getattr(config, name) for name in names}
    options |= {"seed": seed, "sampler": subject.sampler, "progress": progress, **config.per_pass}
    return _answers(subject, sample_continuations(subject.model, question.prompt, n, **options), config)


def _answers(subject: Subject, rows: ContinuationSet, config: AuditConfig) -> ContinuationSet:
    if not config.answer_after:
        return rows
    return mark_answers(subject.model, rows, after=config.answer_after, missing="exclude")


def attributed(
    subject: Subject,
    question: Question,
    config: AuditConfig,
    stages: Stages | None = None,
    progress: bool = False,
    bar: AuditBar | None = None,
) -> ContinuationSet:
    """The continuations of a prefix with both views: sampled (or scored), embedded and attributed.

    Raises:
        ValueError: fewer than two continuations that can be clustered, and what the stages raise.
    """
    model, saes, embedder = subject.model, subject.saes, subject.embedder
    stages, bar = stages or Stages(None), bar or AuditBar(1, show=False)
    rows = stages.continuations()
    if rows is None:
        bar.begin("sampling")
        if question.given is None:
            rows = sampled(subject, question, config, n=config.n, seed=config.seed, progress=progress)
        else:
            rows = _answers(subject, question.scored(model, config), config)
        rows = stages.keep(rows)
    if rows.embeddings is None:
        bar.begin("embedding")
        rows = _only(rows, visible_rows(rows, embedder), "the embedder sees no text in them")
        how: dict[str, Any] = {"mode": config.embedding, "progress": progress, **config.per_pass}
        rows = stages.keep(embed_continuations(rows, embedder, **how))
    if rows.signatures is None:
        bar.begin("attributing")
        options = {"backend": config.backend, "max_sources": config.max_sources}
        rows = attribute_continuations(model, saes, rows, progress=progress, **options, **config.per_pass)
        has_effect = torch.as_tensor(rows.both_views()[1].any(axis=1))
        rows = stages.keep(_only(rows, has_effect, "no source of the prefix has an effect on them"))
    return rows


def _only(continuations: ContinuationSet, usable: torch.Tensor, why_not: str) -> ContinuationSet:
    """The continuations that can be clustered; a ValueError if they are fewer than two."""
    left_out = [continuations.texts[row] for row in (~usable).nonzero().flatten().tolist()]
    if left_out:
        said = "%d of %d continuations are left out, such as %r: %s."
        logger.warning(said, len(left_out), len(continuations), left_out[0], why_not)
    if (n := int(usable.sum())) < 2:
        remedy = "Give more that differ" if "given" in continuations.metadata else "Raise n, temperature, top_p or"
        raise ValueError(
            f"{continuations.prompt!r} gave {n} continuation(s) to cluster; an audit needs at least two. {remedy}"
        )
    return continuations.select(usable) if left_out else continuations


def choose_clustering(continuations: ContinuationSet, config: AuditConfig) -> PrefixAudit:
    """Cluster at every beta and gamma and take the most stable clustering within the numbers of modes allowed."""
    e, a = continuations.both_views()
    weights = continuations.weights.double().numpy()
    common: dict[str, Any] = {"min_cluster_size": config.smallest_mode(len(continuations)), "random_state": config.seed}
    path = rate_distortion_path(e, a, config.betas, config.gammas, sample_weight=weights, **common)
    table, scores, reason = path.to_dataframe(), {}, ""
    how = {"n_resamples": config.n_resamples, "random_state": config.seed}
    try:
        choice = choose_point(path, clusters=config.n_clusters, **how)
        point, scores = choice.point, {(point.beta, point.gamma): stability for point, stability in choice.table}
    except NoEligiblePoint as error:
        # That there are not so many modes at these weights is a finding, which the nearest clustering shows.
        (fewest, most), sizes = config.n_clusters, [point.n_clusters for point in path.points]
        n, point = min(zip(sizes, path.points), key=lambda pair: (max(fewest - pair[0], pair[0] - most), pair[0]))
        nearest = f"The nearest to the number of modes asked for, {n}, is shown."
        reason = f"{'No modes were found.' if n == 1 else nearest} {error}"
        logger.warning("%r: %s", continuations.prompt, reason)
    cells = list(zip(table["beta"], table["gamma"], strict=True))
    table["stability"] = [scores[cell].mean if cell in scores else float("nan") for cell in cells]
    table["stability_se"] = [scores[cell].standard_error if cell in scores else float("nan") for cell in cells]
    clusterer = JointClusterer(point.beta, point.gamma, init=point.labels, **common)
    clusterer.fit(e, a, sample_weight=weights)
    return PrefixAudit(
        continuations=continuations, clusterer=clusterer, path=table, validation=None, not_validated=reason
    )
