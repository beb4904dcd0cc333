"""The file itself: what is in it, that corpus text is inert in it, and what is refused."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from saelens_ext.activations.stream import ActivationStream
from saelens_ext.analysis.profile import profile_dictionary
from saelens_ext.dictionaries.fit_exemplars import fit_exemplar_partition
from saelens_ext.host.tokens import token_strings
from saelens_ext.report.dictionary.dictionary_report import write_dictionary_report
from saelens_ext.report.dictionary.evaluation import evaluation_rows
from saelens_ext.report.dictionary.growth import growth_data
from saelens_ext.report.dictionary.regions import Vocabulary, nearest_others
from saelens_ext.report.format import angle, percentage, significant, visible
from saelens_ext.report.page import _hash, embed_json
from saelens_ext.report.projection import project
from tests.report import synthetic

INSIDE = re.compile(r'<script type="application/json" id="([a-z-]+)">(.*?)</script>', re.DOTALL)


@pytest.fixture(scope="module")
def inputs():
    return synthetic.make_inputs(40)


@pytest.fixture(scope="module")
def page(inputs, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    assert write_dictionary_report(path, **vars(inputs)) == path
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def regions(page):
    return json.loads(dict(INSIDE.findall(page))["region-data"])


class Tags(HTMLParser):
    """Counts the elements and collects the attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs


@pytest.mark.parametrize("left_out", [(), ("evals",), ("generations",), ("evals", "generations")])
def test_the_navigation_names_the_sections_that_are_there(left_out, inputs, tmp_path):
    given = vars(inputs) | dict.fromkeys(left_out) | ({"generations": ()} if "generations" in left_out else {})
    page = write_dictionary_report(tmp_path / "report.html", **given).read_text(encoding="utf-8")
    named = re.findall(r'<a href="#([a-z-]+)">', page[page.index("<nav") : page.index("</nav>")])
    assert ("evaluation" in named, "steering" in named) == ("evals" not in left_out, "generations" not in left_out)
    empty = {{"evals": "evaluation", "generations": "steering"}[name] for name in left_out}
    assert set(named) == set(re.findall(r'<section id="([a-z-]+)"', page)) - {"detail", *empty}


def test_the_two_counts_of_regions_with_one_member_say_which_they_are(inputs, tmp_path):
    profile = replace(inputs.profile, counts=torch.arange(len(inputs.profile.counts)) % 5)
    path = write_dictionary_report(tmp_path / "report.html", **vars(inputs) | {"profile": profile})
    page = path.read_text(encoding="utf-8")
    alone = int((profile.counts == 1).sum())
    assert f"half of the profiled activations; {alone} have a single member among them" in page
    assert "Single-member, when built" in page and "The summary counts anew, with every profiled activation" in page


def test_the_verdicts_of_evaluations_are_shown_as_text(inputs, tmp_path):
    verdict = "EP is no better than as many random activations.<script>"
    given = vars(inputs) | {"evidence": {"novelty": {"title": "Novelty", "verdict": verdict, "figures": {}}}}
    page = write_dictionary_report(tmp_path / "report.html", **given).read_text(encoding="utf-8")
    assert "as many random activations.&lt;script&gt;" in page and "<h3><bdi>Novelty</bdi></h3>" in page


def test_growth_is_drawn_on_a_linear_axis_at_first(page):
    assert 'id="growth-linear" aria-pressed="true"' in page and "this.logarithmic = false;" in page


def test_no_text_of_the_corpus_becomes_markup(page):
    tags = Tags(page)
    assert tags.tags.count("script") == 3
    assert "img" not in tags.tags
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    for _, block in INSIDE.findall(page):
        assert not set("<>&\u2028\u2029") & set(block)
        assert block.isascii()
    assert "<!--" not in page


def test_nothing_is_referred_to_outside_the_page(page):
    tags = Tags(page)
    addresses = [value for name, value in tags.attributes if name in ("href", "src", "action", "srcset")]
    assert all(address.startswith("#") or address == "data:," for address in addresses)
    assert "url(" not in page and "@import" not in page


def test_the_policy_names_the_hashes_of_style_and_script(page):
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1).replace("&#39;", "'")
    assert policy.startswith("default-src 'none';")
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL).group(1)
    script = re.search(r'<script type="module">(.*?)</script>', page, re.DOTALL).group(1)
    assert f"style-src '{_hash(style)}'" in policy
    assert f"script-src '{_hash(script)}'" in policy
    assert "unsafe" not in policy


def test_the_same_arguments_give_the_same_file(inputs, page, tmp_path):
    assert write_dictionary_report(str(tmp_path / "again.html"), **vars(inputs)).read_text(encoding="utf-8") == page


def test_every_region_carries_its_own_figures_and_texts(inputs, regions):
    chosen, profile, lens = inputs.chosen, inputs.profile, inputs.lens
    words = regions["vocabulary"]

    def texts(ids):
        return token_strings(inputs.tokenizer, [i for i in ids.tolist() if i >= 0])

    assert regions["members"] == profile.counts.tolist()
    assert regions["joined"] == chosen.counts.tolist()
    assert regions["started"] == chosen.exemplar_indices.tolist()
    assert regions["coherence"][:-1] == pytest.approx(profile.coherence[:-1].tolist(), rel=1e-5)
    assert regions["coherence"][-1] is None and regions["mean_distance"][-1] is None
    for region in range(chosen.n_regions):
        exemplar = {key: column[region] for key, column in regions["exemplars"].items()}
        position = int(chosen.provenance.positions[region])
        window = chosen.provenance.windows[region]
        first = max(0, position - 64)
        assert [words[v] for v in exemplar["tokens"]] == texts(window[first : position + 65])
        assert exemplar["tokens"][exemplar["mark"]] == exemplar["token"]
        assert exemplar["cut_before"] == (first > 0)
        assert exemplar["cut_after"] == (int((window >= 0).sum()) > position + 65)
        assert [exemplar["document"], exemplar["window"], exemplar["position"]] == [region // 3, region, position]
        assert [words[v] for v in regions["lens"]["promoted"][region]] == texts(lens.promoted_ids[region])
        assert regions["lens"]["suppressed_logits"][region] == pytest.approx(
            lens.suppressed_logits[region].tolist(), rel=1e-5
        )
        for name, examples in (("nearest", profile.top), ("boundary", profile.boundary)):
            kept = (examples.positions[region] >= 0).nonzero().flatten().tolist()
            columns = regions[name][region]
            assert {len(column) for column in columns.values()} == {len(kept)}
            for n, i in enumerate(kept):
                shown = {key: column[n] for key, column in columns.items()}
                assert shown["distance"] == pytest.approx(float(examples.values[region, i]), rel=1e-5)
                assert [words[v] for v in shown["tokens"]] == texts(examples.contexts[region, i])
                assert words[shown["tokens"][shown["mark"]]] == texts(examples.token_ids[region, i : i + 1])[0]
                assert shown["position"] == int(examples.positions[region, i])
                assert shown["document"] == int(examples.document_ids[region, i])


def test_hostile_tokens_arrive_unchanged(regions):
    assert set(synthetic.HOSTILE) <= set(regions["vocabulary"])


def test_long_windows_are_cut_around_the_exemplar(inputs):
    fit = inputs.chosen
    long = torch.nn.functional.pad(fit.provenance.windows, (200, 200), value=int(fit.provenance.windows[0, 1]))
    long[:, 200:-200][long[:, 200:-200] < 0] = int(fit.provenance.windows[0, 1])
    provenance = replace(fit.provenance, windows=long, positions=fit.provenance.positions + 200)
    data = synthetic.region_data_of(replace(fit, provenance=provenance), inputs)
    assert {len(tokens) for tokens in data["exemplars"]["tokens"]} == {129}
    assert set(data["exemplars"]["mark"]) == {64}
    assert all(data["exemplars"]["cut_before"]) and all(data["exemplars"]["cut_after"])


def test_growth_counts_the_exemplars_before_each_point(inputs):
    curves = growth_data(inputs.fits, inputs.chosen)
    assert [curve["label"] for curve in curves] == ["1%", "4%", "10%"]
    assert [curve["chosen"] for curve in curves] == [False, True, False]
    for curve, fit in zip(curves, inputs.fits, strict=True):
        assert curve["seen"][-1] == fit.n_seen and curve["regions"][-1] == fit.n_regions
        for seen, regions in zip(curve["seen"], curve["regions"], strict=True):
            assert regions == sum(index < seen for index in fit.exemplar_indices.tolist())


def test_fits_of_several_hooks_are_told_apart(inputs):
    other = replace(inputs.fits[0], hook_name="blocks.1.hook_resid_post")
    labels = [curve["label"] for curve in growth_data([other, inputs.chosen], inputs.chosen)]
    assert labels == ["blocks.1.hook_resid_post 1%", "blocks.2.hook_resid_post 4%"]


def test_neighbours_are_those_of_all_pairs():
    directions = torch.nn.functional.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    distances = 1 - directions.double() @ directions.double().T
    distances.fill_diagonal_(torch.inf)
    expected = distances.sort(dim=1)
    for size in (50, 170, 8_000_000):
        indices, found = nearest_others(directions, 6, max_entries=size)
        assert torch.equal(indices, expected.indices[:, :6])
        assert torch.allclose(found.double(), expected.values[:, :6], atol=1e-6)
    assert nearest_others(directions[:1], 6)[0].shape == (1, 0)
    assert nearest_others(directions[:3], 6)[0].shape == (3, 2)


@pytest.mark.parametrize(
    ("k", "kind"), [(1, "principal"), (2, "principal"), (49, "principal"), (50, "t-SNE"), (3001, "principal")]
)
def test_the_map_is_finite_repeatable_and_named(k, kind):
    directions = (
        torch.nn.functional.normalize(torch.randn(k, 8, generator=torch.Generator().manual_seed(0)), dim=1)
        .double()
        .numpy()
    )
    first, second = project(directions), project(directions)
    assert kind in first.name
    assert first.points.shape == (k, 2)
    assert np.array_equal(first.points, second.points)
    assert np.isfinite(first.points).all() and np.abs(first.points).max() <= 1


def test_the_map_keeps_clusters_together():
    random = torch.Generator().manual_seed(0)
    centers = torch.eye(3, 16).repeat_interleave(40, dim=0)
    points = project(
        torch.nn.functional.normalize(centers + 0.05 * torch.randn(120, 16, generator=random), dim=1).double().numpy()
    ).points
    groups = points.reshape(3, 40, 2)
    spread = np.linalg.norm(groups - groups.mean(axis=1, keepdims=True), axis=2).max()
    gaps = [np.linalg.norm(groups[i].mean(axis=0) - groups[j].mean(axis=0)) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert min(gaps) > 2 * spread


def test_vocabulary_orders_by_frequency_and_drops_padding():
    vocabulary = Vocabulary([torch.tensor([[7, 7, -1], [3, 7, 3]]), torch.tensor([5])])
    assert vocabulary.token_ids == [7, 3, 5]
    assert vocabulary.indices(torch.tensor([-1, 5, 7, -1])) == [2, 0]


def test_evaluation_figures_are_all_there_and_explained():
    rows = {row.key: row for row in evaluation_rows(synthetic.EVALS)}
    assert list(rows) == [key for group in synthetic.EVALS.values() for key in group]
    assert rows["kl_div_score"].value == "0.6123"
    assert rows["explained_variance"].value == "not defined"
    assert rows["mse"].value == "12,346"
    assert rows["total_tokens_eval_reconstruction"].value == "8,192"
    assert rows["an_unknown_figure"].value == "1.200e-05"
    flat = {key: value for group in synthetic.EVALS.values() for key, value in group.items()}
    assert evaluation_rows(flat | {"sae_cfg": "text", "per_feature": [1.0], "flag": True}) == list(rows.values())


def test_figures_are_written_sensibly():
    assert [percentage(x) for x in (0, 1, 0.1234, 0.01234, 0.001234, 1 / 40_000)] == [
        "0%",
        "100.0%",
        "12.3%",
        "1.23%",
        "0.12%",
        "0.0025%",
    ]
    assert [angle(x) for x in (0, 0.5, 1, 2)] == ["0.0°", "60.0°", "90.0°", "180.0°"]
    assert [significant(x) for x in (1.0, 0.0, 3, 8192.0, 0.71239, -2.5e-7)] == [
        "1",
        "0",
        "3",
        "8,192",
        "0.7124",
        "-2.500e-07",
    ]
    assert visible("a\u202eb\nc\u200f\x00") == "a⟨U+202E⟩b\nc⟨U+200F⟩⟨U+0000⟩"


def test_json_escapes_survive_a_round_trip():
    value = {"</script><!--": ["\u2028\u2029&<>\"'\\", "\ud83d", "é🙂\x00"]}
    text = str(embed_json(value))
    assert json.loads(text) == value and text.isascii() and not set("<>&") & set(text)
    with pytest.raises(ValueError):
        embed_json(math.nan)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_small_dictionaries_and_missing_parts(k, inputs, tmp_path):
    fit = synthetic.make_fit(inputs.tokenizer, k, percentile=None)
    profile = replace(synthetic.make_profile(fit), boundary=None, coherence=None, mean_distance=None, max_distance=None)
    path = tmp_path / "r.html"
    write_dictionary_report(path, fits=[fit], chosen=fit, profile=profile, tokenizer=inputs.tokenizer, title="t")
    page = path.read_text(encoding="utf-8")
    data = json.loads(dict(INSIDE.findall(page))["region-data"])
    assert data["boundary"] is None and data["lens"] is None and data["coherence"] == [None] * k
    assert "given, not estimated" in page and "was not run" in page and "No generation" in page


def test_two_documents_give_no_interval(inputs, tmp_path):
    threshold = replace(inputs.chosen.threshold, low=0.0, high=2.0)
    fit = replace(inputs.chosen, threshold=threshold)
    path = write_dictionary_report(tmp_path / "r.html", **vars(inputs) | {"fits": [fit], "chosen": fit})
    page = path.read_text(encoding="utf-8")
    assert "too few documents to give an interval" in page and "0.000–2.000" not in page


def test_what_was_excluded_is_said(inputs, tmp_path):
    def excluded(**metadata):
        fit = synthetic.make_fit(inputs.tokenizer, 3, **metadata)
        arguments = vars(inputs) | {"fits": [fit], "chosen": fit, "profile": synthetic.make_profile(fit), "lens": None}
        page = write_dictionary_report(tmp_path / "r.html", **arguments).read_text(encoding="utf-8")
        return re.search(r'<div id="fact-excluded">(.*?)</div>', page, re.DOTALL).group(1)

    assert "Special tokens" in excluded() and "positions" not in excluded()
    assert "special tokens were kept" in excluded(exclude_special_tokens=False)
    assert "2 chosen tokens" in excluded(exclude_special_tokens=[5, 9]) and "5, 9" in excluded(
        exclude_special_tokens=[5, 9]
    )
    assert "All but the last token" in excluded(last_token_only=True)
    assert "positions [:7]" in excluded(seqpos_slice=[7]) and "positions [1:]" in excluded(seqpos_slice=[1, None])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: {"chosen": replace(i.chosen)}, "none of the 3 fits"),
        (lambda i: {"profile": synthetic.make_profile(i.fits[0])}, "profile is of 80 latents"),
        (lambda i: {"lens": synthetic.make_lens(i.fits[0], i.tokenizer)}, "lens is of 80 directions"),
        (lambda i: {"generations": [{"label": "a", "text": "b"}]}, "Generation 0 lacks prompt"),
        (lambda i: {"generations": [{"label": "a", "prompt": "", "text": "b", "colour": "c"}]}, "colour"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(inputs, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_dictionary_report(tmp_path / "r.html", **vars(inputs) | change(inputs))
    assert list(tmp_path.iterdir()) == []


def test_a_window_of_another_stream_is_refused(inputs, tmp_path):
    provenance = replace(inputs.chosen.provenance, token_ids=inputs.chosen.provenance.token_ids.roll(1))
    fit = replace(inputs.chosen, provenance=provenance)
    with pytest.raises(ValueError, match="not of the same stream"):
        write_dictionary_report(tmp_path / "r.html", **vars(inputs) | {"fits": [fit], "chosen": fit})


@pytest.mark.parametrize("known", [False, True])
def test_what_was_fitted_to_a_matrix_is_reported_on(known, tiny_bridge, tiny_texts, tmp_path):
    hook = "blocks.1.hook_out"
    stream = ActivationStream(tiny_bridge, tiny_texts, hook, context_size=16)
    batches = list(stream)
    x = torch.cat([batch.activations[hook] for batch in batches])
    options = {"hook_name": hook, "document_ids": torch.cat([b.document_ids for b in batches])} if known else {}
    fit = fit_exemplar_partition(x, percentile=20, **options)
    page = write_dictionary_report(
        tmp_path / "matrix.html",
        tokenizer=tiny_bridge.tokenizer,
        title="matrix",
        fits=[fit],
        chosen=fit,
        profile=profile_dictionary(fit.dictionary, stream),
    ).read_text(encoding="utf-8")
    assert "Not recorded" in page and f"{fit.dictionary.cfg.d_sae} regions" in page
    found = json.loads(dict(INSIDE.findall(page))["region-data"])
    assert sum(found["members"]) == len(x) and found["n_seen"] == len(x)
