"""The audit's page in a real browser: one continuation on two maps, one mode at a time, by hand and by key, wide and
narrow.
"""

import pytest

from saelens_ext.report.audit.audit_report import write_audit_report
from tests.report import synthetic_audit as made
from tests.report.browser import PHONE, WIDE
from tests.report.test_browser import CONTRAST

OPEN_ALL = "document.querySelectorAll('details').forEach((one) => (one.open = true))"
MAPS = ("meaning", "mechanism")


@pytest.fixture(scope="module")
def audits():
    return [
        made.make_audit(template=("<|user|>\n", "\n<|assistant|>")),
        made.make_audit(60, 12, prompt="Second prefix", seed=3, validated=False),
        made.make_audit(20, 1, prompt="One mode", slopes={}),
    ]


@pytest.fixture(scope="module")
def path(audits, browser, tmp_path_factory):
    """The audit's report, which ``visit`` opens."""
    return write_audit_report(
        tmp_path_factory.mktemp("audit") / "audit.html",
        prefixes=audits,
        about=made.ABOUT,
        config=made.CONFIG,
        profiles={made.HOOKS[0]: made.make_profile()},
        tokenizer=made.tokenizer(),
    )


def centre(page, map_name, row, key="p0"):
    box = page.page.locator(f'#{key}-map-{map_name} path[data-row="{row}"]').bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def circled(page, kind):
    """Rows that the rings of a kind stand on, per map; None where there is no ring."""
    return page.page.evaluate(
        """(kind) => ["meaning", "mechanism"].map((name) => {
          const map = document.querySelector(`#p0-map-${name}`), ring = map.querySelector(`.${kind}`);
          if (ring.getAttribute("visibility") === "hidden") return null;
          const at = [Number(ring.getAttribute("cx")), Number(ring.getAttribute("cy"))];
          const dots = [...map.querySelectorAll(".dot")].map((dot) => {
            const [x, y] = dot.getAttribute("transform").match(/-?[\\d.]+/g).map(Number);
            return [Math.hypot(x - at[0], y - at[1]), Number(dot.dataset.row)];
          });
          return dots.filter(([away]) => away < 0.2).map(([, row]) => row);
        })""",
        kind,
    )


def alone(page, map_name):
    """The row whose mark on a map has most room about it."""
    return page.page.evaluate(
        """(name) => {
          const dots = [...document.querySelectorAll(`#p0-map-${name} .dot`)].map((dot) => {
            const box = dot.getBoundingClientRect();
            return { row: Number(dot.dataset.row), x: box.x + box.width / 2, y: box.y + box.height / 2 };
          });
          const distance = (a, b) => Math.hypot(a.x - b.x, a.y - b.y);
          const room = (one) => Math.min(...dots.filter((dot) => dot !== one).map((dot) => distance(dot, one)));
          return dots.reduce((best, dot) => (room(dot) > room(best) ? dot : best)).row;
        }""",
        map_name,
    )


def test_pointing_at_a_continuation_shows_it_on_both_maps(visit, audits):
    page = visit()
    page.page.locator("#p0-maps").scroll_into_view_if_needed()
    for name in MAPS:
        row = alone(page, name)
        page.page.mouse.move(*centre(page, name, row))
        page.until(f"document.querySelector('#p0-map-{name} .tooltip').textContent.includes('continuation {row}')")
        assert all(row in rows for rows in circled(page, "halo"))
        tooltip = page.text(f"#p0-map-{name} .tooltip")
        assert f"Mode {audits[0].labels[row]}" in tooltip and "log-probability −" in tooltip
        assert audits[0].continuations.texts[row][:20].strip() in tooltip
    page.page.mouse.move(2, 2)
    assert circled(page, "halo") == [None, None]


def test_a_click_keeps_a_continuation_and_leads_to_its_mode(visit, audits):
    page = visit()
    page.page.locator("#p0-map-meaning").scroll_into_view_if_needed()
    row = alone(page, "meaning")
    page.page.mouse.click(*centre(page, "meaning", row))
    page.page.mouse.move(2, 2)
    assert all(row in rows for rows in circled(page, "ring"))
    mode = int(audits[0].labels[row])
    assert f"Mode {mode} · continuation {row}" in page.text("#p0-readout")
    page.page.click("#p0-readout a")
    top = f"document.querySelector('#p0-mode-{mode}').getBoundingClientRect().top"
    page.until(f"Math.abs({top}) < 60 || scrollY + innerHeight > document.body.scrollHeight - 2")


def test_lists_and_maps_are_linked_both_ways(visit):
    page = visit()
    entry = page.page.locator("#p0-mode-1 .members li").nth(2)
    row = int(entry.get_attribute("data-row"))
    entry.hover()
    assert all(row in rows for rows in circled(page, "halo"))
    entry.locator("a").click()
    page.until(f"document.querySelector('#p0-readout').textContent.includes('continuation {row}')")
    assert all(row in rows for rows in circled(page, "ring"))
    assert page.page.evaluate("location.hash") == f"#p0-row-{row}"
    fresh = visit(f"#p0-row-{row}")
    assert f"continuation {row}" in fresh.text("#p0-readout")


@pytest.mark.slow
def test_a_mode_filters_maps_cards_and_table(visit, audits):
    page = visit()
    page.page.click('.overview .mode-button[data-mode="1"]')
    faded = page.page.eval_on_selector_all(
        "#p0-map-mechanism .dot.faded", "(dots) => dots.map((dot) => Number(dot.dataset.row))"
    )
    assert sorted(faded) == [row for row in range(90) if audits[0].labels[row] != 1]
    assert page.page.locator("#p0 article.mode:visible").count() == 1 and page.page.is_visible("#p0-mode-1")
    assert page.page.get_attribute('.legend-modes [data-mode="1"]', "aria-pressed") == "true"
    assert page.page.get_attribute("#p0 .overview tr.chosen", "data-mode") == "1"
    # A link to what is filtered out lets it in again, and so does a second press.
    page.page.evaluate("location.hash = 'p0-mode-2'")
    page.until("document.querySelectorAll('#p0 .dot.faded').length === 0")
    assert page.page.is_visible("#p0-mode-2")
    for _ in range(2):
        page.page.click('.legend-modes [data-mode="0"]')
    assert page.page.locator("#p0 .dot.faded").count() == 0
    assert page.page.get_attribute("#p0-maps .all-modes", "aria-pressed") == "true"


def test_the_page_can_be_used_by_keyboard(visit, audits):
    page = visit()
    page.page.focus('.overview .mode-button[data-mode="2"]')
    page.page.keyboard.press("Enter")
    page.page.focus("#p0-map-meaning svg")
    seen = []
    for key in ("ArrowRight", "ArrowLeft", "ArrowLeft", "ArrowUp", "ArrowDown", "ArrowRight"):
        page.page.keyboard.press(key)
        seen.append(page.text("#p0-readout").split("\n")[0])
    medoid = audits[0].clusterer.medoid_indices_[2]
    assert f"Mode 2 · continuation {medoid}" in seen[0] and len(set(seen)) > 1
    assert all("Mode 2" in heading for heading in seen)
    page.page.keyboard.press("Escape")
    assert circled(page, "ring") == [None, None] and "No continuation is chosen" in page.text("#p0-readout")
    page.page.focus("#p0-curve-meaning svg")
    read = set()
    for _ in range(4):
        page.page.keyboard.press("ArrowRight")
        read.add(page.text("#p0-curve-readout"))
    assert len(read) > 2


def test_plots_are_those_of_the_tests(visit, audits):
    page = visit()
    assert page.texts("#p0-dose-charts h3")[:2] == ["modes by meaning alone", "modes by mechanism alone"]
    assert (
        page.page.locator("#p0-dose-charts figure").count() == 7
        and page.page.locator("#p0-dose-charts .whisker").count() == 7 * 2 * 5
    )
    members = audits[0].validation.members
    last = members[(members["strength"] == 1) & (members["method"] == "joint")]
    for choice, mode in (("0", None), ("2", 1)):
        page.page.select_option("#p0-dose-mode", choice)
        for m, measure in enumerate(("demeaned_logit", "mean_log_prob", "log_prob")):
            page.page.select_option("#p0-dose-measure", str(m))
            rows = last[(last["measure"] == measure) & ((last["joint_cluster"] == mode) if mode is not None else True)]
            shown = page.texts("#p0 .dose-table tbody tr")[0]
            assert f"{rows['change'].mean():+.3f}"[:5] in shown
    assert page.page.locator("#p0-curve .ring").count() == 2
    assert page.text("#p0-curve-readout").startswith("This report: γ 0.3, β 1 — 3 modes")


def test_prefixes_are_shown_one_at_a_time(visit):
    page = visit()
    assert page.page.is_visible("#p0-verdict") and not page.page.is_visible("#p1-verdict")
    page.page.select_option("#prefix-choice", "p1")
    page.until("!document.querySelector('#p1').hidden && document.querySelector('#p0').hidden")
    assert page.page.locator("#p1-map-meaning .dot").count() == 60
    marks = page.page.eval_on_selector_all(
        "#p1-map-meaning .dot", "(dots) => dots.map((dot) => dot.getAttribute('class') + dot.getAttribute('d'))"
    )
    assert len(set(marks)) == 12
    page.page.click('#prefix-table a[href="#p2"]')
    page.until("!document.querySelector('#p2').hidden")
    assert page.page.input_value("#prefix-choice") == "p2" and page.page.locator("#p1-dose").count() == 0
    page.page.go_back()
    page.until("!document.querySelector('#p1').hidden")


@pytest.mark.parametrize("part", ["", "#p1", "#p2"])
def test_a_phone_has_no_sideways_scroll(visit, part):
    page = visit(part, size=PHONE, has_touch=True)
    assert page.overflow() == 0
    page.page.evaluate(OPEN_ALL)
    assert page.overflow() == 0
    page.resize(320)


def test_a_tap_chooses_a_continuation(visit):
    page = visit(size=PHONE, has_touch=True)
    page.page.locator("#p0-map-meaning svg").scroll_into_view_if_needed()
    row = alone(page, "meaning")
    page.page.touchscreen.tap(*centre(page, "meaning", row))
    page.until(f"document.querySelector('#p0-readout').textContent.includes('continuation {row}')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(visit, scheme):
    page = visit(color_scheme=scheme, size=WIDE)
    page.page.evaluate(OPEN_ALL)
    assert page.page.evaluate(CONTRAST) == []
    assert page.page.evaluate("window.pwned") is None


def test_without_scripts_the_findings_still_read(visit):
    page = visit(java_script_enabled=False)
    assert (
        page.page.is_visible("#p1-verdict") and page.page.is_visible("#p0-mode-2") and page.page.is_visible("#p0-tests")
    )
    assert not page.page.is_visible("#p0-maps") and not page.page.is_visible("#prefix-choice")


def test_print_shows_every_mode(visit):
    page = visit()
    page.page.click('.overview .mode-button[data-mode="1"]')
    page.page.emulate_media(media="print")
    assert page.page.is_visible("#p0-mode-0") and len(page.page.pdf()) > 10_000
