"""The audit of a model's continuations as one call: sample, embed, attribute, cluster, test by steering.

Each stage leaves its result in a folder, if one is given, and is not repeated when the same audit is called again with
that folder: an audit that was interrupted goes on where it was.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from saelens_ext import _checks
from saelens_ext.audit.result import Audit
from saelens_ext.continuations.audit_stages.config import AuditConfig, AuditOptions
from saelens_ext.continuations.audit_stages.kept import KeptAudits, Stages, folder_for, own_folder
from saelens_ext.continuations.audit_stages.progress import AuditBar
from saelens_ext.continuations.audit_stages.questions import Continuations, Question, questions
from saelens_ext.continuations.audit_stages.stages import audit_prefix
from saelens_ext.continuations.prefix_audit import PrefixAudit
from saelens_ext.continuations.subject import Dictionaries, Inputs, Model, Sampling, Subject, let_go
from saelens_ext.host.chat_template import Prompt
from saelens_ext.host.models import tokenizer_of
from saelens_ext.ops.modes import standard_modes
from saelens_ext.workers.spread import WORKERS, Job, spread


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
                audited = audit_prefix(subject, given[number], config, stages[number], progress, bar)
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
            audit_prefix(subject, given[number], config, own, progress=False, bar=AuditBar(1, show=False))
        except ValueError as error:
            return str(error)
        return None

    return work
