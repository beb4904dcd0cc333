"""The report in a real browser: corpus text does nothing in it, and it can be used by hand, by key and on a phone."""

import math
import re

import pytest

from saelens_ext.report.dictionary.dictionary_report import write_dictionary_report
from tests.report import synthetic
from tests.report.browser import PHONE, REGIONS, WIDE

# --- safety ---


@pytest.mark.quick
@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_corpus_text_is_inert_and_nothing_is_requested(visit, path, inputs, size):
    page = visit(size=size)
    for region in range(0, REGIONS, 7):
        page.go_to(region)
    assert page.page.evaluate("window.pwned") is None
    assert page.page.locator("script").count() == 3
    assert page.page.locator("img, iframe, object, embed, link[rel=stylesheet], base, form").count() == 0
    assert [url for url in page.requests if url != path.as_uri()] == []
    # What a script injected by some other way would meet.
    page.page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.pwned = 2'}))"
    )
    assert page.page.evaluate("window.pwned") is None
    assert any("Content Security Policy" in complaint for complaint in page.complaints)
    page.complaints.clear()


def test_title_and_generations_are_shown_as_they_are(visit, inputs):
    page = visit()
    assert page.text("h1") == inputs.title
    assert page.page.title() == inputs.title
    assert page.texts(".generations h3") == [generation["label"] for generation in inputs.generations]
    shown = page.texts(".generations .text")
    assert shown[0] == "is Paris.\nIt lies on the Seine."
    assert shown[1] == '</p><script>window.pwned=1</script> & "friends" ⟨U+202E⟩abc'
    assert page.text("#steering .prompt").endswith("The capital of France")


# --- ways to a region ---


@pytest.mark.quick
def test_links_rows_and_the_back_button_select(visit, inputs):
    page = visit("#region-3")
    assert page.text("#detail-title").startswith("Region 3")
    page.page.locator("#region-rows tr").nth(1).locator(".column-coherence").click()
    second = page.rows()[1]
    page.wait_for(second)
    assert page.page.evaluate("location.hash") == f"#region-{second}"
    assert page.page.locator("tr.selected").get_attribute("data-region") == str(second)
    neighbour = page.page.locator(".neighbours a").first
    target = neighbour.get_attribute("href")
    neighbour.click()
    page.wait_for(int(target.removeprefix("#region-")))
    assert page.page.evaluate("location.hash") == target
    assert page.page.locator("tr.selected").get_attribute("data-region") == target.removeprefix("#region-")
    page.page.go_back()
    page.wait_for(second)


@pytest.mark.parametrize("name", [str(REGIONS), "-1", "<img src=x onerror=alert(1)>", "%E0%A4%A", ""])
def test_an_address_of_no_region_is_answered(visit, name):
    page = visit(f"#region-{name}")
    assert page.text("#detail-title") == "No such region"
    assert f"run from 0 to {REGIONS - 1}" in page.text("#detail-body")


def test_the_page_can_be_used_by_keyboard(visit, inputs):
    page = visit()
    page.page.focus("#search")
    for _ in range(80):
        page.page.keyboard.press("Tab")
        if page.page.evaluate("document.activeElement.matches('#region-rows a')"):
            break
    page.page.keyboard.press("Tab")
    target = page.page.evaluate("document.activeElement.getAttribute('href')")
    page.page.keyboard.press("Enter")
    assert page.page.evaluate("location.hash") == target
    page.page.focus("#region-head [data-column=coherence]")
    page.page.keyboard.press("Enter")
    assert page.page.get_attribute("th.column-coherence", "aria-sort") == "descending"
    assert page.page.evaluate("document.activeElement.dataset.column") == "coherence"
    before = page.page.evaluate("location.hash")
    page.page.focus("#map-chart svg")
    visited = set()
    for key in ("ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"):
        page.page.keyboard.press(key)
        visited.add(page.page.evaluate("location.hash"))
    assert visited - {before}
    before = page.page.evaluate("location.hash")
    page.page.focus("#detail-on")
    page.page.keyboard.press("Enter")
    assert page.page.evaluate("location.hash") != before


# --- sizes, themes, other ways to look ---


def test_phone_has_no_sideways_scroll_and_shows_the_details(visit, inputs):
    page = visit(size=PHONE, has_touch=True)
    assert page.overflow() == 0
    row = page.page.locator("#region-rows tr").nth(2)
    region = int(row.get_attribute("data-region"))
    row.locator(".column-mass").click()
    page.until("document.querySelector('#detail').getBoundingClientRect().top < 100")
    page.wait_for(region)
    for other in (0, 4, 8, 12, 92):
        page.go_to(other)
        assert page.overflow() == 0
    page.page.select_option("#sort", "id")
    assert page.rows() == list(range(10))
    page.page.click("#sort-direction")
    assert page.rows()[0] == REGIONS - 1
    page.resize(320)


@pytest.mark.parametrize("width", [1280, 900, 720])
def test_no_sideways_scroll_at_other_widths(visit, width):
    assert visit(size={"width": width, "height": 800}).overflow() == 0


CONTRAST = """() => {
  const channel = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = parse(getComputedStyle(node).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || node.closest("svg, script, style, noscript, [aria-disabled=true]")) continue;
    const pair = [light(parse(getComputedStyle(node).color)), light(behind(node))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < 4.5)
      poor.push(`${node.tagName}.${node.className} ${ratio.toFixed(2)} ${node.textContent.slice(0, 30)}`);
  }
  return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(visit, scheme):
    page = visit(color_scheme=scheme)
    dark = page.page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((v) => v < 60)")
    assert dark == (scheme == "dark")
    assert page.page.evaluate(CONTRAST) == []


def test_print_shows_everything_in_one_column(visit):
    page = visit()
    page.page.emulate_media(media="print")
    assert not page.page.is_visible("nav") and not page.page.is_visible("#search")
    assert page.page.evaluate("getComputedStyle(document.querySelector('#detail')).position") == "static"
    assert len(page.page.pdf()) > 10_000


def test_without_scripts_the_summary_still_reads(visit):
    page = visit(java_script_enabled=False)
    assert page.text("#fact-regions b") == str(REGIONS)
    assert "need JavaScript" in page.text("noscript")
    assert not page.page.is_visible("#region-table") and page.page.is_visible(".generations")


# --- extremes ---


def other_page(tmp_path, inputs, k, n_examples=10):
    fit = synthetic.make_fit(inputs.tokenizer, k, percentile=None)
    profile = synthetic.make_profile(fit, n_examples=n_examples)
    path = tmp_path / "other.html"
    return write_dictionary_report(
        path, fits=[fit], chosen=fit, profile=profile, tokenizer=inputs.tokenizer, title="other"
    )


@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_one_region(visit, inputs, tmp_path, size):
    page = visit(file=other_page(tmp_path, inputs, 1), size=size)
    assert page.text("#detail-title").startswith("Region 0")
    assert "There is no other region" in page.text("#detail-body") and "No logit lens" in page.text("#detail-body")
    assert page.rows() == [0] and page.text("#measure-separation b") == "–"
    assert page.page.is_disabled("#detail-on") and page.overflow() == 0


COUNT_WORK = """() => {
  window.work = { compared: 0, made: 0, changed: 0 };
  const sort = Array.prototype.sort;
  Array.prototype.sort = function (compare) {
    return sort.call(this, compare && ((a, b) => (work.compared++, compare(a, b))));
  };
  for (const name of ["createElement", "createElementNS"]) {
    const make = document[name];
    document[name] = (...of) => (work.made++, make.apply(document, of));
  }
  const observer = new MutationObserver((changes) => (work.changed += changes.length));
  observer.observe(document.body, { attributes: true, childList: true, subtree: true });
}"""


@pytest.mark.slow
def test_five_thousand_regions_stay_quick(visit, inputs, tmp_path):
    """Comparisons are those of one sort; of the table one page is made anew, and a mark on the map changes once."""
    page = visit(file=other_page(tmp_path, inputs, 5000, n_examples=2))
    page.page.click("#map .reading summary")
    assert page.page.locator(".disc").count() == 5000 and "principal components" in page.text("#map-projection")
    page.page.evaluate(COUNT_WORK)
    for step in (
        lambda: page.page.evaluate("document.querySelector('[data-column=nearest]').click()"),
        lambda: page.page.fill("#search", "function"),
        lambda: page.go_to(4321),
    ):
        page.page.evaluate("Object.assign(work, { compared: 0, made: 0, changed: 0 })")
        step()
        work = page.page.evaluate("work")
        assert work["compared"] < 5000 * math.log2(5000) and work["made"] < 600 and work["changed"] < 5000
    assert 25 < int(re.search(r"of ([\d,]+) matching", page.text("#region-count")).group(1).replace(",", "")) < 5000
