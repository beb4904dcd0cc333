"""The report in a real browser: what it shows is what it was given, and corpus text does nothing."""

import math
import re
import time
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from saelens_ext.report.dictionary_report import write_dictionary_report
from saelens_ext.tokens import token_strings
from tests.report import synthetic
from tests.report.browser import PHONE, WIDE, Visit, chromium

REGIONS = 120


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def inputs():
    return synthetic.make_inputs(REGIONS)


@pytest.fixture(scope="module")
def path(inputs, browser, tmp_path_factory):
    return write_dictionary_report(tmp_path_factory.mktemp("report") / "report.html", **vars(inputs))


@pytest.fixture
def visit(browser, path):
    with ExitStack() as stack:

        def open_page(address="", size=WIDE, file=path, **options):
            visit = Visit(browser, file, address, size, **options)
            stack.callback(visit.context.close)
            stack.callback(lambda: (_ for _ in ()).throw(AssertionError(visit.complaints)) if visit.complaints else None)
            return visit

        yield open_page


def shown_distance(value) -> str:
    return "–" if math.isnan(value) else f"{float(value):.3f}"


def figures(inputs, region) -> dict[str, float]:
    """The figures by which the table sorts, from the inputs."""
    profile = inputs.profile
    exemplars = inputs.chosen.dictionary.exemplars.detach().double()
    others = 1 - exemplars @ exemplars[region]
    others[region] = math.inf
    return {
        "id": region,
        "mass": int(profile.counts[region]),
        "coherence": float(profile.coherence[region]),
        "mean": float(profile.mean_distance[region]),
        "farthest": float(profile.max_distance[region]),
        "nearest": float(others.min()),
    }


def share(inputs, region) -> str:
    percent = 100 * int(inputs.profile.counts[region]) / inputs.profile.n_activations
    if percent == 0:
        return "0%"
    return f"{percent:.1f}%" if percent >= 10 else f"{percent:.2f}%" if percent >= 1 else f"{percent:.2g}%"


def largest(inputs) -> int:
    return int(inputs.profile.counts.argmax())


# --- safety ---


@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_corpus_text_is_inert_and_nothing_is_requested(visit, path, inputs, size):
    page = visit(size=size)
    for region in range(0, REGIONS, 7):
        page.page.evaluate(f"location.hash = 'region-{region}'")
        page.page.wait_for_function(f"document.querySelector('#detail-title').textContent.startsWith('Region {region} ')")
    assert page.page.evaluate("window.pwned") is None
    assert page.page.locator("script").count() == 3
    assert page.page.locator("img, iframe, object, embed, link[rel=stylesheet], base, form").count() == 0
    assert [url for url in page.requests if url != path.as_uri()] == []
    # What a script injected by some other way would meet.
    page.page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.pwned = 2'}))")
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


# --- figures ---


def test_summary_and_builds_are_those_of_the_fits(visit, inputs):
    page = visit()
    fit, theta = inputs.chosen, inputs.chosen.threshold
    assert page.text("#fact-model b") == "tiny-llama"
    assert page.text("#fact-hook b") == fit.hook_name and "blocks.2.hook_out" in page.text("#fact-hook")
    assert page.text("#fact-seen b") == "12,345"
    assert page.text("#fact-regions b") == str(REGIONS)
    degrees = [math.degrees(math.acos(1 - x)) for x in (theta.threshold, theta.low, theta.high)]
    assert page.text("#fact-threshold b") == f"{theta.threshold:.3f} cosine distance, {degrees[0]:.1f}°"
    assert f"{theta.low:.3f} to {theta.high:.3f}, {degrees[1]:.1f}° to {degrees[2]:.1f}°" in page.text("#fact-threshold")
    assert "1,234,567 pairs" in page.text("#fact-threshold")
    singletons = int((fit.counts == 1).sum())
    assert float(page.text("#fact-unseen b").rstrip("%")) == pytest.approx(100 * singletons / fit.n_seen, rel=0.05)
    assert "3.21%" in page.text("#fact-unseen")
    assert "ran out" in page.text("#fact-stopped")
    rows = page.texts("#builds tbody tr")
    for row, build in zip(rows, inputs.fits, strict=True):
        words = row.split()
        assert words[0] == f"{build.percentile:g}%"
        assert ("this report" in row) == (build is fit)
        assert f"{build.n_seen:,}" in words and f"{build.n_regions:,}" in words and f"{build.threshold.threshold:.3f}" in words


def test_growth_plot_reads_out_the_fits(visit, inputs):
    page = visit()
    ends = {text.split(" · ")[0]: text.split(" · ")[1] for text in page.texts("#growth-chart .end")}
    assert ends == {f"{fit.percentile:g}%": f"{fit.n_regions:,}" for fit in inputs.fits}
    for button in ("#growth-linear", "#growth-log"):
        page.page.click(button)
        assert page.page.get_attribute(button, "aria-pressed") == "true"
        page.page.locator("#growth-chart svg").scroll_into_view_if_needed()
        box = page.page.locator("#growth-chart svg").bounding_box()
        page.page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + 60)
        seen, *counts = re.findall(r"[\d,]+(?= activations|(?= \(| ·|$))", page.text("#growth-readout"))
        at = int(seen.replace(",", ""))
        assert 1000 < at < 12_345
        expected = [sum(index < at for index in fit.exemplar_indices.tolist()) for fit in inputs.fits]
        assert [int(count.replace(",", "")) for count in counts] == expected
    assert page.page.locator(".curve").count() == 3


def test_evaluation_is_shown_with_meanings(visit):
    page = visit()
    rows = page.page.locator("#evaluation-table tbody tr")
    keys = [key for group in synthetic.EVALS.values() for key in group]
    assert [code.strip() for code in page.texts("#evaluation-table code")] == keys
    assert rows.nth(keys.index("l1")).locator(".number").inner_text() == "6.125"
    assert all(len(text) > 15 for text in page.texts("#evaluation-table td.text"))


def test_table_rows_show_the_figures_of_their_region(visit, inputs):
    page = visit()
    pages = math.ceil(REGIONS / 25)
    seen = []
    for n in range(pages):
        for row in page.page.locator("#region-rows tr").all():
            region = int(row.get_attribute("data-region"))
            expected = figures(inputs, region)
            cells = dict(zip(("mass", "coherence", "mean", "farthest", "nearest"), row.locator("td:not(.column-token)").all_text_contents(), strict=True))
            assert cells.pop("mass") == share(inputs, region)
            for name, text in cells.items():
                assert text == shown_distance(expected[name]), (region, name)
            seen.append(region)
        if n < pages - 1:
            page.page.click("#page-on")
    assert page.page.is_disabled("#page-on") and f"of {REGIONS}" in page.text("#region-count")
    assert seen == sorted(range(REGIONS), key=lambda region: (-int(inputs.profile.counts[region]), region))


def test_sorting_by_any_column_both_ways(visit, inputs):
    page = visit()
    table = {region: figures(inputs, region) for region in range(REGIONS)}
    for column in ("id", "coherence", "mean", "farthest", "nearest"):
        values = {region: row[column] for region, row in table.items()}
        known = [region for region in values if not math.isnan(values[region])]
        directions = []
        for _ in range(2):
            page.page.click(f"[data-column={column}]")
            directions.append(page.page.get_attribute(f"th.column-{column}", "aria-sort"))
            expected = sorted((values[region] for region in known), reverse=directions[-1] == "descending")
            assert [values[region] for region in page.rows()] == pytest.approx(expected[:25], abs=1e-5), column
            page.page.click("#page-last")
            if len(known) < REGIONS:
                assert page.rows()[-1] == REGIONS - 1  # what has no figure comes last either way
            page.page.click("#page-first")
        assert sorted(directions) == ["ascending", "descending"]
    # A button that has just become useless keeps the focus, or the keyboard would start over at the top of the page.
    assert page.page.evaluate("document.activeElement.id") == "page-first"


def test_sorting_by_token(visit, inputs):
    page = visit()
    page.page.click("[data-column=token]")
    tokens = [token_of(inputs, region).strip(" ").lower() for region in collect(page)]
    words = [token for token in tokens if token.isalpha() and token.isascii()]
    assert words == sorted(words) and len(words) > 20


def test_search_by_text_token_and_number(visit, inputs):
    page = visit()
    words = [
        "".join(token_strings(inputs.tokenizer, [i for i in window[max(0, at - 64) : at + 65].tolist() if i >= 0])).lower()
        for window, at in zip(inputs.chosen.provenance.windows, inputs.chosen.provenance.positions.tolist(), strict=True)
    ]
    for query in ("function", "  Object ", "<script>window", "שלום", "zzzz"):
        page.page.fill("#search", query)
        expected = [region for region, text in enumerate(words) if query.strip().lower() in text]
        assert sorted(collect(page)) == expected, query
        faded = page.page.locator(".disc.faded").count()
        assert faded == REGIONS - len(expected)
    assert "None of" in page.text("#region-count")
    page.page.fill("#search", "#17")
    assert page.rows()[0] == 17
    page.page.fill("#search", "")
    assert len(collect(page)) == REGIONS


def collect(page) -> list[int]:
    """All rows of the table, page by page."""
    found = page.rows()
    while not page.page.is_disabled("#page-on"):
        page.page.click("#page-on")
        found += page.rows()
    return found


# --- one region ---


@pytest.mark.parametrize("region", [0, 4, 8, 57, REGIONS - 1])
def test_detail_shows_the_region_named_in_the_address(visit, inputs, region):
    page = visit(f"#region-{region}")
    chosen, profile, lens = inputs.chosen, inputs.profile, inputs.lens
    place = chosen.provenance
    assert page.text("#detail-title").startswith(f"Region {region}\n") or page.text("#detail-title").startswith(f"Region {region} ")
    sentence = f"document {region // 3}, window {region}, position {int(place.positions[region])}. Founded by activation {int(chosen.exemplar_indices[region]):,} of 12,345."
    assert sentence in page.text(".provenance")
    expected = figures(inputs, region)
    assert page.text("#measure-mass b") == share(inputs, region)
    assert f"{int(profile.counts[region]):,} of {profile.n_activations:,} activations" in page.text("#measure-mass")
    assert page.text("#measure-joined b") == str(int(chosen.counts[region]))
    for name, key in (("coherence", "coherence"), ("mean", "mean"), ("farthest", "farthest"), ("separation", "nearest")):
        assert page.text(f"#measure-{name} b") == shown_distance(expected[key])
    if not math.isnan(expected["farthest"]):
        side = "beyond" if expected["farthest"] > chosen.threshold.threshold else "within"
        assert f"{side} the threshold of {chosen.threshold.threshold:.3f}" in page.text("#measure-farthest")
    for number, ids, logits in ((0, lens.promoted_ids, lens.promoted_logits), (1, lens.suppressed_ids, lens.suppressed_logits)):
        block = page.page.locator(".lens > div").nth(number)
        assert block.locator(".number").all_text_contents() == [f"{float(x):.2f}" for x in logits[region]]
        assert len(block.locator(".token").all()) == ids.shape[1]
    for number, examples in enumerate((profile.top, profile.boundary)):
        block = page.page.locator(".examples").nth(number)
        kept = (examples.positions[region] >= 0).nonzero().flatten().tolist()
        assert block.locator(".number").all_text_contents() == [shown_distance(examples.values[region, i]) for i in kept]
        places = [f"document {int(examples.document_ids[region, i])}, position {int(examples.positions[region, i])}" for i in kept]
        assert block.locator("small").all_text_contents() == places
        assert block.locator("mark").count() == len(kept)
        if not kept:
            assert "There is none." in block.inner_text()
    distances = [float(text) for text in page.texts(".neighbours .number")]
    assert len(distances) == 6 and distances == sorted(distances)
    assert distances[0] == pytest.approx(expected["nearest"], abs=6e-4)


def test_texts_of_a_region_are_those_of_its_tokens(visit, inputs):
    region = next(r for r in range(1, REGIONS) if r % 4 and token_of(inputs, r).strip().isalpha())
    page = visit(f"#region-{region}")
    window, position = inputs.chosen.provenance.windows[region].tolist(), int(inputs.chosen.provenance.positions[region])
    tokens = token_strings(inputs.tokenizer, [i for i in window if i >= 0])
    shown = page.page.locator(".exemplar .context").text_content()
    before = "".join(tokens[max(0, position - 64) : position]).replace("\n", "↵")
    after = "".join(tokens[position + 1 : position + 65]).replace("\n", "↵")
    assert shown.removeprefix("… ").removesuffix(" …") == before + tokens[position] + after
    assert page.page.locator(".exemplar mark").text_content() == tokens[position]
    tops = inputs.profile.top.token_ids[region].tolist()
    for mark, token in zip(page.texts(".examples >> nth=0 >> mark"), token_strings(inputs.tokenizer, tops), strict=True):
        assert len(mark) > 0 and (mark == token or not token.isprintable() or token.isspace() or len(token) > 80)


def token_of(inputs, region) -> str:
    return token_strings(inputs.tokenizer, [int(inputs.chosen.provenance.token_ids[region])])[0]


def test_invisible_tokens_get_a_sign(visit, inputs):
    page = visit()
    signs = {"\n\n": "↵↵", "\t\t": "⇥⇥", "  ": "␣␣", "\u200f": "⟨U+200F⟩", "\u2028": "⟨U+2028⟩", "\x00": "␀", "\x1b[31m": "␛[31m"}
    met = set()
    for region in range(0, REGIONS, 4):
        token = token_of(inputs, region)
        if token in signs:
            page.page.evaluate(f"location.hash = 'region-{region}'")
            page.page.wait_for_function(f"document.querySelector('#detail-title').textContent.startsWith('Region {region} ')")
            assert page.text("#detail-title .token") == signs[token]
            met.add(token)
    assert len(met) >= 5


# --- ways to a region ---


def test_links_rows_and_the_back_button_select(visit, inputs):
    page = visit("#region-3")
    assert page.text("#detail-title").startswith("Region 3")
    page.page.locator("#region-rows tr").nth(1).locator(".column-coherence").click()
    second = page.rows()[1]
    assert page.page.evaluate("location.hash") == f"#region-{second}"
    assert page.text("#detail-title").startswith(f"Region {second}")
    assert page.page.locator("tr.selected").get_attribute("data-region") == str(second)
    neighbour = page.page.locator(".neighbours a").first
    target = neighbour.get_attribute("href")
    neighbour.click()
    assert page.page.evaluate("location.hash") == target
    assert page.page.locator("tr.selected").get_attribute("data-region") == target.removeprefix("#region-")
    page.page.go_back()
    page.page.wait_for_function(f"document.querySelector('#detail-title').textContent.startsWith('Region {second} ')")


@pytest.mark.parametrize("address", [f"#region-{REGIONS}", "#region--1", "#region-<img src=x onerror=alert(1)>", "#region-%E0%A4%A", "#region-"])
def test_an_address_of_no_region_is_answered(visit, address):
    page = visit(address)
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


# --- the map ---


def test_map_discs_show_mass_and_select(visit, inputs):
    page = visit()
    assert "t-SNE" in page.text("#map-projection") and "indicative" in page.text("#map-projection")
    discs = page.page.eval_on_selector_all(".disc", "all => all.map((d) => [Number(d.dataset.region), Number(d.getAttribute('r'))])")
    assert sorted(region for region, _ in discs) == list(range(REGIONS))
    counts = inputs.profile.counts
    top = dict(discs)[largest(inputs)]
    for region, radius in discs:
        assert radius == pytest.approx(max(2.6, top * math.sqrt(int(counts[region]) / int(counts.max()))), abs=0.11)
    small = discs[-30][0]  # drawn late: a small one
    disc = page.page.locator(f".disc[data-region='{small}']")
    page.page.locator("#map-chart").scroll_into_view_if_needed()
    box = disc.bounding_box()
    page.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert page.page.is_visible(".tooltip") and f"Region {small} " in page.text(".tooltip")
    page.page.mouse.down()
    page.page.mouse.up()
    assert page.page.evaluate("location.hash") == f"#region-{small}"
    assert f"Region {small} " in page.text("#map-readout")


def test_map_zooms_drags_and_resets(visit):
    page = visit()

    def extent():
        return page.page.evaluate("(() => { const x = [...document.querySelectorAll('.disc')].map((d) => Number(d.getAttribute('cx'))); return Math.max(...x) - Math.min(...x); })()")

    whole = extent()
    page.page.click("#map-in")
    assert extent() == pytest.approx(1.6 * whole, rel=0.01)
    left = page.page.locator(".disc").first.get_attribute("cx")
    box = page.page.locator("#map-chart svg").bounding_box()
    page.page.locator("#map-chart").scroll_into_view_if_needed()
    box = page.page.locator("#map-chart svg").bounding_box()
    page.page.mouse.move(box["x"] + 200, box["y"] + 100)
    page.page.mouse.down()
    page.page.mouse.move(box["x"] + 260, box["y"] + 130, steps=3)
    page.page.mouse.up()
    assert float(page.page.locator(".disc").first.get_attribute("cx")) == pytest.approx(float(left) + 60, abs=1)
    page.page.click("#map-reset")
    assert extent() == pytest.approx(whole, rel=0.01)


# --- sizes, themes, other ways to look ---


def test_phone_has_no_sideways_scroll_and_shows_the_details(visit, inputs):
    page = visit(size=PHONE, has_touch=True)
    assert page.overflow() == 0
    row = page.page.locator("#region-rows tr").nth(2)
    region = int(row.get_attribute("data-region"))
    row.locator(".column-mass").click()
    page.page.wait_for_function("document.querySelector('#detail').getBoundingClientRect().top < 100")
    assert page.text("#detail-title").startswith(f"Region {region}")
    for other in (0, 4, 8, 12, 92):
        page.page.evaluate(f"location.hash = 'region-{other}'")
        page.page.wait_for_function(f"document.querySelector('#detail-title').textContent.startsWith('Region {other} ')")
        assert page.overflow() == 0
    page.page.select_option("#sort", "id")
    assert page.rows() == list(range(10))
    page.page.click("#sort-direction")
    assert page.rows()[0] == REGIONS - 1
    page.page.set_viewport_size({"width": 320, "height": 600})
    assert page.overflow() == 0


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
    if (ratio < 4.5) poor.push(`${node.tagName}.${node.className} ${ratio.toFixed(2)} ${node.textContent.slice(0, 30)}`);
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


def small_page(tmp_path, inputs, k, n_examples=10):
    fit = synthetic.make_fit(inputs.tokenizer, k, percentile=None)
    parts = SimpleNamespace(fits=[fit], chosen=fit, profile=synthetic.make_profile(fit, n_examples=n_examples), lens=None, tokenizer=inputs.tokenizer, title="one")
    return write_dictionary_report(tmp_path / "small.html", **vars(parts))


@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_one_region(visit, inputs, tmp_path, size):
    page = visit(file=small_page(tmp_path, inputs, 1), size=size)
    assert page.text("#detail-title").startswith("Region 0")
    assert "There is no other region" in page.text("#detail-body") and "No logit lens" in page.text("#detail-body")
    assert page.rows() == [0] and page.text("#measure-separation b") == "–"
    assert page.page.is_disabled("#detail-on") and page.overflow() == 0


def test_five_thousand_regions_stay_quick(visit, inputs, tmp_path):
    page = visit(file=small_page(tmp_path, inputs, 5000, n_examples=2))
    assert page.page.locator(".disc").count() == 5000 and "principal components" in page.text("#map-projection")
    page.page.click("[data-column=coherence]")  # once before the clock runs: the first click also lays the page out
    start = time.perf_counter()
    page.page.evaluate("document.querySelector('[data-column=nearest]').click()")
    page.page.evaluate("const search = document.querySelector('#search'); search.value = 'function'; search.dispatchEvent(new Event('input'))")
    page.page.evaluate("location.hash = 'region-4321'")
    page.page.wait_for_function("document.querySelector('#detail-title').textContent.startsWith('Region 4321 ')")
    assert time.perf_counter() - start < 3
    assert 25 < int(re.search(r"of ([\d,]+) matching", page.text("#region-count")).group(1).replace(",", "")) < 5000
