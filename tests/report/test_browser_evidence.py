"""The evidence page in a real browser: estimates and figures at their places, wide and narrow, and inert texts."""

import pytest

from saelens_ext.report.evidence_report import write_evidence_report
from tests.report import synthetic_evidence as made
from tests.report.browser import PHONE, WIDE
from tests.report.test_browser import CONTRAST

OPEN_ALL = "document.querySelectorAll('details').forEach((one) => (one.open = true))"


@pytest.fixture(scope="module")
def path(browser, tmp_path_factory):
    """The page, which ``visit`` opens."""
    sections = [made.make_section(), made.make_section(2, 9, hostile=False, n_lines=12, title="Detection")]
    return write_evidence_report(tmp_path_factory.mktemp("evidence") / "evidence.html", sections, about=made.ABOUT)


@pytest.mark.quick
@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_texts_are_inert(visit, size):
    page = visit(size=size)
    page.page.evaluate(OPEN_ALL)
    assert page.page.evaluate("window.pwned") is None
    assert page.page.locator("img, iframe, link[rel=stylesheet], form").count() == 0
    assert "<script>window.pwned=1</script>" in page.text(".verdict")


@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_marks_lie_between_the_ends_of_their_intervals(visit, size):
    page = visit(size=size)
    places = page.page.evaluate(
        """() => [...document.querySelectorAll('.forest-table tbody tr:not(.group)')].map((row) => {
          const box = (node) => node?.getBoundingClientRect();
          const mark = box(row.querySelector('[class^=mark-]')), whisker = box(row.querySelector('.whisker'));
          const plot = box(row.querySelector('svg'));
          return [mark.x + mark.width / 2, whisker?.left ?? null, whisker?.right ?? null, plot.left, plot.right];
        })"""
    )
    assert len(places) == 15 + 18 and places[0][1] is None
    for mark, low, high, left, right in places:
        assert left - 6 <= mark <= right + 6
        assert low is None or low - 1 <= mark <= high + 1
    assert len({round(left) for *_, left, _ in places}) <= 2 and places[0][4] - places[0][3] > 200


def test_a_line_is_picked_out_and_let_go(visit):
    page = visit()
    buttons = page.page.locator("#evidence-1 [data-figure='0'] .line-legend button")
    curves = "#evidence-1 [data-figure='0'] g.line"
    assert buttons.count() == 12 and page.page.locator(curves).count() == 12
    buttons.nth(3).click()
    assert page.page.locator(f"{curves}.faded").count() == 11 and buttons.nth(3).get_attribute("aria-pressed") == "true"
    page.page.focus("#evidence-1 [data-figure='0'] .line-legend li:nth-child(4) button")
    page.page.keyboard.press("Enter")
    assert page.page.locator(f"{curves}.faded").count() == 0


def test_curves_stay_within_their_frames_at_any_width(visit):
    page = visit()
    for width in (1280, 700, 390):
        page.page.set_viewport_size({"width": width, "height": 900})
        page.until(
            """[...document.querySelectorAll('.figures svg polyline')].every((curve) => {
              const svg = curve.closest('svg').getBoundingClientRect(), box = curve.getBoundingClientRect();
              return box.left >= svg.left && box.right <= svg.right + 1 && svg.right <= innerWidth;
            })"""
        )


@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_has_no_sideways_scroll(visit, width):
    page = visit(size=PHONE, has_touch=True)
    page.resize(width)
    page.page.evaluate(OPEN_ALL)
    assert page.overflow() <= 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(visit, scheme):
    page = visit(color_scheme=scheme)
    page.page.evaluate(OPEN_ALL)
    assert page.page.evaluate(CONTRAST) == []


def test_without_scripts_the_evidence_still_reads(visit):
    page = visit(java_script_enabled=False)
    assert page.page.is_visible("#evidence-0 .forest-table circle") and page.page.is_visible("#evidence-1 .verdict")
    assert "need JavaScript" in page.text("noscript") and not page.page.is_visible(".figures")


def test_the_navigation_leads_to_each_evaluation(visit):
    page = visit()
    page.page.click("nav a[href='#evidence-1']")
    page.until("Math.abs(document.querySelector('#evidence-1').getBoundingClientRect().top) < 60")
