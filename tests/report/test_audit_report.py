"""The audit's file itself: that it holds what the audit found, that the model's text is inert in it, and what is
refused.
"""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import cdist
from sklearn.decomposition import PCA

from saelens_ext.continuations.prefix_audit import verdict_of
from saelens_ext.continuations.validation.figures import fixed, interval_decimals, p_value
from saelens_ext.continuations.validation.findings import outcome
from saelens_ext.report.audit.audit_report import write_audit_report
from saelens_ext.report.audit.maps import MAX_POINTS, flat_map, maps_data, shown_rows
from saelens_ext.report.audit.modes import ExampleFinder, mark_of
from saelens_ext.report.audit.tests_section import comparisons, dose_data, specificity_cells
from saelens_ext.report.audit.wording import plain, quoted
from saelens_ext.report.page import _hash
from tests.report import synthetic_audit as made
from tests.report.parsed_page import Page

INSIDE = re.compile(r'<script type="application/json" id="([a-z0-9-]+)">(.*?)</script>', re.DOTALL)
TEMPLATE = ("<|user|>\n", "\n<|assistant|>")


@pytest.fixture(scope="module")
def audit():
    return made.make_audit(template=TEMPLATE)


def write(folder, prefixes, **options):
    given = {"about": made.ABOUT, "config": made.CONFIG, "tokenizer": made.tokenizer()} | options
    return write_audit_report(folder / "audit.html", prefixes=prefixes, **given).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(audit, tmp_path_factory):
    return write(
        tmp_path_factory.mktemp("audit") / "new",
        [audit],
        profiles={made.HOOKS[0]: made.make_profile()},
        title="Audit of <b>",
    )


# --- safety ---


@pytest.mark.slow
def test_no_text_of_the_model_becomes_markup(page):
    found = Page(page)
    assert found.tags.count("script") == 2
    assert not {"img", "iframe", "object", "link"} - {"link"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on") or name == "style"]
    for _, block in INSIDE.findall(page):
        assert not set("<>&\u2028\u2029") & set(block)
    assert "<!--" not in page and "\u202e" not in page and "\x00" not in page
    addresses = [value for name, value in found.attributes if name in ("href", "src", "action", "srcset")]
    assert all(address.startswith("#") or address == "data:," for address in addresses)
    assert "url(" not in page and "@import" not in page and "innerHTML" not in page


def test_the_policy_names_the_hashes_of_style_and_script(page):
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1).replace("&#39;", "'")
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL).group(1)
    script = re.search(r'<script type="module">(.*?)</script>', page, re.DOTALL).group(1)
    assert f"style-src '{_hash(style)}'" in policy and f"script-src '{_hash(script)}'" in policy
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy


@pytest.mark.slow
def test_the_same_audit_gives_the_same_file_and_it_stays_small(audit, tmp_path):
    first = write(tmp_path, [audit])
    assert write(tmp_path, [audit]) == first and len(first) < 1_000_000


# --- what it says ---


def test_prompt_template_modes_and_members_are_shown(page, audit):
    text = Page(page).text
    assert made.PROMPT in text and "<|user|>" in text and "chat template" in text
    for row in audit.modes().itertuples():
        assert f"Mode {row.cluster}" in text
    shown = re.findall(r'<li data-row="(\d+)">', page)
    own = [row for mode in range(3) for row in audit.exemplary_members(mode, 5)]
    assert sorted(map(int, shown)) == sorted([*range(90), *own])
    for body in (quoted(text) for text in audit.continuations.texts):
        assert re.sub(r"\s+", " ", body).strip() in text


def test_labels_of_modes_stand_in_the_table_at_each_mode_and_in_the_tests(page, audit):
    found = Page(page)
    assert any(label.text and label.distinguishes for label in audit.mode_labels)
    for row, label in zip(audit.modes().itertuples(), audit.mode_labels):
        assert (row.label, row.label_p_value) == (label.text, pytest.approx(label.p_value, nan_ok=True))
        if label.text:
            shown = quoted(label.text)
            assert (
                found.text.count(shown) >= 3
                and f"{shown}{'' if label.distinguishes else ' may be chance'}" in found.text
            )
            assert label.score_text in found.text


def test_distinguishing_sources_are_those_of_the_audit(page, audit):
    text = Page(page).text
    for mode in range(3):
        table = audit.distinguishing_sources(mode, 40)
        table = table[table["kind"] == "latent"].head(6)
        card = text[text.index(f"Mode {mode} ", text.index("Each mode")) :]
        card = card[card.index("Latents that set it apart") :]
        places = [
            card.index(f"latent {row.latent} · layer {row.hook.split('.')[1]} {fixed(row.difference, 2, plus=True)}")
            for row in table.itertuples()
        ]
        assert places == sorted(places)
    assert "What this latent responds to" in text and "of 1,681 activations profiled" in text


def test_examples_come_from_the_profile_of_the_latents_own_dictionary():
    profile = made.make_profile()
    finder = ExampleFinder({made.HOOKS[0]: profile}, made.tokenizer(), list(made.HOOKS))
    assert (
        finder.of(made.HOOKS[1], 1, 3) is None
        and finder.of("elsewhere", 5, 3) is None
        and finder.of(made.HOOKS[0], 0, 12) is None
    )
    # A transcoder writes elsewhere than it reads; its profile is of where it reads.
    for hook, dictionary in ((made.HOOKS[0], 0), ("blocks.1.hook_out", 0), (made.HOOKS[0], -1)):
        found = finder.of(hook, dictionary, 3)
        assert [example.value for example in found.examples] == [
            f"{value:.3g}" for value in profile.top.values[3, :4].tolist()
        ]
        assert found.examples[0].text.mark.strip() in made.tokenizer().decode([int(profile.top.token_ids[3, 0])])


def test_without_profiles_or_tokenizer_the_sources_still_read(audit, tmp_path):
    text = Page(write(tmp_path, [audit], tokenizer=None)).text
    assert "What this latent responds to" not in text and "Latents that set it apart" in text
    with pytest.raises(ValueError, match="need a tokenizer"):
        write(tmp_path, [audit], tokenizer=None, profiles={made.HOOKS[0]: made.make_profile()})


def test_signatures_of_the_users_own_need_no_description(audit, tmp_path):
    held = audit.continuations.with_signatures(audit.continuations.signatures)
    text = Page(write(tmp_path, [replace(audit, continuations=held)])).text
    assert re.search(r"source \d+ [+−]\d", text) and "Sources that set it apart" in text


# --- verdicts ---


@pytest.mark.slow
def test_the_page_says_no_more_than_the_weakest_finding(page, audit, tmp_path):
    assert audit.verdict.answer == "yes" and '<p class="verdict verdict-yes">' in page
    weak = made.make_weak_audit()
    shown = write(tmp_path, [weak])
    assert '<p class="verdict verdict-no">' in shown and "verdict-yes" not in shown.partition("</style>")[2]
    text = Page(shown).text
    assert "but not mode by mode: 1 of 7 modes is moved most by its own direction" in text
    assert "6 of 7 are as small as a mode may be" in text and shown.count('"floor">smallest size allowed') == 6
    for finding in weak.verdict.findings:
        assert finding.evidence in text and f'answer-{finding.answer}">{finding.said}' in shown


@pytest.mark.slow
def test_no_figure_but_a_probability_is_called_one(audit, tmp_path):
    counted = audit.continuations.with_weights("frequency")
    for weights, held in (("uniform", audit.continuations), ("frequency", counted)):
        text = Page(write(tmp_path, [replace(audit, continuations=held)], config={"weights": weights})).text
        assert "Fraction of all drawn" in text and "Probability" not in text
    assert "each mode counting once" in text and "held-out continuations, each counting once" in text


def test_how_much_latents_carry_beside_other_sources(audit, tmp_path):
    held, kinds = audit.continuations, np.array(audit.continuations.sources.kinds)
    sizes = held.signatures.double().abs().sum(dim=0).numpy()
    found = audit.effect_by_kind()
    assert found.sum() == pytest.approx(1) and found["latent"] == pytest.approx(
        sizes[kinds == "latent"].sum() / sizes.sum()
    )
    recorded = {**held.metadata["attribution"], "share_by_kind": {"latent": 0.125, "embedding": 0.875}}
    other = replace(audit, continuations=replace(held, metadata={**held.metadata, "attribution": recorded}))
    text = Page(write(tmp_path, [other])).text
    assert "Effect of latents 12.5%" in text and "87.5% token embeddings" in text


@pytest.mark.slow
def test_label_and_context_of_a_latent_stand_before_its_number(page, audit, tmp_path):
    text = Page(page).text
    card = text[text.index("Latents that set it apart") :]
    assert card.index("responds to") < card.index("latent ")
    profile = made.make_profile()
    options = {"profiles": {made.HOOKS[0]: profile}, "labels": {made.HOOKS[0]: made.make_labels(profile)}}
    shown = write(tmp_path, [audit], **options)
    names = re.findall(r"(label \d+ </i>) AUROC 0.90 .*?latent (\d+) · layer 1", Page(shown).text)
    assert names and all(name == f"label {number} </i>" for name, number in names) and "</i>" not in shown
    with pytest.raises(ValueError, match="do not belong together"):
        write(tmp_path, [audit], **options | {"labels": {made.HOOKS[0]: made.make_labels(profile, made.HOOKS[1])}})


def test_only_corrected_p_values_count():
    row = {"n_units": 9, "p": 0.01, "p_holm": 0.08, "difference": 1.0}
    outcomes = [
        outcome(SimpleNamespace(**row | change))
        for change in (
            {},
            {"p_holm": 0.04},
            {"p_holm": 0.04, "difference": -1.0},
            {"n_units": 0},
            {"p_holm": float("nan")},
        )
    ]
    assert outcomes == ["same", "above", "below", "untested", "same"]


@pytest.mark.slow
def test_a_verdict_without_tests_gives_the_reason(tmp_path):
    audit = made.make_audit(validated=False)
    assert audit.verdict.answer == "untested"
    page = write(tmp_path, [audit])
    assert "Steering was not tested" in page and "Steering was not asked for, &lt;b&gt;by the way&lt;/b&gt;." in page
    assert 'id="p0-dose"' not in page and 'id="p0-specificity"' not in page and 'id="p0-curve"' in page


# --- figures ---


def test_effects_by_strength_are_means_over_the_same_members(audit):
    data = dose_data(audit.validation)
    members = audit.validation.members
    assert data["modes"] == [-1, 0, 1, 2] and data["strengths"] == list(made.STRENGTHS)
    keys = [method["key"] for method in data["methods"]]
    assert keys[0] == "joint" and data["n"][0] == [30] * len(keys)
    for m, measure in enumerate(("demeaned_logit", "mean_log_prob", "log_prob")):
        own = members[(members["measure"] == measure) & (members["method"] == "semantic") & (members["strength"] == 1)]
        for g, mode in enumerate(data["modes"]):
            part = own if mode < 0 else own[own["joint_cluster"] == mode]
            change, low, high = data["values"][m][g][keys.index("semantic")][-1]
            assert change == pytest.approx(part["change"].mean(), rel=1e-4) and low < change < high


def test_matrix_and_comparisons_are_those_of_the_validation(audit):
    columns, rows = specificity_cells(audit.validation)
    assert columns == [0, 1, 2] and [mode for mode, _ in rows] == [0, 1, 2]
    assert (
        rows[2][1][2] == ("+0.930", "heat-p5", True)
        and rows[0][1][1] == ("−0.120", "heat-n1", False)
        and rows[0][1][2].shade == ""
    )
    groups = comparisons(audit.validation)
    assert groups[0][1] == "demeaned_logit/slope" and len(groups) == 13
    table = audit.validation.summary()
    table = table[(table["measure"] == "demeaned_logit") & (table["statistic"] == "slope")]
    for line, row in zip(groups[0][2], table.itertuples(), strict=True):
        cells = line.cells
        assert float(cells["Difference"].replace("−", "-")) == pytest.approx(row.difference, abs=2e-3)
        assert cells["p, corrected"] == p_value(row.p_holm)
        assert (cells["Outcome"] == "own mode exceeds it") == (row.p_holm < 0.05 and row.difference > 0)


def test_maps_show_the_distances_that_the_clustering_pays_for(audit):
    data = maps_data(audit)
    e = audit.continuations.embeddings.double().numpy()
    pca = PCA(2).fit(e)
    assert data["meaning"]["share"] == pytest.approx(pca.explained_variance_ratio_.sum(), rel=1e-6)
    drawn = np.stack([data["meaning"]["x"], data["meaning"]["y"]], axis=1)
    expected = cdist(*[pca.transform(e)] * 2)
    assert np.allclose(cdist(drawn, drawn) / cdist(drawn, drawn).max(), expected / expected.max(), atol=1e-3)
    assert data["mechanism"]["metric"] == "l1" and 0 < data["mechanism"]["share"] < 1
    # With as few points as fit into the plane, squared distances on the map are the city-block distances themselves.
    a = audit.continuations.signatures.double().numpy()[:3]
    costs = cdist(a, a, "cityblock")
    flat = flat_map(costs, np.array([0.2, 0.5, 0.3]))
    assert np.allclose(cdist(flat.points, flat.points, "sqeuclidean"), costs) and flat.share == pytest.approx(1)


def test_of_very_many_continuations_a_part_is_drawn_with_every_medoid():
    audit = made.make_audit(MAX_POINTS + 300, 3, validated=False)
    rows = shown_rows(audit)
    assert MAX_POINTS <= len(rows) <= MAX_POINTS + 3 and set(audit.clusterer.medoid_indices_) <= set(rows.tolist())


# --- other audits ---


def test_one_mode_and_no_curve(tmp_path):
    audit = made.make_audit(20, 1, validated=False)
    text = Page(write(tmp_path, [replace(audit, path=pd.DataFrame())], about={}, config={})).text
    assert "All continuations are in one mode" in text and "Strongest latents" in text and "elsewhere" not in text
    assert "No other β and γ were tried" in text


@pytest.mark.slow
def test_several_prefixes_are_judged_together(audit, tmp_path):
    others = [made.make_audit(30, 2, prompt="Second"), made.make_audit(30, 2, prompt="Third", validated=False)]
    page = write(tmp_path, [audit, *others])
    text = Page(page).text
    assert re.findall(r'<option value="(p\d)">', page) == ["p0", "p1", "p2"]
    assert "With the continuations of 2 prefixes" in text and "too few to detect a change" in text
    other = replace(
        others[0], validation=replace(others[0].validation, settings={**others[0].validation.settings, "top": 3})
    )
    together = verdict_of([audit, other])
    assert "cannot be put together" in together["moves"].evidence and together.answer == "untested"
    ids = [value for name, value in Page(page).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {json.loads(block)["key"] for _, block in INSIDE.findall(page)} == {"p0", "p1", "p2"}


def test_what_cannot_be_reported_is_refused(audit, tmp_path):
    with pytest.raises(ValueError, match="prefixes is empty"):
        write(tmp_path, [])
    bare = replace(audit.continuations, embeddings=None, signatures=None, sources=None)
    with pytest.raises(ValueError, match="no embeddings and no signatures"):
        write(tmp_path, [replace(audit, continuations=bare)])


def test_figures_are_written_honestly():
    assert fixed(-0.0004, 3, plus=True) == "0.000" and fixed(-1.26, 1) == "−1.3" and fixed(float("nan"), 2) == "–"
    assert interval_decimals(0.0097, 0.0319) == 3 and interval_decimals(0.0, 0.0, 1.5) == 2
    assert [p_value(p) for p in (0.00012, 0.1, 0.999, float("nan"))] == ["0.00012", "0.10", "1", "–"]
    assert plain([1.0, True, None]) == "1, yes, none"
    assert quoted("a\r\nb\u202e") == "a↵b⟨U+202E⟩"
    assert len({mark_of(mode) for mode in range(64)}) == 64
