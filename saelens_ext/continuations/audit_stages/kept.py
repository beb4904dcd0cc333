"""What an audit keeps in its folder, stage by stage, and how it knows the folder again."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from saelens_ext import _files
from saelens_ext.continuations.audit_stages.config import AuditConfig
from saelens_ext.continuations.audit_stages.questions import Question
from saelens_ext.continuations.continuation_set import ContinuationSet
from saelens_ext.continuations.prefix_audit import PrefixAudit
from saelens_ext.continuations.validation.results import Validation

FORMAT_VERSION = 1
# What is saved of a clustering: ``PrefixAudit.clustering_state``.
STATE_KEYS = ("params", "labels", "path", "not_validated")
JSON_FILENAME = "audit.json"
NOT_ASKED = "Steering was not asked for."


def own_folder(folder: str | Path | None, question: Question) -> Path | None:
    """The folder of one prefix, whatever the others are; unchecked."""
    return None if folder is None else Path(folder) / f"prefix_{_files.short_name(question.prompt)}"


def folder_for(
    folder: str | Path | None, question: Question, config: AuditConfig, about: Mapping[str, Any]
) -> Path | None:
    """The folder of one prefix, after a check that what lies there is of the same audit."""
    own = own_folder(folder, question)
    if own is None:
        return None
    asked = {"prefix": question.prompt, "continuations": question.digest}
    settings = _files.json_safe({**asked, "config": config.identity, "about": about})
    path = own / JSON_FILENAME
    # Until the first stage is through, there is nothing that other settings would not fit.
    if path.exists() and (own / "continuations").exists():
        content = _files.read_json(path, FORMAT_VERSION)
        changed = [name for name in settings if content.get(name) != settings[name]]
        if changed:
            changes = _differences(content, settings)
            detail = ", ".join(f"{key}: {old!r} there, {new!r} now" for key, old, new in changes)
            kinds = " and ".join(changed) + (f" ({detail})" if detail else "")
            raise ValueError(f"{own} holds an audit with another {kinds}. Use another folder, or the same settings.")
    else:
        own.mkdir(parents=True, exist_ok=True)
        _files.write_json(path, {"format_version": FORMAT_VERSION, **settings})
    return own


def _differences(content: Mapping[str, Any], settings: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Name, what was and what is, of the settings and of what was audited."""
    parts = [(content.get(part, {}), settings[part]) for part in ("config", "about")]
    entries = [(name, old.get(name, "nothing"), value) for old, new in parts for name, value in new.items()]
    return [entry for entry in entries if entry[1] != entry[2]]


class Stages:
    """Results of the stages of one prefix, in its folder if there is one."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def _saved(self, name: str) -> Path | None:
        path = None if self._folder is None else self._folder / name
        return path if path is not None and path.exists() else None

    def continuations(self) -> ContinuationSet | None:
        """The set as far as it got."""
        path = self._saved("continuations")
        return None if path is None else ContinuationSet.load(path)

    def keep(self, continuations: ContinuationSet) -> ContinuationSet:
        """Save the set."""
        if self._folder is not None:
            continuations.save(self._folder / "continuations")
        return continuations

    def clustering(self) -> dict[str, Any] | None:
        """The clustering, if that far."""
        path = self._saved("clustering.json")
        return None if path is None else _files.read_json(path, FORMAT_VERSION, STATE_KEYS)

    def keep_clustering(self, state: dict[str, Any]) -> dict[str, Any]:
        """Save the clustering."""
        if self._folder is not None:
            _files.write_json(self._folder / "clustering.json", {"format_version": FORMAT_VERSION, **state})
        return state

    def validation(self) -> Validation | None:
        """The tests by steering, if that far."""
        path = self._saved("validation.json")
        return None if path is None else Validation.load(path)

    def keep_validation(self, validation: Validation) -> Validation:
        """Save the tests."""
        if self._folder is not None:
            validation.save(self._folder / "validation.json")
        return validation

    def finished(self, validate: bool) -> bool:
        """Whether all stages are through."""
        state = self.clustering()
        return state is not None and (
            not validate or bool(state["not_validated"]) or self._saved("validation.json") is not None
        )

    def finished_audit(self) -> PrefixAudit:
        """The audit, once all stages are through."""
        rows, state, validation = self.continuations(), self.clustering(), self.validation()
        if rows is None or state is None:
            raise ValueError(f"{self._folder} no longer holds a finished audit; audit again with the same folder.")
        found = PrefixAudit.with_clusters(rows, state, validation)
        return found if found.not_validated or validation is not None else replace(found, not_validated=NOT_ASKED)


class KeptAudits(Sequence[PrefixAudit]):
    """Audits of prefixes that lie in a folder: each is read when it is asked for, and only the last one is held."""

    def __init__(self, stages: Sequence[Stages]) -> None:
        self._stages = list(stages)
        self._held: tuple[int, PrefixAudit] | None = None

    def __len__(self) -> int:
        return len(self._stages)

    @overload
    def __getitem__(self, index: int) -> PrefixAudit: ...
    @overload
    def __getitem__(self, index: slice) -> "KeptAudits": ...
    def __getitem__(self, index: int | slice) -> "PrefixAudit | KeptAudits":
        if isinstance(index, slice):
            return KeptAudits(self._stages[index])
        place = range(len(self))[index]
        if self._held is None or self._held[0] != place:
            self._held = None
            self._held = place, self._stages[place].finished_audit()
        return self._held[1]
