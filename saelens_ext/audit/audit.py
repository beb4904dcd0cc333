"""The audit of a model's continuations as one call: sample, embed, attribute, cluster, test by steering.

Each stage leaves its result in a folder, if one is given, and is not repeated when the same audit is called again with
that folder: an audit that was interrupted goes on where it was.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sae_lens import SAE
from transformers import PreTrainedTokenizerBase
from typing_extensions import Unpack

from saelens_ext import _checks
from saelens_ext._modes import standard_modes
from saelens_ext.analysis.labels import Labels
from saelens_ext.analysis.profile import DictionaryProfile
from saelens_ext.audit.config import AuditConfig, AuditOptions
from saelens_ext.audit.stages import Stages, describe, folder_for
from saelens_ext.continuations.attribution.attribute import attribute_continuations
from saelens_ext.continuations.clustering.joint_clusterer import JointClusterer, rate_distortion_path
from saelens_ext.continuations.clustering.stability import NoEligiblePoint, choose_point
from saelens_ext.continuations.continuation_set import ContinuationSet
from saelens_ext.continuations.embed import embed_continuations, visible_rows
from saelens_ext.continuations.prefix_audit import PrefixAudit, verdict_of
from saelens_ext.continuations.sample import sample_continuations
from saelens_ext.continuations.validation.controls import NothingToTest
from saelens_ext.continuations.validation.findings import Verdict
from saelens_ext.continuations.validation.options import ValidationOptions
from saelens_ext.continuations.validation.results import Validation, combine_validations
from saelens_ext.continuations.validation.validate import validate_clusters
from saelens_ext.host.models import HostModel, tokenizer_of
from saelens_ext.host.sentence_model import load_sentence_model
from saelens_ext.report.audit.audit_report import write_audit_report

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Audit:
    """What an audit found; printed, its verdict."""

    prefixes: tuple[PrefixAudit, ...]
    """One per prefix, in the order given."""
    config: AuditConfig
    """Its settings."""
    about: Mapping[str, Any]
    """The model, the dictionaries and the embedder; JSON-safe."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """Of the model."""

    @property
    def validation(self) -> Validation | None:
        """All prefixes' tests together; None where no prefix has one."""
        found = [prefix.validation for prefix in self.prefixes if prefix.validation is not None]
        return combine_validations(found) if found else None

    @cached_property
    def verdict(self) -> Verdict:
        """Does steering move continuations, mode by mode, does that need the joint clustering, are the modes stable and
        larger than the smallest size allowed: of all prefixes together, each with its figures.
        """
        return verdict_of(self.prefixes)

    def __repr__(self) -> str:
        return str(self.verdict)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per continuation: prefix, text, probabilities, mode."""
        return pd.concat([prefix.to_dataframe() for prefix in self.prefixes], ignore_index=True)

    def modes(self) -> pd.DataFrame:
        """One row per mode of each prefix."""
        return pd.concat([prefix.modes() for prefix in self.prefixes], ignore_index=True)

    def save_html(
        self,
        path: str | Path,
        *,
        profiles: Mapping[str, DictionaryProfile] | None = None,
        labels: Mapping[str, Labels] | None = None,
        title: str = "",
    ) -> Path:
        """Write the report on it, one page that needs nothing else.

        Args:
            path: the file to write.
            profiles: of the dictionaries, by the name of their hook, to show what distinguishing latents respond to.
            labels: of the profiles' latents, by the same names, from :func:`label_latents`.
            title: heading of the page.

        Returns:
            The path written.
        """
        return write_audit_report(
            path,
            prefixes=self.prefixes,
            about=self.about,
            config=asdict(self.config),
            profiles=profiles,
            labels=labels,
            tokenizer=self.tokenizer,
            title=title or "Why the model continues in different ways",
        )


@_checks.names_options(AuditConfig)
@standard_modes()
def audit_continuations(
    model: HostModel,
    prefixes: str | Sequence[str],
    dictionaries: SAE[Any] | Sequence[SAE[Any]],
    embedder: Any = None,
    *,
    folder: str | Path | None = None,
    progress: bool = False,
    **options: Unpack[AuditOptions],
) -> Audit:
    """Ask why a model continues a prefix in different ways, and test the answer.

    Args:
        model: any TransformerLens model, no SAE attached.
        prefixes: one or several.
        dictionaries: SAEs or transcoders whose latents the continuations are attributed to, and steered by.
        embedder: a sentence-transformers model, its name or folder, or None for the packaged one.
        folder: where results are kept, stage by stage; what is there from the same audit is used.
        progress: show progress bars.
        **options: fields of :class:`AuditConfig`.

    Returns:
        For each prefix its modes, what distinguishes them, and the effects of steering along them with all controls.

    Raises:
        ValueError: no prefix, or one twice; an unknown option; a folder that holds an audit with other settings, models
            or dictionaries; and what the stages raise.

    Examples:
        >>> audit = sx.audit_continuations(
        ...     model, "The assert statement", [partition], n=16, max_new_tokens=4, n_clusters=(1, 8), validate=False
        ... )
        >>> sorted({"text", "weight"} - set(audit.modes().columns))
        []
    """
    given = _checks.texts([prefixes] if isinstance(prefixes, str) else prefixes, "prefixes")
    if len(set(given)) != len(given):
        raise ValueError(f"prefixes must all be different, got {given!r}.")
    config = _checks.from_options(AuditConfig, options, "The audit")
    saes = [dictionaries] if isinstance(dictionaries, SAE) else list(dictionaries)
    embedder = load_sentence_model(embedder)
    about = describe(model, saes, embedder)
    stages = [Stages(folder_for(folder, number, prefix, config, about)) for number, prefix in enumerate(given)]
    found, failed = [], {}
    for prefix, own in zip(given, stages, strict=True):
        try:
            found.append(_audit(model, prefix, saes, embedder, config, own, progress))
        except ValueError as error:
            if len(given) == 1:
                raise
            # The others are finished first; their results are in the folder.
            failed[prefix] = error
    if failed:
        prefix, error = next(iter(failed.items()))
        raise ValueError(f"{len(failed)} of {len(given)} prefixes could not be audited; {prefix!r}: {error}") from error
    return Audit(prefixes=tuple(found), config=config, about=about, tokenizer=tokenizer_of(model))


def _audit(
    model: HostModel,
    prefix: str,
    saes: list[SAE[Any]],
    embedder: Any,
    config: AuditConfig,
    stages: Stages,
    progress: bool,
) -> PrefixAudit:
    """All stages of one prefix."""
    rows = stages.continuations()
    if rows is None:
        names = ("temperature", "top_p", "max_new_tokens", "stop", "seed", "weights", "chat_template")
        options = {name: getattr(config, name) for name in names}
        rows = stages.keep(sample_continuations(model, prefix, config.n, progress=progress, **options))
    if rows.embeddings is None:
        rows = _only(rows, visible_rows(rows, embedder), "the embedder sees no text in them")
        rows = stages.keep(embed_continuations(rows, embedder, mode=config.embedding, progress=progress))
    if rows.signatures is None:
        options = {"backend": config.backend, "max_sources": config.max_sources}
        rows = attribute_continuations(model, saes, rows, progress=progress, **options)
        has_effect = torch.as_tensor(rows.both_views()[1].any(axis=1))
        rows = stages.keep(_only(rows, has_effect, "no source of the prefix has an effect on them"))
    state = stages.clustering()
    if state is None:
        state = stages.keep_clustering(_cluster(rows, config).clustering_state())
    found = PrefixAudit.with_clusters(rows, state, None)
    reason = found.not_validated or ("" if config.validate else "Steering was not asked for.")
    validation = stages.validation()
    if validation is None and not reason:
        how = {name: getattr(config, name) for name in ("strengths", "top", "max_rows", "seed")}
        try:
            validation = validate_clusters(
                model, saes, rows, found.clusterer, ValidationOptions(**how), progress=progress
            )
            stages.keep_validation(validation)
        except NothingToTest as error:
            # Modes without two members or without a latent are a finding, not the end of the audit.
            logger.warning("The modes of %r could not be tested by steering: %s", prefix, error)
            reason = str(error)
    return replace(found, validation=validation, not_validated=reason)


def _only(continuations: ContinuationSet, usable: torch.Tensor, why_not: str) -> ContinuationSet:
    """The continuations that can be clustered; a ValueError if they are fewer than two."""
    left_out = [continuations.texts[row] for row in (~usable).nonzero().flatten().tolist()]
    if left_out:
        said = "%d of %d continuations are left out, such as %r: %s."
        logger.warning(said, len(left_out), len(continuations), left_out[0], why_not)
    if (n := int(usable.sum())) < 2:
        raise ValueError(
            f"{continuations.prompt!r} gave {n} continuation(s) to cluster; an audit needs at least two. Raise "
            "temperature, top_p or max_new_tokens."
        )
    return continuations.select(usable) if left_out else continuations


def _cluster(continuations: ContinuationSet, config: AuditConfig) -> PrefixAudit:
    """Cluster at every beta and gamma and take the most stable clustering within the numbers of modes allowed."""
    e, a = continuations.both_views()
    weights = continuations.weights.double().numpy()
    smallest = config.min_cluster_size or max(2, len(continuations) // 16)
    common: dict[str, Any] = {"min_cluster_size": smallest, "random_state": config.seed}
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
