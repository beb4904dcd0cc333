"""The evidence page's file itself: what it says, that texts are inert in it, and what is refused."""

import re
from dataclasses import replace

import pytest

from saelens_ext.report.evidence_report import _axis, _cell, write_evidence_report
from saelens_ext.report.evidence_section import (
    AnswerSet,
    EvidenceTable,
    ForestPlot,
    ForestRow,
    HeatMap,
    Line,
    LineFigure,
)
from saelens_ext.report.page import _hash
from tests.report import synthetic_evidence as made
from tests.report.parsed_page import Page


def write(folder, sections, **options):
    return write_evidence_report(folder / "new" / "evidence.html", sections, **options).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    sections = [made.make_section(), made.make_section(hostile=False, kind="detection", title="Detection")]
    return write(tmp_path_factory.mktemp("evidence"), sections, about=made.ABOUT, title="Evidence of <b>")


def test_no_text_becomes_markup(page):
    found = Page(page)
    assert found.tags.count("script") == 3 and not {"img", "iframe", "object"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on") or name == "style"]
    addresses = [value for name, value in found.attributes if name in ("href", "src")]
    assert all(address.startswith("#") or address == "data:," for address in addresses)
    assert "\u202e" not in page and "innerHTML" not in page and "url(" not in page
    for block in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL):
        assert not set("<>&") & set(block)


def test_the_policy_names_the_hashes_of_style_and_script(page):
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1).replace("&#39;", "'")
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL).group(1)
    script = re.search(r'<script type="module">(.*?)</script>', page, re.DOTALL).group(1)
    assert f"style-src '{_hash(style)}'" in policy and f"script-src '{_hash(script)}'" in policy
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy


def test_everything_of_a_section_is_said(page):
    text = Page(page).text
    for said in (
        "Does it find unfamiliar text?", "EP is no better than as many random activations.", "set: 2", "no interval",
        "0.610", "1,234", "false positive rate", "Documents.", "What it is", "entropy on code", "rates 0.01, 0.05",
        "SmolLM2-135M-Instruct", "Paired differences.", "chance, 0.5", "judged here", "control or baseline",
    ):  # fmt: skip
        assert said in text, said
    assert page.count('class="whisker ') == 2 * 15 - 2  # those without an interval have a mark alone


def test_the_same_evidence_gives_the_same_file(tmp_path):
    sections = [made.make_section()]
    assert write(tmp_path, sections) == write(tmp_path, sections)


def test_marks_lie_at_their_values(tmp_path):
    rows = [ForestRow(label=str(e), estimate=e, low=e - 0.1, high=e + 0.1, n_units=9) for e in (0.3, 0.5, 0.7)]
    page = write(tmp_path, [made.make_section(forest=ForestPlot(axis="AUROC", rows=tuple(rows), chance=0.5))])
    ticks = re.findall(r'<text x="([\d.]+)%"[^>]*>([\d.]+)</text>', page)
    place = {float(text): float(x) for x, text in ticks}
    (low, high) = (min(place), max(place))
    assert low <= 0.2 and high >= 0.8
    for value, x in zip((0.3, 0.5, 0.7), re.findall(r'<circle class="mark-unsupervised" cx="([\d.]+)%"', page)[1:]):
        assert float(x) == pytest.approx(100 * (value - low) / (high - low), abs=0.01)


@pytest.mark.parametrize(
    "values", [(0.5, 0.5), (0.101, 0.899), (-3.0, 5.0), (1e-6, 2e-6), (-0.02, 0.01), (0.0, 0.0), (1234.0, 98765.0)]
)
def test_axes_hold_all_values_between_round_numbers(values):
    rows = tuple(ForestRow(label="a", estimate=v, low=v, high=v, n_units=3) for v in values)
    low, high, ticks = _axis(ForestPlot(axis="x", rows=rows))
    assert low <= min(values) + 1e-12 and high >= max(values) - 1e-12 and low < high
    assert 2 <= len(ticks) <= 7 and ticks[0][0] == pytest.approx(low) and ticks[-1][0] == pytest.approx(high)
    shown = [f"{at:.{digits}f}" for at, digits in ticks]
    assert len(set(shown)) == len(shown)


@pytest.mark.parametrize(
    "value, column, shown",
    [
        (0.123456, "value", "0.123"), (-0.5, "value", "−0.500"), (0.00004, "value", "4.0e−05"), (0.0, "value", "0.000"),
        (1.0, "p_holm", "1"), (0.03456, "p", "0.035"), (1234, "n_units", "1,234"), (25, "n_units", "25"),
        (float("nan"), "value", "–"), (None, "value", "–"), (True, "found", "yes"), ("a<b", "set", "a<b"),
        (1, "n_units", "1"), (0, "n_undefined", "0"),
    ],
)  # fmt: skip
def test_cells_are_rounded_to_what_is_read(value, column, shown):
    assert _cell(value, column) == shown


def test_what_cannot_be_shown_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sections is empty"):
        write(tmp_path, [])
    section = made.make_section()
    table = EvidenceTable(title="T", columns=("a", "b"), rows=(("x",),))
    with pytest.raises(ValueError, match="'T' of .* has 2 columns and a row of 1"):
        write(tmp_path, [replace(section, tables=(table,))])
    figure = LineFigure(title="F", x_label="x", y_label="y", lines=(Line(label="l", x=(1.0, 2.0), y=(1.0,)),))
    with pytest.raises(ValueError, match="'l' of 'F' has 2 x and 1 y"):
        write(tmp_path, [replace(section, figures=(figure,))])
    row = ForestRow(label="m", estimate=float("nan"), low=0.0, high=1.0, n_units=3)
    with pytest.raises(ValueError, match="estimate of 'm' is nan"):
        write(tmp_path, [replace(section, forest=ForestPlot(axis="x", rows=(row,)))])
    with pytest.raises(ValueError, match="kind of a forest row must be one of"):
        write(tmp_path, [replace(section, forest=ForestPlot(axis="x", rows=(replace(row, estimate=1.0, kind="k"),)))])


def heat_map(**changes):
    given = {
        "title": "Change", "row_label": "percentile", "column_label": "seed", "rows": ("4", "8"), "columns": ("0", "1"),
        "values": ((0.0, -1.0), (-0.5, None)), "texts": (("9 regions", "a"), ("b", made.HOSTILE)), "low": 0, "high": -1,
    }  # fmt: skip
    return HeatMap(**given | changes)


def test_heat_maps_and_answers_are_shown_as_text(tmp_path):
    answers = (
        AnswerSet(prompt=f"How? {made.HOSTILE}", answers={"no ablation": "I cannot.", "region 3": made.HOSTILE}),
    )
    page = write(tmp_path, [made.make_section(hostile=False, heat_maps=(heat_map(),), answers=answers)])
    text = Page(page).text
    for said in (
        "Change",
        "percentile",
        "9 regions",
        "−1.00",
        "−0.50",
        "Answers side by side",
        "I cannot.",
        "region 3",
    ):
        assert said in text, said
    assert re.findall(r'class="heat heat-(\d+)"', page) == ["0", "10", "5", "0"]
    assert not {"img"} & set(Page(page).tags) and Page(page).tags.count("script") == 2


@pytest.mark.parametrize(
    "changes", [{"values": ((0.0,), (1.0,))}, {"rows": ("4",)}, {"texts": (("a", "b"),)}, {"high": 0}]
)
def test_a_heat_map_of_another_shape_is_refused(tmp_path, changes):
    with pytest.raises(ValueError, match="heat map 'Change'"):
        write(tmp_path, [made.make_section(heat_maps=(heat_map(**changes),))])
