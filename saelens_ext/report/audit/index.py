"""The index of an audit of many prompts: for each its modes, what moved, what was found, and a link to its page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saelens_ext.continuations.prefix_audit import PrefixOutline
from saelens_ext.continuations.validation.figures import fixed, interval_decimals, p_value
from saelens_ext.continuations.validation.findings import MEASURE, STATISTIC, Finding, Verdict
from saelens_ext.continuations.validation.methods import NOTHING
from saelens_ext.report.audit.settings import settings_rows
from saelens_ext.report.audit.tests_section import shown_verdict
from saelens_ext.report.audit.wording import quoted, shortened
from saelens_ext.report.format import count, percentage
from saelens_ext.report.page import write_page

_MODES_SHOWN, _LONGEST, _PROMPT = 3, 60, 160


class IndexLine(NamedTuple):
    """One prompt."""

    number: int
    prompt: str
    link: str
    n: str
    n_modes: int
    modes: tuple[tuple[str, str, bool], ...]
    """The largest: the fraction, the typical text, whether it is as small as a mode may be."""
    n_more: int
    moved: str
    moved_by: str
    own: str
    findings: tuple[Finding, ...]


def write_audit_index(
    path: str | Path,
    *,
    outlines: Sequence[PrefixOutline],
    verdict: Verdict,
    links: Sequence[str],
    failures: Mapping[str, str],
    about: Mapping[str, Any],
    config: Mapping[str, Any],
    title: str,
) -> Path:
    """Write the index as one self-contained HTML file, which links to the pages of the prompts beside it.

    Args:
        path: the file to write, replaced in one step and returned; missing directories are made.
        outlines: of the prompts, at least one.
        verdict: of all of them together.
        links: to the page of each, relative to the index.
        failures: prompts that could not be audited, and why.
        about: the model, the dictionaries and the embedder.
        config: settings of the audit, by name.
        title: heading of the page.
    """
    if not outlines or len(outlines) != len(links):
        raise ValueError(
            f"An index needs one prompt or more and a link for each, got {len(outlines)} and {len(links)}."
        )
    return write_page(
        path,
        "audit_index.html",
        styles=("dictionary.css", "audit.css", "audit_index.css"),
        scripts=("text.js", "audit_index.js"),
        title=title,
        together=shown_verdict(verdict),
        lines=[_line(number, *pair) for number, pair in enumerate(zip(outlines, links, strict=True))],
        failures=[(quoted(prompt), quoted(why)) for prompt, why in failures.items()],
        settings=settings_rows(about, config),
    )


def _line(number: int, outline: PrefixOutline, link: str) -> IndexLine:
    modes = outline.modes.sort_values("weight", ascending=False, kind="stable").to_dict("records")
    moved, moved_by = _moved(outline)
    return IndexLine(
        number=number,
        prompt=_middle_left_out(quoted(outline.prompt)),
        link=link,
        n=count(outline.n_continuations),
        n_modes=len(modes),
        modes=tuple(
            (percentage(mode["weight"]), shortened(quoted(mode["text"]), _LONGEST), bool(mode["at_floor"]))
            for mode in modes[:_MODES_SHOWN]
        ),
        n_more=max(0, len(modes) - _MODES_SHOWN),
        moved=moved,
        moved_by=moved_by,
        own=_own(outline),
        findings=shown_verdict(outline.verdict).findings,
    )


def _moved(outline: PrefixOutline) -> tuple[str, str]:
    """The change per unit of strength along own directions, and its interval and p-value; or why there is none."""
    if outline.validation is None:
        return "", quoted(outline.not_validated)
    table = outline.validation.summary()
    rows = table[(table["measure"] == MEASURE) & (table["statistic"] == STATISTIC) & (table["control"] == NOTHING)]
    row: Any = next(rows.itertuples())
    if not row.n_units:
        return "", "No held-out continuation has a direction."
    decimals = interval_decimals(row.low, row.high, row.difference)
    low, high, change = (fixed(value, decimals, plus=True) for value in (row.low, row.high, row.difference))
    return change, f"{low} to {high}, p = {p_value(row.p_holm)}"


def _own(outline: PrefixOutline) -> str:
    """How many modes their own direction moves most."""
    if outline.validation is None:
        return ""
    table = outline.validation.specificity_summary()
    table = table[table["measure"] == MEASURE]
    n, share = int(table["n_clusters"].sum()), table["own_is_largest_of_cluster"].to_numpy(dtype=np.float64)
    return f"{round(float(share[0]) * n)} of {n}" if len(share) == 1 and np.isfinite(share[0]) else ""


def _middle_left_out(prompt: str) -> str:
    """A long prompt by how it begins and ends: conversations that ask the same often begin otherwise."""
    return prompt if len(prompt) <= _PROMPT else f"{prompt[: _PROMPT // 2]} … {prompt[-_PROMPT // 2 :]}"
