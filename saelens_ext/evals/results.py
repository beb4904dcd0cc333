"""Results of evaluations in files: a page and its figures in a folder, and what a dictionary's card says of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saelens_ext import _files
from saelens_ext.evals.evidence import Evidence
from saelens_ext.report.evidence_report import write_evidence_report
from saelens_ext.report.evidence_section import BESIDE_FILENAME

PAGE_FILENAME, RESULTS_FILENAME = "evidence.html", "results.json"


def save_evidence(
    found: Sequence[Evidence], directory: str | Path, *, about: Mapping[str, Any] | None = None, title: str = "Evidence"
) -> dict[str, Path]:
    """Write one page and one JSON file about evaluations, and the raw values of each in a folder of its kind.

    Args:
        found: evaluations, each of another kind.
        directory: where to.
        about: what was evaluated, by name.
        title: of the page.

    Returns:
        The page and the JSON file, as "page" and "results".

    Raises:
        ValueError: none, or two of one kind.
    """
    directory = Path(directory)
    kinds = [one.kind for one in found]
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"Evaluations must be of different kinds, got {', '.join(kinds)}; save them in two folders.")
    for one in found:
        one.save(directory / one.kind)
    content = {"about": dict(about or {}), **{one.kind: results(one) for one in found}}
    _files.write_json(directory / RESULTS_FILENAME, _files.json_safe(content))
    page = write_evidence_report(directory / PAGE_FILENAME, [one.section() for one in found], about=about, title=title)
    return {"page": page, "results": directory / RESULTS_FILENAME}


def results(found: Evidence) -> dict[str, Any]:
    """An evaluation as JSON: the question, the verdict, the tables and the settings."""
    content = {
        "question": found.question,
        "verdict": found.verdict(),
        "summary": found.summary().to_dict("records"),
        "comparisons": found.comparisons().to_dict("records"),
        "failures": list(map(str, found.failures)),
        "settings": found.settings,
    }
    return _files.json_safe(content)


def write_beside(found: Evidence, folder: str | Path) -> Path:
    """Put the verdict and the figures of an evaluation beside the dictionary that it is of, for its card and report.

    Those of other kinds that are there stay.
    """
    path = Path(folder) / BESIDE_FILENAME
    known = _files.read_json(path) if path.exists() else {}
    own = {"title": found.title, "verdict": found.verdict(), "figures": found.figures()}
    _files.write_json(path, _files.json_safe(known | {found.kind: own}))
    return path
