"""The index of an audit of many prompts in a real browser: every prompt findable, wide and narrow, and inert texts."""

import pytest

from saelens_ext.continuations.prefix_audit import verdict_of
from saelens_ext.report.audit.index import write_audit_index
from tests.report import synthetic_audit as made
from tests.report.browser import PHONE, WIDE
from tests.report.test_browser import CONTRAST

N = 100


@pytest.fixture(scope="module")
def path(browser, tmp_path_factory):
    """An index of a hundred prompts, three different ones over and over, which ``visit`` opens."""
    outlines = [
        made.make_audit(template=("<|user|>\n", "\n<|assistant|>")).outline(),
        made.make_audit(60, 12, prompt="Second prefix, " + "which is long, " * 30, seed=3, validated=False).outline(),
        made.make_audit(20, 1, prompt="One mode", slopes={}).outline(),
    ]
    return write_audit_index(
        tmp_path_factory.mktemp("audit") / "index.html",
        outlines=[outlines[number % 3] for number in range(N)],
        verdict=verdict_of(outlines),
        links=[f"pages/{number:03d}.html" for number in range(N)],
        failures={f"Failed {made.HOSTILE}": f"gave 1 continuation {made.HOSTILE}"},
        about=made.ABOUT,
        config=made.CONFIG,
        title="A hundred prompts",
    )


@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_every_prompt_has_a_line_and_a_link(visit, size):
    page = visit(size=size)
    rows = page.page.locator("#prompt-table tbody tr")
    assert rows.count() == N and page.overflow() == 0
    links = page.page.eval_on_selector_all("#prompt-table th a", "all => all.map((one) => one.getAttribute('href'))")
    assert links == [f"pages/{number:03d}.html" for number in range(N)]
    if size is PHONE:  # where a line is a card, every figure says what it is
        labels = "all => all.map((one) => getComputedStyle(one, '::before').content)"
        shown = page.page.eval_on_selector_all("#prompt-table tr:nth-child(1) td", labels)
        assert shown[:2] == ['"Modes"', '"Moved"'] and len(shown) == 8 and "none" not in shown
    assert page.page.evaluate("window.pwned") is None and page.page.locator("img, iframe, form").count() == 0
    assert made.HOSTILE in page.text("#failures")


def test_words_find_prompts(visit):
    page = visit()
    shown = "document.querySelectorAll('#prompt-table tbody tr:not([hidden])').length"
    page.page.fill("#search", "SECOND long")
    page.until(f"{shown} === 33")
    assert page.text("#n-shown") == "33 of 100"
    page.page.fill("#search", "nothing like it")
    page.until(f"{shown} === 0")
    page.page.fill("#search", "")
    page.until(f"{shown} === 100")
    assert page.page.locator("#n-shown").inner_text() == ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(visit, scheme):
    page = visit(color_scheme=scheme)
    assert page.page.evaluate(CONTRAST) == []
