"""The report on an audit of continuations: a single HTML file that opens anywhere and asks the network for nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from saelens_ext.analysis.labels import Labels
from saelens_ext.analysis.profile import DictionaryProfile
from saelens_ext.continuations.prefix_audit import PrefixAudit, verdict_of
from saelens_ext.continuations.validation.figures import fixed
from saelens_ext.continuations.validation.findings import MEASURE, STATISTIC
from saelens_ext.report.audit import tests_section
from saelens_ext.report.audit.maps import maps_data
from saelens_ext.report.audit.modes import ExampleFinder, modes_of, prefix_tokens, weighs_draws
from saelens_ext.report.audit.path import one_cluster, path_data, path_rows
from saelens_ext.report.audit.settings import dictionary_hooks, facts, settings_rows
from saelens_ext.report.audit.wording import quoted, shortened
from saelens_ext.report.format import count, percentage, visible
from saelens_ext.report.page import embed_json, write_page

STYLES = ("dictionary.css", "audit.css")
SCRIPTS = (
    "text.js",
    "line_chart.js",
    "audit_marks.js",
    "item_map.js",
    "audit_maps.js",
    "audit_path.js",
    "audit_dose.js",
    "audit_page.js",
)


# What the sum of a mode's weights is, by how the continuations were weighed.
_MASSES = {"uniform": "Fraction of distinct continuations", "path": "Fraction of their summed probability"}
_DRAWN = "Fraction of all drawn"


def write_audit_report(
    path: str | Path,
    *,
    prefixes: Sequence[PrefixAudit],
    about: Mapping[str, Any],
    config: Mapping[str, Any],
    profiles: Mapping[str, DictionaryProfile] | None = None,
    labels: Mapping[str, Labels] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    title: str = "Audit of continuations",
    index: str = "",
) -> Path:
    """Write what an audit found about one prefix or several as one self-contained HTML file.

    For each prefix: the prompt, whether steering bore the modes out, the modes with their members and distinguishing
    sources, two linked maps of the same continuations, the rate-distortion curve, and the tests with all controls.

    Text of the model is shown as text only: the page carries a content security policy under which nothing but its own
    script runs and nothing is fetched. The same arguments give the same file, on one machine.

    Args:
        path: the file to write, replaced in one step and returned; missing directories are made.
        prefixes: the audits, at least one, each of another prefix.
        about: the model, the dictionaries and the embedder, as ``Audit.about`` has them; what is missing is not shown.
        config: settings of the audit, by name.
        profiles: of the dictionaries, by the name of their hook, to show what the distinguishing latents respond to,
            and ``labels`` of their latents, by the same names.
        tokenizer: of the model, which turns ids into text; needed for ``profiles``. Without it the prefix's tokens are
            those that the sources name.
        title: heading of the page.
        index: address of the page that leads to this one, if there is one.

    Raises:
        ValueError: no prefix; profiles without a tokenizer; or a prefix whose continuations have no embeddings or
            signatures.
    """
    _check(prefixes, profiles, tokenizer)
    finder = ExampleFinder(profiles, tokenizer, dictionary_hooks(about), labels)
    shown = [_prefix(number, audit, finder, tokenizer, config) for number, audit in enumerate(prefixes)]
    return write_page(
        path,
        "audit.html",
        styles=STYLES,
        scripts=SCRIPTS,
        title=title,
        index=index,
        prefixes=shown,
        together=tests_section.shown_verdict(verdict_of(prefixes)),
        settings=settings_rows(about, config),
    )


def _check(prefixes: Sequence[PrefixAudit], profiles: Mapping[str, Any] | None, tokenizer: Any) -> None:
    if not prefixes:
        raise ValueError("prefixes is empty; a report needs the audit of at least one.")
    for audit in prefixes:
        audit.continuations.both_views()
    if profiles and tokenizer is None:
        raise ValueError("profiles hold token ids, which need a tokenizer to be read; pass tokenizer= of the model.")


def _prefix(
    number: int,
    audit: PrefixAudit,
    finder: ExampleFinder,
    tokenizer: PreTrainedTokenizerBase | None,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    modes = modes_of(audit, finder, prefix_tokens(audit, tokenizer))
    maps, curve, tests = maps_data(audit), path_data(audit), audit.validation
    data = {
        "key": f"p{number}",
        "maps": maps,
        "modes": [{"mark": mode.mark, "share": mode.share} for mode in modes],
        "mode_of": audit.labels.tolist(),
        "medoids": [mode.medoid.row for mode in modes],
        "path": curve,
        "dose": None if tests is None else tests_section.dose_data(tests),
    }
    return {
        "key": f"p{number}",
        "label": shortened(quoted(audit.continuations.prompt), 70),
        **_prompt(audit),
        "verdict": tests_section.shown_verdict(audit.verdict),
        "facts": facts(audit, config),
        "modes": modes,
        "n": count(len(audit.continuations)),
        "maps": {
            name: {"share": percentage(maps[name]["share"]), "metric": maps[name]["metric"]}
            for name in ("meaning", "mechanism")
        },
        "n_drawn": count(len(maps["rows"])),
        "all_drawn": len(maps["rows"]) == len(audit.continuations),
        "path": path_rows(audit),
        "beta": f"{audit.clusterer.beta:g}",
        "gamma": f"{audit.clusterer.gamma:g}",
        "mass": _DRAWN if weighs_draws(audit) else _MASSES.get(str(config.get("weights")), "Weight"),
        "drawn": "count" in audit.continuations.columns and not weighs_draws(audit),
        "least": count(audit.clusterer.min_cluster_size),
        "whole": fixed(one_cluster(audit)[0], 2),
        "tests": None if tests is None else _tests(audit),
        "data": embed_json(data),
    }


def _tests(audit: PrefixAudit) -> dict[str, Any]:
    validation = audit.validation
    assert validation is not None
    columns, rows = tests_section.specificity_cells(validation)
    groups = tests_section.comparisons(validation)
    settings = validation.settings
    return {
        "n_measured": count(validation.members["row"].nunique()),
        "top": settings["top"],
        "strongest": f"{settings['specificity_strength']:g}",
        "n_permutations": count(int(settings["n_permutations"])),
        "n_bootstrap": count(int(settings["n_bootstrap"])),
        "columns": columns,
        "rows": rows,
        "specificity": audit.verdict["by_mode"].evidence,
        "claim": [line.removeprefix("- ") for line in validation.claim(MEASURE, STATISTIC).splitlines()],
        "main": groups[0],
        "others": groups[1:],
        "generated": tests_section.generated_rows(validation),
    }


def _prompt(audit: PrefixAudit) -> dict[str, Any]:
    """The text that was continued, in pieces: what was given, of a conversation each message, and the template."""
    rows = audit.continuations
    given = [one["content"].strip() for one in rows.metadata.get("messages") or [{"content": rows.prompt}]]
    pieces, rest = [], rows.prefix
    for said in given:
        before, found, after = rest.partition(said)
        pieces, rest = ([*pieces, (before, False), (said, True)], after) if found and said else (pieces, rest)
    whole = [*pieces, (rest, False)] if pieces else [(rest, True)]
    return {
        "pieces": [(visible(text), is_given) for text, is_given in whole if text],
        "templated": rows.prompt != rows.prefix,
    }
