"""The part on SNMF features in a real browser: two parts on one page, ways to a feature, and what is shown of one."""

import pytest

from saelens_ext.report.dictionary.dictionary_report import write_dictionary_report
from tests.report import synthetic_snmf
from tests.report.browser import PHONE, WIDE
from tests.report.synthetic_snmf import RANKS, UNREACHED
from tests.report.test_browser import CONTRAST


@pytest.fixture(scope="module")
def section(inputs):
    return synthetic_snmf.make_section(inputs.tokenizer)


@pytest.fixture(scope="module")
def both(inputs, section, tmp_path_factory):
    """A report with regions and features."""
    return write_dictionary_report(tmp_path_factory.mktemp("report") / "both.html", **vars(inputs), snmf=section)


@pytest.fixture
def features(visit, both):
    """Opens the report at a feature, or at the part on features."""

    def open_page(address="#part-features", size=WIDE, **options):
        return visit(address, size=size, file=both, **options)

    return open_page


def shown(page):
    return page.page.eval_on_selector_all(
        ".part", "parts => parts.filter((part) => part.checkVisibility()).map((part) => part.id)"
    )


def rows(page):
    return page.texts("#feature-rows th a")


# --- safety ---


@pytest.mark.quick
@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_corpus_text_is_inert_and_nothing_is_wider_than_the_window(features, both, size):
    page = features(size=size)
    assert page.overflow() == 0
    for label in ("0.0", "0.3", "0.16", "0.59", "1.4", "1.11", "2.0", "2.4"):
        page.go_to(label, "feature")
        assert page.overflow() == 0
    assert page.page.evaluate("window.pwned") is None
    assert page.page.locator("img, iframe, object, embed, link[rel=stylesheet], base, form").count() == 0
    page.resize(320)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(features, scheme):
    page = features("#feature-0.4", color_scheme=scheme)
    assert page.page.evaluate(CONTRAST) == []


# --- two parts ---


def test_one_part_is_shown_and_the_address_chooses_it(features):
    page = features("")
    assert (
        shown(page) == ["part-regions"]
        and page.page.is_visible("a[href='#growth']")
        and not page.page.is_visible("a[href='#snmf-fit']")
    )
    page.page.click(".tabs a[data-part=part-features]")
    assert shown(page) == ["part-features"] and page.page.is_visible("a[href='#snmf-fit']")
    assert page.page.get_attribute(".tabs a[data-part=part-features]", "aria-current") == "true"
    page.go_to(3)
    assert shown(page) == ["part-regions"] and page.text("#detail-title").startswith("Region 3")
    page.go_to("1.2", "feature")
    assert shown(page) == ["part-features"]
    page.page.evaluate("location.hash = 'evaluation'")
    page.until("!document.querySelector('#part-regions').hidden")
    page.page.go_back()
    page.wait_for("1.2", "feature")
    page.until("!document.querySelector('#part-features').hidden")


def test_charts_of_the_hidden_part_are_drawn_when_it_is_shown(features):
    page = features("#feature-0.1")
    page.page.click(".tabs a[data-part=part-regions]")
    page.until("document.querySelector('#growth-chart svg').getBoundingClientRect().width > 300")
    page.until("document.querySelector('#map-chart svg').getBoundingClientRect().width > 300")


def test_without_scripts_both_parts_can_be_read(features):
    page = features(java_script_enabled=False)
    assert shown(page) == ["part-regions", "part-features"]
    assert page.text("#snmf-fact-features b") == str(RANKS[0]) and page.page.is_visible("svg.loss >> nth=0")
    assert not page.page.is_visible(".tabs") and not page.page.is_visible("#feature-table")


def test_print_shows_both_parts(features):
    page = features()
    page.page.emulate_media(media="print")
    assert shown(page) == ["part-regions", "part-features"]


# --- ways to a feature ---


def test_the_table_sorts_searches_and_shows_one_level(features, section):
    page = features()
    shares = (section.levels[0].profile.counts * section.levels[0].profile.mean_activation).tolist()
    best = sorted(range(RANKS[0]), key=lambda f: -shares[f])
    assert rows(page) == [f"0.{f}" for f in best[:25]]
    page.page.click("#feature-head [data-column=firing]")
    counts = section.levels[0].profile.counts.tolist()
    assert rows(page)[0] == f"0.{max(range(RANKS[0]), key=lambda f: counts[f])}"
    page.page.select_option("#feature-level", "2")
    assert sorted(rows(page)) == [f"2.{f}" for f in range(RANKS[2])]
    page.page.select_option("#feature-level", "all")
    page.page.fill("#feature-search", "1.7")
    assert rows(page)[0] == "1.7"
    page.page.fill("#feature-search", "no such text anywhere")
    assert rows(page) == [] and page.text("#feature-count") == f"None of {sum(RANKS)} features matches."


def test_links_lead_through_the_tree_and_back(features, section):
    page = features("#feature-2.1")
    child = section.hierarchy.trees(2)[1].children[0]
    page.page.locator(".tree .branch a").first.click()
    page.wait_for(f"1.{child.feature}", "feature")
    assert page.page.input_value("#feature-level") == "1" and f"1.{child.feature}" in rows(page)
    # Under its parents this one is named among those it lies beside.
    assert "this feature" in page.text(".tree") and "Feature 2.1" in page.text(".tree")
    grandchild = section.hierarchy.trees(1)[child.feature].children[0]
    page.page.locator(f".tree a[href='#feature-0.{grandchild.feature}']").last.click()
    page.wait_for(f"0.{grandchild.feature}", "feature")
    page.page.go_back()
    page.wait_for(f"1.{child.feature}", "feature")


@pytest.mark.parametrize("name", ["0.60", "3.0", "7", "-1", "<img src=x onerror=alert(1)>", ""])
def test_an_address_of_no_feature_is_answered(features, name):
    page = features(f"#feature-{name}")
    assert page.text("#feature-detail-title") == "No such feature"
    assert "run from 0.0 to 0.59, 1.0 to 1.11, 2.0 to 2.4" in page.text("#feature-detail-body")


def test_the_table_can_be_used_by_keyboard(features):
    page = features()
    page.page.focus(".tabs a[data-part=part-regions]")
    page.page.keyboard.press("Enter")
    assert shown(page) == ["part-regions"]
    page.page.go_back()
    page.until("!document.querySelector('#part-features').hidden")
    page.page.focus("#feature-search")
    for _ in range(20):
        page.page.keyboard.press("Tab")
        if page.page.evaluate("document.activeElement.matches('#feature-rows a')"):
            break
    page.page.keyboard.press("Tab")
    target = page.page.evaluate("document.activeElement.getAttribute('href')")
    page.page.keyboard.press("Enter")
    page.wait_for(target.removeprefix("#feature-"), "feature")
    page.page.focus("#feature-detail-on")
    page.page.keyboard.press("Enter")
    page.until(f"location.hash !== '{target}'")


def test_phone_shows_the_details_of_what_is_touched(features):
    page = features(size=PHONE, has_touch=True)
    row = page.page.locator("#feature-rows tr").nth(2)
    label = row.get_attribute("data-feature")
    row.locator(".column-activity").click()
    page.until("document.querySelector('#feature-detail').getBoundingClientRect().top < 100")
    page.wait_for(label, "feature")


# --- what is shown of one ---


def test_a_feature_shows_all_its_parts(features, section):
    page = features("#feature-0.4")
    weights = section.levels[0].dictionary.neurons(4)
    shown_neurons = page.texts(".neurons li .number:first-child")
    assert shown_neurons == [str(int(i)) for i in weights.indices]
    signs = page.page.eval_on_selector_all(".weight-bar rect", "bars => bars.map((bar) => bar.getAttribute('class'))")
    assert signs == ["negative" if w < 0 else "positive" for w in weights.weights]
    assert page.page.locator("#feature-detail-body .examples li").count() == 6
    assert page.page.locator("#feature-detail-body .examples mark").count() == 6
    assert page.page.locator("#feature-detail-body .lens .tokens li").count() == 20
    assert page.page.locator(".overlaps li").count() == 6 and "p = " in page.text(".overlaps li small")
    assert page.text(".steered .text") == "I think that feature 4 speaks"
    assert "coefficient 16.5: 0.251 nats" in page.text(".steered")


def test_what_is_missing_is_said(features, visit, inputs, tmp_path):
    page = features(f"#feature-0.{UNREACHED}")
    assert "cannot be reached along it: 0.125 nats at most" in page.text(".steered")
    page = features("#feature-0.59")
    assert "never active" in page.text("#feature-detail-title") and "active on no profiled token" in page.text(
        "#feature-detail-body"
    )
    page = features("#feature-1.0")
    assert page.page.locator(".steered").count() == 0
    flat = synthetic_snmf.make_flat_section(inputs.tokenizer)
    path = write_dictionary_report(tmp_path / "flat.html", tokenizer=inputs.tokenizer, title="flat", snmf=flat)
    page = visit("#feature-7", file=path)
    body = page.text("#feature-detail-body")
    assert "No logit lens" in body and "No continuation was steered" in body and page.page.locator(".tree").count() == 0
    assert not page.page.is_visible("#feature-level") and page.overflow() == 0
