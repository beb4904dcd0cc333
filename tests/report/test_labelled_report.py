"""Labels, the first look, any SAE, and two dictionaries side by side, in a real browser."""

from dataclasses import replace

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from saelens_ext.analysis.labels import Labels
from saelens_ext.analysis.match import match_dictionaries
from saelens_ext.report.dictionary import latents
from saelens_ext.report.dictionary.compared import ComparedWith
from saelens_ext.report.dictionary.dictionary_report import write_dictionary_report
from tests.report.browser import PHONE

FIRST_LOOK = {"width": 1280, "height": 800}
HOSTILE = "<script>window.pwned=1</script> \u202eleft"


def make_labels(profile, sure=0.5):
    """A label for every latent but the last; those of even number detect their members."""
    k = profile.d_sae
    texts = [f"word{i} … topic{i}" for i in range(k)]
    texts[2], texts[-1] = HOSTILE, ""
    even = torch.arange(k) % 2 == 0
    auroc = torch.where(even, 0.97, 0.52).double()
    return Labels(
        method="contexts", hook_name=profile.hook_name, texts=tuple(texts), outputs=(), sentences=(), auroc=auroc,
        auroc_low=auroc - 0.1, auroc_high=(auroc + 0.1).clamp_max(1), null_high=torch.full((k,), 0.64).double(),
        p_value=torch.where(even, 0.001, 0.4).double(), n_members=torch.full((k,), 8), n_others=torch.full((k,), 200),
        settings={},
    )  # fmt: skip


@pytest.fixture(scope="module")
def labelled(inputs, tmp_path_factory):
    path = tmp_path_factory.mktemp("labelled") / "report.html"
    return write_dictionary_report(path, **vars(inputs), labels=make_labels(inputs.profile))


@pytest.fixture(scope="module")
def any_sae(inputs):
    """An SAE of other makers with the profile of as many latents."""
    k = inputs.profile.d_sae
    metadata = SAEMetadata(model_name="tiny", hook_name=inputs.profile.hook_name)
    sae = StandardSAE(StandardSAEConfig(d_in=24, d_sae=k, metadata=metadata))
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(k, 24, generator=torch.Generator().manual_seed(0)))
    return sae


def test_table_details_and_map_name_regions_by_their_labels(visit, labelled, inputs):
    page = visit("#region-4", file=labelled)
    assert page.text("#detail .label") == "word4 … topic4"
    assert "AUROC 0.97 [0.87, 1.00], up to 0.64 by chance" in page.text("#detail .labelled")
    page.go_to(5)
    assert page.text("#detail .label") == "word5 … topic5 may be chance"
    assert "not distinguishable from chance" in page.text("#detail .labelled")
    page.go_to(inputs.profile.d_sae - 1)
    assert page.page.locator("#detail .label").count() == 0
    page.go_to(2)
    assert page.text("#detail .label") == "<script>window.pwned=1</script> ⟨U+202E⟩left"
    assert page.page.evaluate("window.pwned") is None
    names = page.texts(".map-labels text")
    assert any(name.startswith("word") for name in names)
    even = {f"word{i}" for i in range(0, inputs.profile.d_sae, 2)}
    assert {name for name in names if name.startswith("word")} <= even  # a label that may be chance names nothing
    page.page.fill("#search", "word6 …")
    assert page.rows() == [6] and page.text("#region-rows .label") == "word6 … topic6"


@pytest.mark.parametrize("kind", ["regions", "sae"])
def test_the_first_look_shows_map_and_table_and_the_settings_fold(visit, labelled, any_sae, inputs, tmp_path, kind):
    path, noun = labelled, "region"
    if kind == "sae":
        noun = "feature"
        path = write_dictionary_report(
            tmp_path / "sae.html", tokenizer=inputs.tokenizer, title="t", sae=any_sae, profile=inputs.profile,
            labels=make_labels(inputs.profile), evals=inputs.evals,
        )  # fmt: skip
    prefix = "" if noun == "region" else "feature-"
    page = visit(file=path, size=FIRST_LOOK)
    boxes = [
        page.page.locator(selector).first.bounding_box() for selector in (f"#{prefix}map-chart", f"#{noun}-rows tr")
    ]
    assert all(box["y"] >= 0 and box["y"] + box["height"] <= 800 for box in boxes)
    names = ("summary", "evaluation") if noun == "region" else ("snmf-summary", "snmf-evaluation")
    for name in names:
        assert page.page.eval_on_selector(f"#{name} details", "one => one.open") is False
        page.page.click(f"nav a[href='#{name}']")
        assert page.page.eval_on_selector(f"#{name} details", "one => one.open") is True
        assert page.page.evaluate(f"document.getElementById('{name}').getBoundingClientRect().top < innerHeight")
    below = page.page.eval_on_selector(f"#{names[0]}", "one => one.getBoundingClientRect().top + scrollY")
    table = page.page.eval_on_selector(f"#{noun}-table", "one => one.getBoundingClientRect().top + scrollY")
    assert table < below


def test_any_sae_has_a_map_that_selects(visit, any_sae, inputs, tmp_path):
    path = write_dictionary_report(
        tmp_path / "sae.html", tokenizer=inputs.tokenizer, title="t", sae=any_sae, profile=inputs.profile,
        lens=inputs.lens, labels=make_labels(inputs.profile),
    )  # fmt: skip
    for size in (FIRST_LOOK, PHONE):
        page = visit("#feature-4", file=path, size=size)
        assert page.text("#feature-detail .label") == "word4 … topic4"
        assert page.page.locator("#feature-map-chart .disc").count() == inputs.profile.d_sae
        assert "Feature 4 word4 … topic4" in page.text("#feature-map-readout")
        assert page.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.page.focus("#feature-map-chart svg")
        page.page.keyboard.press("ArrowRight")
        page.until("location.hash !== '#feature-4'")
        page.wait_for(page.page.evaluate("location.hash.slice(9)"), "feature")


def test_large_dictionaries_show_the_latents_that_are_active_most_often(visit, any_sae, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "MAX_LATENTS", 20)
    labels = make_labels(inputs.profile)
    path = write_dictionary_report(
        tmp_path / "sae.html", tokenizer=inputs.tokenizer, title="t", sae=any_sae, profile=inputs.profile,
        lens=inputs.lens, labels=labels,
    )  # fmt: skip
    page = visit("#snmf-summary", file=path)
    assert "shown are the 20 active most often" in page.text("#snmf-fact-features")
    most = inputs.profile.counts.argsort(descending=True, stable=True)[:20].tolist()
    assert sorted(int(text) for text in page.texts("#feature-rows th a")) == sorted(most)
    for latent in most[:3]:
        page.go_to(latent, "feature")
        assert page.text("#feature-detail h2").startswith(f"Feature {latent}")
        if labels.texts[latent].startswith("word"):
            assert page.text("#feature-detail .label").startswith(labels.texts[latent])


def test_two_dictionaries_side_by_side(visit, any_sae, inputs, tmp_path):
    k, chosen = inputs.profile.d_sae, inputs.chosen.dictionary
    other = chosen.W_dec.detach().flip(0)
    match = match_dictionaries(chosen, other, n_null=20)
    compared = ComparedWith(name=HOSTILE, match=match, labels=make_labels(inputs.profile))
    labels = make_labels(inputs.profile)
    given = vars(inputs) | {"labels": labels, "compared": compared}
    page = visit("#compared", file=write_dictionary_report(tmp_path / "two.html", **given))
    assert "⟨U+202E⟩left" in page.text("#compared h2") and "100.0%" in page.text("#compared-fact-first")
    assert "made-up dictionaries give 1.00%" in page.text("#compared-fact-first")
    rows = page.page.locator("#compared-pairs tbody tr")
    assert rows.count() == min(k, 100)
    cells = rows.first.locator("th, td").all_inner_texts()
    assert int(cells[2]) == k - 1 - int(cells[0]) and cells[4:] == ["1.000", "yes"]
    for latent, text in zip(
        rows.locator("th").all_inner_texts()[:9], rows.locator("td:nth-of-type(1)").all_inner_texts()
    ):
        if labels.texts[int(latent)].startswith("word"):
            assert text == labels.texts[int(latent)] + (" (may be chance)" if int(latent) % 2 else "")
    page.page.click("#compared-pairs tbody a >> nth=0")
    assert page.text("#detail h2").startswith(f"Region {cells[0]} ")
    phone = visit("#compared", file=tmp_path / "two.html", size=PHONE)
    assert phone.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_what_does_not_go_together_is_refused(any_sae, inputs, tmp_path):
    common = {"tokenizer": inputs.tokenizer, "title": "t"}
    path, labels = tmp_path / "x.html", make_labels(inputs.profile)
    with pytest.raises(ValueError, match="sae= goes with its profile="):
        write_dictionary_report(path, sae=any_sae, **common)
    with pytest.raises(ValueError, match="do not belong together"):
        wrong = replace(labels, texts=labels.texts[1:])
        write_dictionary_report(path, sae=any_sae, profile=inputs.profile, labels=wrong, **common)
    with pytest.raises(ValueError, match="do not belong together"):
        write_dictionary_report(path, **vars(inputs), labels=replace(labels, hook_name="elsewhere"))
    assert not path.exists()
