"""What an audit found, of one prefix or of many, and the pages on it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedTokenizerBase

from saelens_ext.analysis.labels import Labels
from saelens_ext.analysis.profile import DictionaryProfile
from saelens_ext.continuations.audit_stages.config import AuditConfig
from saelens_ext.continuations.prefix_audit import PrefixAudit, PrefixOutline, verdict_of
from saelens_ext.continuations.validation.findings import Verdict
from saelens_ext.continuations.validation.results import Validation, combine_validations
from saelens_ext.report.audit.audit_report import write_audit_report
from saelens_ext.report.audit.index import write_audit_index


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Audit:
    """What an audit found; printed, its verdict."""

    prefixes: Sequence[PrefixAudit]
    """One per prefix, in the order given. Of several with a folder each is read from it when it is asked for."""
    config: AuditConfig
    """Its settings."""
    about: Mapping[str, Any]
    """The model, the dictionaries and the embedder; JSON-safe."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """Of the model."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Prefixes that could not be audited, and why."""

    @cached_property
    def outlines(self) -> tuple[PrefixOutline, ...]:
        """Of each prefix what an overview needs, without its continuations and signatures."""
        return tuple(prefix.outline() for prefix in self.prefixes)

    @property
    def validation(self) -> Validation | None:
        """All prefixes' tests together; None where no prefix has one."""
        found = [prefix.validation for prefix in self.outlines if prefix.validation is not None]
        return combine_validations(found) if found else None

    @cached_property
    def verdict(self) -> Verdict:
        """Does steering move continuations, mode by mode, does that need the joint clustering, are the modes stable and
        larger than the smallest size allowed: of all prefixes together, each with its figures.
        """
        return verdict_of(self.outlines)

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
        shown = self._shown() | {"profiles": profiles, "labels": labels, "tokenizer": self.tokenizer}
        heading = title or "Why the model continues in different ways"
        return write_audit_report(path, prefixes=self.prefixes, title=heading, **shown)

    def save_index(
        self,
        folder: str | Path,
        *,
        profiles: Mapping[str, DictionaryProfile] | None = None,
        labels: Mapping[str, Labels] | None = None,
        title: str = "",
    ) -> Path:
        """Write a page for each prefix, and one with a line for each: its modes, what steering moved, what was found.

        Args:
            folder: where ``index.html`` is written, and the others in ``pages`` below it.
            profiles: as for :meth:`save_html`, as are ``labels``.
            labels: likewise.
            title: heading of the index.

        Returns:
            The path of the index.
        """
        folder, links = Path(folder), []
        shown = self._shown() | {"profiles": profiles, "labels": labels, "tokenizer": self.tokenizer}
        for number, prefix in enumerate(self.prefixes):
            links.append(f"pages/{number:03d}.html")
            heading = f"Why the model continues prompt {number} in different ways"
            write_audit_report(folder / links[-1], prefixes=[prefix], title=heading, index="../index.html", **shown)
        return write_audit_index(
            folder / "index.html",
            outlines=self.outlines,
            verdict=self.verdict,
            links=links,
            failures=self.failures,
            **self._shown(),
            title=title or "Why the model continues prompts in different ways",
        )

    def _shown(self) -> dict[str, Any]:
        """What every page says of how the audit was made."""
        return {"about": self.about, "config": asdict(self.config)}
