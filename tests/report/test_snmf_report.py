"""The part on SNMF features: its figures and texts, and what is refused."""

import json
import re
from dataclasses import replace

import pytest
import torch

from saelens_ext.analysis.neuron_overlap import neuron_overlap
from saelens_ext.host.tokens import token_strings
from saelens_ext.report.dictionary import snmf_summary
from saelens_ext.report.dictionary.dictionary_report import write_dictionary_report
from saelens_ext.report.dictionary.features import activity_fractions, feature_data
from saelens_ext.report.dictionary.snmf_section import SNMFLevel, SNMFSection
from tests.report import synthetic, synthetic_snmf
from tests.report.synthetic_snmf import RANKS

INSIDE = re.compile(r'<script type="application/json" id="([a-z-]+)">(.*?)</script>', re.DOTALL)


@pytest.fixture(scope="module")
def tokenizer():
    return synthetic.make_tokenizer()


@pytest.fixture(scope="module")
def section(tokenizer):
    return synthetic_snmf.make_section(tokenizer)


@pytest.fixture(scope="module")
def data(section, tokenizer):
    return feature_data(section, tokenizer)


def write(path, tokenizer, **arguments):
    return write_dictionary_report(path, tokenizer=tokenizer, title="t", **arguments).read_text(encoding="utf-8")


def test_every_feature_carries_its_own_figures_and_texts(section, tokenizer, data):
    words = data["vocabulary"]

    def texts(ids):
        return token_strings(tokenizer, [i for i in ids.tolist() if i >= 0])

    f = 0
    for number, level in enumerate(section.levels):
        rows = level.dictionary.W_dec.detach()
        for index in range(RANKS[number]):
            assert (data["level"][f], data["index"][f]) == (number, index)
            assert data["neurons"][f] == rows[index].abs().argsort(descending=True, stable=True)[:9].tolist()
            assert data["weights"][f] == pytest.approx(rows[index, data["neurons"][f]].tolist(), abs=1e-4)
            assert data["firing"][f] == pytest.approx(int(level.profile.counts[index]) / 1000)
            assert [words[v] for v in data["promoted"][f]] == texts(level.lens.promoted_ids[index])
            assert [words[v] for v in data["suppressed"][f]] == texts(level.lens.suppressed_ids[index])
            examples = data["examples"][f]
            assert len(examples["tokens"]) == (0 if index == RANKS[number] - 1 else 6)
            for i, tokens in enumerate(examples["tokens"]):
                assert [words[v] for v in tokens] == texts(level.profile.top.contexts[index, i])
                assert words[tokens[examples["mark"][i]]] == texts(level.profile.top.token_ids[index, i : i + 1])[0]
            f += 1
    assert f == len(data["n_neurons"]) == sum(RANKS)
    assert data["top_token"][RANKS[0] - 1] is None


def test_shares_are_of_all_that_is_written(section):
    level = section.levels[0]
    shares = activity_fractions(level)
    assert float(shares.sum()) == pytest.approx(1) and shares[-1] == 0
    doubled = level.dictionary.W_dec.detach().clone()
    doubled[0] *= 2
    scaled = SNMFLevel(dictionary=type(level.dictionary).from_features(doubled), profile=level.profile)
    again = activity_fractions(scaled)
    assert float(again[0] / again[1]) == pytest.approx(2 * float(shares[0] / shares[1]), rel=1e-4)


def test_the_trees_go_both_ways(section, data):
    starts = [0, RANKS[0], RANKS[0] + RANKS[1]]
    for level in (1, 2):
        for node in section.hierarchy.trees(level):
            own = starts[level] + node.feature
            expected = [starts[level - 1] + child.feature for child in node.children]
            assert [child for child, _ in data["children"][own]] == expected and len(expected) == 4
            assert all(own in [parent for parent, _ in data["parents"][child]] for child in expected)
    assert sum(map(len, data["parents"])) == sum(map(len, data["children"])) == 4 * (RANKS[1] + RANKS[2])
    assert not any(data["children"][: RANKS[0]]) and not any(data["parents"][starts[2] :])
    for row in data["parents"]:
        assert [weight for _, weight in row] == sorted((weight for _, weight in row), reverse=True)


def test_overlaps_are_those_least_likely_by_chance(section, data):
    start = RANKS[0]
    table = neuron_overlap(section.levels[1].dictionary.W_dec.detach())
    for i in range(RANKS[1]):
        listed = data["overlaps"][start + i]
        others = [row["feature"] - start for row in listed]
        assert i not in others and len(set(others)) == len(others) == 6
        assert [row["p"] for row in listed] == sorted(row["p"] for row in listed)
        rest = [float(table.p_value[i, j]) for j in range(RANKS[1]) if j != i and j not in others]
        assert max(row["p"] for row in listed) <= min(rest) * (1 + 1e-3)
        for row, j in zip(listed, others, strict=True):
            assert row["shared"] == int(table.overlap[i, j]) and row["same_sign"] == int(table.same_sign[i, j])
            assert row["q"] == pytest.approx(float(table.p_adjusted[i, j]), rel=1e-3)


def test_continuations_are_with_their_feature(data):
    texts = data["steered"]["texts"]
    assert texts[4][0]["text"] == " feature 4 speaks" and texts[synthetic_snmf.UNREACHED][0]["text"] is None
    assert texts[5][0]["coefficient"] == 17.5 and "⟨U+202E⟩" in texts[0][0]["text"]
    assert texts[RANKS[0] :] == [[]] * (RANKS[1] + RANKS[2])


def test_the_summary_has_every_figure(section):
    facts = {fact.key: fact for fact in snmf_summary.snmf_facts(section)}
    assert facts["hook"].value == synthetic_snmf.HOOK and "blocks.2.mlp.out.hook_in" in facts["hook"].meaning
    assert (facts["features"].value, facts["loss"].value, facts["l1"].value) == ("60", "0.490", "0.1")
    assert "0.600 on documents" in facts["loss"].meaning and "at most 9 neurons" in facts["features"].meaning
    assert "1 are active nowhere" in facts["active"].meaning
    rows = snmf_summary.level_rows(section)
    table = {name: [row.cells[name] for row in rows] for name in rows[0].cells}
    assert [name for name, _ in table["Dictionary"]] == ["Level 0", "Level 1", "Level 2", "Without a tree"]
    assert table["Loss"] == ["0.490", "0.590", "0.690", "0.457"]
    assert table["Held out"] == ["0.600", "0.610", "0.620", "0.568"]
    assert table["Through the tree"][2] == "0.710" and table["Before refinement"][2] == "1.300"
    assert [table[name][3] for name in ("Dead", "Duplicates", "Revived")] == ["1", "2", "7"] and table["Dead"][0] == "1"


def test_one_dictionary_has_the_figures_of_its_fit(tokenizer):
    section = synthetic_snmf.make_flat_section(tokenizer)
    facts = {fact.key: fact for fact in snmf_summary.snmf_facts(section)}
    assert facts["loss"].value == "0.457" and "0.568 on documents" in facts["loss"].meaning
    assert facts["stopped"].value == "Convergence" and "hierarchy" not in snmf_summary.snmf_lead(section)
    (row,) = snmf_summary.level_rows(section)
    names = ("Dead", "Duplicates", "Revived", "Held out")
    assert [row.cells[name] for name in names] == ["1", "2", "7", "0.568"] and "Through the tree" not in row.cells


def test_duplicates_are_counted_once():
    features = torch.nn.functional.normalize(torch.randn(6, 90, generator=torch.Generator().manual_seed(0)), dim=1)
    features[3] = features[1] + 1e-3
    features[5] = 3 * features[1]
    features[4] = -features[0]
    dictionary = type(synthetic_snmf.make_dictionary(2, 0)).from_features(features)
    assert snmf_summary.n_duplicates(dictionary) == 2


def test_a_curve_spans_its_box_and_falls(section):
    for plot in snmf_summary.loss_plots(section):
        points = [tuple(map(float, point.split(","))) for point in plot.points.split()]
        assert points[0] == (0, 2) and points[-1] == (100, 38)
        assert all(after[1] >= before[1] for before, after in zip(points, points[1:], strict=False))


# --- the page ---


@pytest.mark.slow
def test_a_report_can_be_of_snmf_alone_of_regions_or_of_both(section, tokenizer, tmp_path):
    inputs = synthetic.make_inputs(20)
    alone = write(tmp_path / "a.html", tokenizer, snmf=section)
    assert [name for name, _ in INSIDE.findall(alone)] == ["feature-data"] and 'class="tabs' not in alone
    both = write_dictionary_report(tmp_path / "b.html", **vars(inputs), snmf=section).read_text(encoding="utf-8")
    assert [name for name, _ in INSIDE.findall(both)] == [
        "growth-data",
        "region-data",
        "feature-data",
    ] and 'class="tabs' in both
    flat = write(tmp_path / "c.html", tokenizer, snmf=synthetic_snmf.make_flat_section(tokenizer))
    assert "Through the tree" not in flat and "No continuation was steered" in flat
    ids = re.findall(r' id="([^"]*)"', both)
    assert len(ids) == len(set(ids))


def test_no_text_becomes_markup(section, tokenizer, tmp_path):
    steered = replace(section.steered, unsteered=synthetic_snmf.HOSTILE_TEXT, prompt="<b>bold</b>")
    page = write(tmp_path / "a.html", tokenizer, snmf=replace(section, steered=steered))
    assert "<script>window" not in page and "<b>bold" not in page and page.count("<script") == 2
    for _, block in INSIDE.findall(page):
        assert not set("<>&") & set(block) and block.isascii()
    assert set(synthetic.HOSTILE) <= set(json.loads(dict(INSIDE.findall(page))["feature-data"])["vocabulary"])
    assert page == write(tmp_path / "again.html", tokenizer, snmf=replace(section, steered=steered))


def test_unreached_targets_are_counted(section, tokenizer, tmp_path):
    assert "In 1 of 60 cases the target cannot be reached" in write(tmp_path / "a.html", tokenizer, snmf=section)
    reached = tuple(text for text in section.steered.texts if text.text is not None)
    whole = replace(section, steered=replace(section.steered, texts=reached))
    assert "reached with every feature" in write(tmp_path / "a.html", tokenizer, snmf=whole)


# --- what is refused ---


def test_parts_that_do_not_belong_together_are_refused(section, tokenizer):
    with pytest.raises(ValueError, match="needs a fit or a hierarchy"):
        SNMFSection(levels=section.levels)
    with pytest.raises(ValueError, match="levels must be of the dictionaries of hierarchy"):
        replace(section, levels=section.levels[:2])
    with pytest.raises(ValueError, match=r"levels must be of the dictionaries of fit\.dictionary"):
        replace(section, hierarchy=None)
    wrong = [replace(section.levels[0], profile=section.levels[1].profile), *section.levels[1:]]
    with pytest.raises(ValueError, match="profile of level 0 is of 12 latents, its dictionary of 60"):
        replace(section, levels=wrong)
    wrong = [section.levels[0], replace(section.levels[1], lens=section.levels[0].lens), section.levels[2]]
    with pytest.raises(ValueError, match="lens of level 1 is of 60 directions, its dictionary of 12"):
        replace(section, levels=wrong)
    with pytest.raises(ValueError, match="the first level has features 0 to 59"):
        replace(section, steered=synthetic_snmf.make_steered(61))


def test_half_an_exemplar_partition_is_refused(section, tokenizer, tmp_path):
    inputs = synthetic.make_inputs(5)
    with pytest.raises(ValueError, match="nothing to report on"):
        write(tmp_path / "a.html", tokenizer)
    with pytest.raises(ValueError, match="profile is missing"):
        write(tmp_path / "a.html", tokenizer, fits=inputs.fits, chosen=inputs.chosen, snmf=section)
    with pytest.raises(ValueError, match="chosen is missing"):
        write(tmp_path / "a.html", tokenizer, profile=inputs.profile)
    with pytest.raises(ValueError, match="need a partition"):
        write(tmp_path / "a.html", tokenizer, generations=inputs.generations, snmf=section)
    assert list(tmp_path.iterdir()) == []
