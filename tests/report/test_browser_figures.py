"""The report in a real browser: what it shows is what it was given."""

import math
import re

import pytest

from saelens_ext.host.tokens import token_strings
from tests.report import synthetic
from tests.report.browser import REGIONS


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


def token_of(inputs, region) -> str:
    return token_strings(inputs.tokenizer, [int(inputs.chosen.provenance.token_ids[region])])[0]


# --- summary and table ---


def test_summary_and_builds_are_those_of_the_fits(visit, inputs):
    page = visit("#summary")  # the address unfolds it
    fit, theta = inputs.chosen, inputs.chosen.threshold
    assert page.text("#fact-model b") == "tiny-llama"
    assert page.text("#fact-hook b") == fit.hook_name and "blocks.2.hook_out" in page.text("#fact-hook")
    assert page.text("#fact-seen b") == "12,345"
    assert page.text("#fact-regions b") == str(REGIONS)
    degrees = [math.degrees(math.acos(1 - x)) for x in (theta.threshold, theta.low, theta.high)]
    assert page.text("#fact-threshold b") == f"{theta.threshold:.3f} cosine distance, {degrees[0]:.1f}°"
    assert f"{theta.low:.3f} to {theta.high:.3f}, {degrees[1]:.1f}° to {degrees[2]:.1f}°" in page.text(
        "#fact-threshold"
    )
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
        assert (
            f"{build.n_seen:,}" in words
            and f"{build.n_regions:,}" in words
            and f"{build.threshold.threshold:.3f}" in words
        )


def test_growth_plot_reads_out_the_fits(visit, inputs):
    page = visit()
    ends = {text.split(" · ")[0]: text.split(" · ")[1] for text in page.texts("#growth-chart .end")}
    assert ends == {f"{fit.percentile:g}%": f"{fit.n_regions:,}" for fit in inputs.fits}
    assert "0" in page.texts("#growth-chart .tick") and "-0" not in page.texts("#growth-chart .tick")
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
    page = visit("#evaluation")
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
            texts = row.locator("td:not(.column-token)").all_text_contents()
            cells = dict(zip(("mass", "coherence", "mean", "farthest", "nearest"), texts, strict=True))
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
    tokens = [token_of(inputs, region).strip(" ").lower() for region in page.all_rows()]
    words = [token for token in tokens if token.isalpha() and token.isascii()]
    assert words == sorted(words) and len(words) > 20


def test_search_by_text_token_and_number(visit, inputs):
    page = visit()
    words = [
        "".join(
            token_strings(inputs.tokenizer, [i for i in window[max(0, at - 64) : at + 65].tolist() if i >= 0])
        ).lower()
        for window, at in zip(
            inputs.chosen.provenance.windows, inputs.chosen.provenance.positions.tolist(), strict=True
        )
    ]
    for query in ("function", "  Object ", "<script>window", "שלום", "zzzz"):
        page.page.fill("#search", query)
        expected = [region for region, text in enumerate(words) if query.strip().lower() in text]
        assert sorted(page.all_rows()) == expected, query
        faded = page.page.locator(".disc.faded").count()
        assert faded == REGIONS - len(expected)
    assert "None of" in page.text("#region-count")
    page.page.fill("#search", "#17")
    assert page.rows()[0] == 17
    page.page.fill("#search", "")
    assert len(page.all_rows()) == REGIONS


# --- one region ---


@pytest.mark.parametrize("region", [0, 4, 8, 57, REGIONS - 1])
def test_detail_shows_the_region_named_in_the_address(visit, inputs, region):
    page = visit(f"#region-{region}")
    chosen, profile, lens = inputs.chosen, inputs.profile, inputs.lens
    place = chosen.provenance
    assert page.text("#detail-title").startswith(f"Region {region}\n") or page.text("#detail-title").startswith(
        f"Region {region} "
    )
    assert f"document {region // 3}, window {region}, position {int(place.positions[region])}." in page.text(
        ".provenance"
    )
    assert f"Started by activation {int(chosen.exemplar_indices[region]):,} of 12,345." in page.text(".provenance")
    expected = figures(inputs, region)
    assert page.text("#measure-mass b") == share(inputs, region)
    assert f"{int(profile.counts[region]):,} of {profile.n_activations:,} activations" in page.text("#measure-mass")
    assert page.text("#measure-joined b") == str(int(chosen.counts[region]))
    for name, key in (
        ("coherence", "coherence"),
        ("mean", "mean"),
        ("farthest", "farthest"),
        ("separation", "nearest"),
    ):
        assert page.text(f"#measure-{name} b") == shown_distance(expected[key])
    if not math.isnan(expected["farthest"]):
        side = "beyond" if expected["farthest"] > chosen.threshold.threshold else "within"
        assert f"{side} the threshold of {chosen.threshold.threshold:.3f}" in page.text("#measure-farthest")
    for number, ids, logits in (
        (0, lens.promoted_ids, lens.promoted_logits),
        (1, lens.suppressed_ids, lens.suppressed_logits),
    ):
        block = page.page.locator(".lens > div").nth(number)
        assert block.locator(".number").all_text_contents() == [f"{float(x):.2f}" for x in logits[region]]
        assert len(block.locator(".token").all()) == ids.shape[1]
    for number, examples in enumerate((profile.top, profile.boundary)):
        block = page.page.locator(".examples").nth(number)
        kept = (examples.positions[region] >= 0).nonzero().flatten().tolist()
        assert block.locator(".number").all_text_contents() == [
            shown_distance(examples.values[region, i]) for i in kept
        ]
        places = [
            f"document {int(examples.document_ids[region, i])}, position {int(examples.positions[region, i])}"
            for i in kept
        ]
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
    window, position = (
        inputs.chosen.provenance.windows[region].tolist(),
        int(inputs.chosen.provenance.positions[region]),
    )
    tokens = token_strings(inputs.tokenizer, [i for i in window if i >= 0])
    shown = page.page.locator(".exemplar .context").text_content()
    before = "".join(tokens[max(0, position - 64) : position]).replace("\n", "↵")
    after = "".join(tokens[position + 1 : position + 65]).replace("\n", "↵")
    assert shown.removeprefix("… ").removesuffix(" …") == before + tokens[position] + after
    assert page.page.locator(".exemplar mark").text_content() == tokens[position]
    tops = inputs.profile.top.token_ids[region].tolist()
    for mark, token in zip(
        page.texts(".examples >> nth=0 >> mark"), token_strings(inputs.tokenizer, tops), strict=True
    ):
        assert len(mark) > 0 and (mark == token or not token.isprintable() or token.isspace() or len(token) > 80)


def test_invisible_tokens_get_a_sign(visit, inputs):
    page = visit()
    signs = {
        "\n\n": "↵↵",
        "\t\t": "⇥⇥",
        "  ": "␣␣",
        "\x00": "␀",
        "\x1b[31m": "␛[31m",
        "\u200f": "⟨U+200F⟩",
        "\u2028": "⟨U+2028⟩",
    }
    met = set()
    for region in range(0, REGIONS, 4):
        token = token_of(inputs, region)
        if token in signs:
            page.go_to(region)
            assert page.text("#detail-title .token") == signs[token]
            met.add(token)
    assert len(met) >= 5


# --- the map ---


def test_map_discs_show_mass_and_select(visit, inputs):
    page = visit()
    page.page.click("#map .reading summary")
    assert "t-SNE" in page.text("#map-projection") and "indicative" in page.text("#map-projection")
    discs = page.page.eval_on_selector_all(
        ".disc", "all => all.map((d) => [Number(d.dataset.region), Number(d.getAttribute('r'))])"
    )
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
    page.page.wait_for_selector(".tooltip", state="visible")
    assert f"Region {small} " in page.text(".tooltip")
    page.page.mouse.down()
    page.page.mouse.up()
    page.wait_for(small)
    assert page.page.evaluate("location.hash") == f"#region-{small}"
    # The page follows the change of its hash, which the browser announces a moment later.
    page.until("region => document.querySelector('#map-readout').textContent.includes(`Region ${region} `)", arg=small)


def test_map_zooms_drags_and_resets(visit):
    page = visit()

    def extent():
        across = page.page.eval_on_selector_all(".disc", "all => all.map((disc) => Number(disc.getAttribute('cx')))")
        return max(across) - min(across)

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
