"""The stages of the audit of one prefix, in order: sample, embed, attribute, cluster, test by steering."""

import logging
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from saelens_ext.continuations.answers import mark_answers
from saelens_ext.continuations.attribution.attribute import attribute_continuations
from saelens_ext.continuations.audit_stages.config import AuditConfig
from saelens_ext.continuations.audit_stages.kept import NOT_ASKED, Stages
from saelens_ext.continuations.audit_stages.progress import AuditBar
from saelens_ext.continuations.audit_stages.questions import Question
from saelens_ext.continuations.clustering.joint_clusterer import JointClusterer, rate_distortion_path
from saelens_ext.continuations.clustering.stability import NoEligiblePoint, choose_point
from saelens_ext.continuations.continuation_set import ContinuationSet
from saelens_ext.continuations.embed import embed_continuations, embed_visible, visible_rows
from saelens_ext.continuations.prefix_audit import PrefixAudit
from saelens_ext.continuations.sample import sample_continuations
from saelens_ext.continuations.subject import Subject
from saelens_ext.continuations.validation.controls import NothingToTest
from saelens_ext.continuations.validation.validate import validate_clusters

logger = logging.getLogger(__name__)


def audit_prefix(
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
