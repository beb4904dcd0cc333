"""The audit of reasoning steps: a model that copies from step 2, the columns of its spans, controls, and pages."""

from dataclasses import replace

import joblib
import numpy as np
import pandas as pd
import pytest
import torch

from saelens_ext.continuations.audit_stages.config import AuditConfig
from saelens_ext.continuations.sample import score_continuations
from saelens_ext.continuations.step_tree import StepTree
from saelens_ext.evals.continuations import step_pairs as pairs
from saelens_ext.evals.continuations import steps as steps_module
from saelens_ext.evals.continuations.steps import StepAudit, audit_steps
from saelens_ext.evals.evidence import Evidence
from saelens_ext.report.evidence_report import write_evidence_report
from tests.continuations._dictionaries import make
from tests.models_zoo import D_MODEL, make_model

HOOK = "blocks.1.hook_resid_post"
KEY, DIRECTIONS = 0, {"A": 4, "B": 5, "C": 6, "D": 7, "x": 10, "y": 11}
OUT = {"x": 14, "y": 15}
CONFIG = AuditConfig(
    embedding="sentence",
    betas=(2.0,),
    gammas=(0.3,),
    n_clusters=(2, 4),
    min_cluster_size=3,
    n_resamples=2,
    max_rows=6,
    strengths=(-0.5, 0.5),
)


@pytest.fixture(scope="module")
def copier():
    """A model whose last layer copies from tokens A (to x) and B (to y), wherever they stand, and from no others."""
    model = make_model("gpt2", "HookedSAETransformer")
    ids = {name: model.to_single_token(name) for name in (*DIRECTIONS,)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.zero_()
            if name.endswith("ln1.w") or name.endswith("ln2.w") or name == "ln_final.w":
                parameter.fill_(1.0)
        model.W_E.copy_(0.01 * torch.randn(model.W_E.shape, generator=torch.Generator().manual_seed(0)))
        model.W_E[:, 20] = 80.0  # so large that scaling a latent hardly changes a token's norm, and with it who is read
        for name, direction in DIRECTIONS.items():
            model.W_E[ids[name], direction] += 8.0
            model.W_E[ids[name], KEY] += 8.0 * (name in "AB")
        last = model.blocks[2].attn
        last.b_Q[0, 0] = last.W_K[0, KEY, 0] = 6.0
        for column, (source, out) in enumerate((("A", "x"), ("B", "y"))):
            last.W_V[0, DIRECTIONS[source], column] = 10.0
            last.W_O[0, column, OUT[out]] = 10.0
            model.W_U[OUT[out], ids[out]] = 1.0
    return model


@pytest.fixture(scope="module")
def latents():
    """One latent for each of the tokens A, B, C and D."""
    sae = make("standard", HOOK, D_MODEL, d_sae=4)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
        for latent, name in enumerate("ABCD"):
            sae.W_enc[DIRECTIONS[name], latent] = sae.W_dec[latent, DIRECTIONS[name]] = 1.0
    return sae


def make_tree(model, prompt):
    """Steps "CD.", "AB." and candidates that say x or y."""
    texts = (["CD.", "DC.", "CC."], ["AB.", "BA.", "AA.", "BB."], [f"{c * 3}{i}." for c in "xy" for i in range(5)])
    steps, prefix = [], prompt
    for candidates in texts:
        steps.append(score_continuations(model, prefix, candidates))
        prefix += candidates[0]
    return StepTree(steps=tuple(steps), committed=(0, 0, 0), ended_by="max_steps", settings={})


@pytest.fixture(scope="module")
def tree(copier):
    return make_tree(copier, "Q:")


@pytest.fixture(scope="module")
def other_problem(copier):
    return make_tree(copier, "P?")


@pytest.fixture(scope="module")
def found(copier, latents, tree, other_problem):
    return audit_steps(copier, [tree, other_problem], latents, sources="all", audit=CONFIG)


def slopes(evidence, method, source, target=3):
    cells = evidence.cells
    chosen = (cells["method"] == method) & (cells["metric"] == "slope")
    return cells[chosen & (cells["source"] == source) & (cells["target"] == target)]["value"].tolist()


@pytest.mark.slow
def test_only_the_step_that_is_copied_from_moves_what_follows(found):
    assert min(slopes(found, pairs.OWN, 2)) > 0.3 and len(slopes(found, pairs.OWN, 2)) == 2
    for source in (0, 1):
        assert all(abs(slope) < 1e-3 for slope in slopes(found, pairs.OWN, source))
    # What was copied goes along with the step, and is not at its old place.
    assert slopes(found, pairs.MOVED, 2) == pytest.approx(slopes(found, pairs.OWN, 2), rel=0.2)
    assert all(abs(slope) < 1e-3 for slope in slopes(found, pairs.PLACE, 2))
    assert all(abs(slope) < 1e-3 for slope in slopes(found, pairs.ELSEWHERE, 2))
    assert min(slopes(found, pairs.ALL, 1)) > 0.3 and slopes(found, pairs.ALL, 1) == slopes(found, pairs.ALL, 2)
    share = found.by_pair().set_index(["source", "target"])["attribution_share"]
    assert share[2, 3] > 0.5 and share[1, 3] < 0.1


def test_columns_of_all_spans_are_the_full_signature(copier, latents, tree):
    target = pairs.read_target(copier, [latents], tree, 3, None, CONFIG)
    parts = [target.columns(span) for span in target.spans]
    whole = target.rows.signatures
    assert sorted(column for part in parts for column in part) == list(range(whole.shape[1])) and all(parts[1:])
    assert sum(pairs.share_of(target.rows, part) for part in parts) == pytest.approx(1.0)
    # In the other order each step keeps its tokens, and stands where it did not stand.
    for step in (1, 2):
        low, high = target.moved[step]
        assert list(target.shuffled.prefix_ids[low:high]) == tree.ids_of(step - 1) and (low, high) != target.spans[step]
    assert target.shuffled.texts == target.rows.texts and torch.equal(
        target.shuffled.embeddings, target.rows.embeddings
    )


@pytest.mark.parametrize("source", [0, 1, 2, 3])
def test_a_run_elsewhere_is_as_long_and_apart(source):
    spans = [(0, 6), (6, 10), (10, 13), (13, 20)]
    found = {pairs.elsewhere(spans, source, np.random.default_rng(seed)) for seed in range(40)}
    low, high = spans[source]
    for start, end in found:
        assert end - start == high - low and (end <= low or start >= high) and end <= 20
        assert start >= 6  # within steps where they have room
    assert len(found) > 1 or source == 3  # which is as long as the steps before it
    assert pairs.elsewhere([(0, 3), (3, 9)], 1, np.random.default_rng(0)) is None


@pytest.mark.slow
def test_a_killed_audit_goes_on_to_the_same_bits(copier, latents, tree, other_problem, found, tmp_path, monkeypatch):
    kept, calls = steps_module._target, []

    def killed(*args):
        calls.append(args[3])
        if calls == [2, 3]:
            raise KeyboardInterrupt
        return kept(*args)

    monkeypatch.setattr(steps_module, "_target", killed)
    options = {"sources": "all", "audit": CONFIG, "folder": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        audit_steps(copier, tree, latents, **options)
    with joblib.parallel_config(backend="sequential"):
        again = audit_steps(lambda: copier, tree, latents, n_workers=2, **options)  # in a worker
    assert calls == [2, 3, 3], "the second step was there"
    whole = found.cells[found.cells["problem"] == "problem 000"]
    pd.testing.assert_frame_equal(again.cells, whole, check_exact=True)
    assert again.failures == tuple(one for one in found.failures if one.unit.startswith("problem 0"))
    with pytest.raises(ValueError, match="differs in sources"):
        audit_steps(copier, tree, latents, **options | {"sources": "prompt"})
    # Problems may be added; a step of other candidates is another one.
    calls.clear()
    nothing = {"source": 1, "distance": 1, "method": pairs.OWN, "metric": "slope", "value": 0.0}
    made = {"cells": [nothing], "failures": []}
    monkeypatch.setattr(steps_module, "_target", lambda *args: calls.append(args[3]) or made)
    fewer = replace(tree, steps=(*tree.steps[:2], tree.steps[2].select(range(len(tree.steps[2]) - 1))))
    audit_steps(copier, [other_problem, tree], latents, **options)
    assert calls == [2, 3]
    audit_steps(copier, fewer, latents, **options)
    assert calls == [2, 3, 3]


def test_what_is_refused(copier, latents, tree):
    one = StepTree(steps=tree.steps[:1], committed=(0,), ended_by="eos", settings={})
    with pytest.raises(ValueError, match=r"problem 1 has one step only \('CD.'\), which no step precedes"):
        audit_steps(copier, [tree, one], latents, audit=CONFIG)
    with pytest.raises(ValueError, match="Two trees have the same prompt"):
        audit_steps(copier, [tree, tree], latents, audit=CONFIG)
    with pytest.raises(ValueError, match="trees is empty"):
        audit_steps(copier, [], latents, audit=CONFIG)
    with pytest.raises(ValueError, match="sources must be one of 'each_step', 'prompt', 'all', got 'steps'"):
        audit_steps(copier, tree, latents, sources="steps", audit=CONFIG)
    short = StepTree(steps=tree.steps[:2], committed=(0, 0), ended_by="eos", settings={})
    with pytest.raises(
        ValueError, match="No pair of steps could be measured; the first failed so: the whole prefix on problem 0"
    ):
        audit_steps(copier, short, latents, audit=CONFIG)


def made(n_problems, *, seed=0, moved=0.5):
    """Evidence of made-up slopes: step 2 moves step 3, and nothing else does anything."""
    rng, cells = np.random.default_rng(seed), []
    for problem in range(n_problems):
        for source, target in ((1, 2), (1, 3), (2, 3)):
            where = {
                "problem": f"problem {problem:03d}",
                "source": source,
                "target": target,
                "distance": target - source,
            }
            values = {
                (pairs.OWN, "slope"): moved * (source == 2) + 0.05 * rng.normal(),
                (pairs.ELSEWHERE, "slope"): 0.05 * rng.normal(),
                (pairs.NOTHING, "slope"): 0.0,
                (pairs.OWN, "attribution_share"): 0.3,
            }
            if target > 2:
                values[pairs.MOVED, "slope"] = values[pairs.OWN, "slope"]
            cells += [where | {"method": m, "metric": name, "value": x} for (m, name), x in values.items()]
    kinds = {name: "unsupervised" if name == pairs.OWN else "control" for name in pairs.DESCRIPTIONS}
    return StepAudit(
        cells=pd.DataFrame(cells),
        kinds={name: kinds[name] for name in (pairs.OWN, pairs.ELSEWHERE, pairs.MOVED, pairs.NOTHING)},
        candidates=[{"prompt": "p", "n_steps": 1, "ended_by": "eos", "candidates": [{"step": 1, "committed": True}]}],
    )


def test_pairs_are_tested_where_ten_problems_have_them():
    evidence = made(12)
    table = evidence.by_pair().set_index(["source", "target"])
    assert table.loc[(2, 3), "p_holm"] < 0.01 < 0.05 < table.loc[(1, 3), "p_holm"]
    assert table.loc[(2, 3), "low"] > 0.4 and (table["n_problems"] == 12).all()
    assert table.loc[(2, 3), "p_holm"] == pytest.approx(3 * table.loc[(2, 3), "p"])
    said = evidence.verdict().splitlines()
    assert said[-2].startswith(
        "Of 3 pairs of steps tested one by one, 1 have a slope that can be told from 0: step 2 to"
    )
    assert said[-1].startswith(
        "Of 3 pairs of steps tested one by one, 1 have a slope that can be told from that of as "
    )
    assert evidence.by_source()["n_problems"].tolist() == [12, 12]
    assert evidence.by_distance().set_index("distance").loc[1, "slope"] == pytest.approx(0.25, abs=0.05)
    few = made(9)
    assert (
        few.by_pair()["p"].isna().all()
        and "10 problems for a slope that can be told from 0 (at most 9)" in few.verdict()
    )


def test_methods_are_compared_on_the_pairs_that_both_have():
    table = made(12).comparisons().set_index("other")
    assert table.loc[pairs.MOVED, "difference"] == 0.0  # though the step's own mean has a pair that the other lacks
    assert table.loc[pairs.NOTHING, "p_holm"] < 0.01 and pairs.ELSEWHERE not in table.index
    beside = made(12).by_pair(pairs.ELSEWHERE).set_index(["source", "target"])
    assert beside.loc[(2, 3), "difference"] > 0.4 > abs(beside.loc[(1, 3), "difference"])
    with pytest.raises(ValueError, match="control must be one of"):
        made(12).by_pair("nothing like it")
    nothing = made(12, moved=0.0, seed=2).comparisons().set_index("other")
    assert nothing.loc[pairs.NOTHING, "p_holm"] > 0.05


def test_the_page_shows_a_triangle_and_the_committed_candidate(found, tmp_path):
    section = found.section()
    heat = section.heat_maps[0]
    assert (heat.rows == ("3",) and heat.columns == ("prompt", "1", "2")) or heat.columns == ("1", "2")
    assert all(text == "n = 2" for text in heat.texts[0] if text)
    table = next(one for one in section.tables if one.title == "Candidates of problem 0")
    marks = [row[table.columns.index("committed")] for row in table.rows]
    assert marks.count("committed") == 3 and len(marks) == 3 + 4 + 10
    page = write_evidence_report(tmp_path / "steps.html", [section]).read_text()
    assert "Slope by source and target" in page and "xxx0." in page
    again = Evidence.load(found.save(tmp_path / "saved"))
    assert isinstance(again, StepAudit) and again.verdict() == found.verdict() and again.candidates == found.candidates
