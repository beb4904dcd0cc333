"""Every cell of a sweep over percentiles and orders, from one reading of the prompts."""

import importlib
import json
import os

import joblib
import numpy as np
import pytest
import torch

import saelens_ext as sx
from saelens_ext.evals.behaviour.passes import Asking, Condition
from tests import organisms

sweeping = importlib.import_module("saelens_ext.evals.behaviour.sweep")
HOOK = organisms.HOOK
SAYS_IT = sx.begins_with([organisms.SAYS], within=1)
GRID = {"percentiles": (20, 40), "seeds": (0, 1, 2)}
OPTIONS = {"chat_template": False, "max_new_tokens": 1, "n_bootstrap": 50, "n_permutations": 200}


@pytest.fixture(scope="module")
def model():
    return organisms.planted_model("SAETransformerBridge")[0]


@pytest.fixture(scope="module")
def split():
    sides = [organisms.prompts(seed, 30, trigger=trigger) for seed, trigger in ((1, True), (2, False))]
    mixed = [[text for pair in zip(*(side[a : a + 12] for side in sides)) for text in pair] for a in (0, 12)]
    return sx.PromptSplit(build=mixed[0], choose=mixed[1], test=sides[0][24:])


@pytest.fixture(scope="module")
def swept(model, split):
    return sx.localisation_sweep(model, HOOK, split, SAYS_IT, **GRID, **OPTIONS)


@pytest.mark.slow
def test_every_cell_of_a_planted_behaviour_collapses(swept):
    table = swept.table()
    assert len(table) == 6 and (table["change"] == -1).all() and (table["rate"] == 1).all()
    share = swept.collapsed()
    assert share.estimate == 1 and share.n_units == 6 and share.low < 0.7
    assert (table["ablation_p"] == 2.0**-5).all()
    assert (table["ablation_p_holm"] > 2.0**-5).all()
    assert "In 6 of 6 cells" in swept.verdict() and "best cell" not in swept.verdict()
    (heat,) = swept.section().heat_maps
    assert heat.values == ((-1.0,) * 3,) * 2 and heat.columns == ("0", "1", "2")


def test_a_cell_is_what_its_own_order_gives(model, split, swept):
    built = sx.read_texts(model, HOOK, split.build)
    x, documents = built.activations[HOOK], built.document_ids
    base = sx.fit_exemplar_partition(x, percentile=20, document_ids=documents, hook_name=HOOK)
    order = np.random.default_rng(2).permutation(len(split.build))
    rows = torch.cat([(documents == int(document)).nonzero()[:, 0] for document in order])
    fit = sx.fit_exemplar_partition(x[rows], document_ids=documents[rows], hook_name=HOOK, calibration=base)
    cell = next(cell for cell in swept.grid if (cell["percentile"], cell["seed"]) == (20, 2))
    options = {name: OPTIONS[name] for name in ("chat_template", "max_new_tokens")}
    found = sx.localise_behaviour(model, fit.dictionary, split, SAYS_IT, **options)
    assert cell["n_regions"] == len(fit.counts)
    assert cell["region"] == found.candidates[0].region and cell["members"] == found.candidates[0].members


def test_prompts_are_read_and_asked_once_for_all_cells(model, split, monkeypatch):
    asked, read = [], []
    ask, read_texts = Asking.ask, sweeping.read_texts

    def counted(self, prompts, conditions=(Condition(name="plain"),), *, progress=False):
        asked.append((tuple(prompts), len(conditions)))
        return ask(self, prompts, conditions, progress=progress)

    def counting(model, hook_names, texts, **options):
        read.append(tuple(texts))
        return read_texts(model, hook_names, texts, **options)

    monkeypatch.setattr(Asking, "ask", counted)
    monkeypatch.setattr(sweeping, "read_texts", counting)
    sx.localisation_sweep(model, HOOK, split, SAYS_IT, **GRID, **OPTIONS, matched=False)
    assert read == [split.build, split.choose]
    assert asked == [(split.choose, 1), (split.test, 1), (split.test, 6)]


@pytest.mark.slow
def test_it_goes_on_from_the_cells_that_are_there(model, split, swept, tmp_path, monkeypatch):
    first = sx.localisation_sweep(model, HOOK, split, SAYS_IT, **GRID, **OPTIONS, folder=tmp_path)
    assert first.table().equals(swept.table())
    (tmp_path / "cell p20 seed 1.json").unlink()
    asked, ask = [], Asking.ask

    def counted(self, prompts, conditions=(Condition(name="plain"),), *, progress=False):
        asked.append(len(conditions))
        return ask(self, prompts, conditions, progress=progress)

    monkeypatch.setattr(Asking, "ask", counted)
    again = sx.localisation_sweep(model, HOOK, split, SAYS_IT, **GRID, **OPTIONS, folder=tmp_path)
    assert len(asked) == 1 and asked[0] in (1, 2)
    assert again.table().equals(swept.table())
    with pytest.raises(ValueError, match=r"sweep that differs in min_members \(5, now 4\)"):
        sx.localisation_sweep(model, HOOK, split, SAYS_IT, **GRID, **OPTIONS, folder=tmp_path, min_members=4)
    other = sx.PromptSplit(build=split.build, choose=split.choose, test=split.test[:3])
    with pytest.raises(ValueError, match="sweep that differs in"):
        sx.localisation_sweep(model, HOOK, other, SAYS_IT, **GRID, **OPTIONS, folder=tmp_path)
    assert json.loads((tmp_path / "sweep.json").read_text())["hook_name"] == HOOK
    asked.clear()
    wider = {"percentiles": (40, 20, 30), "seeds": (0, 1)}
    more = sx.localisation_sweep(model, HOOK, split, SAYS_IT, **wider, **OPTIONS, folder=tmp_path)
    assert len(asked) == 1 and len(more.table()) == 6  # the two cells of the new percentile
    with monkeypatch.context() as changed:
        fingerprint = "saelens_ext.host.weights_fingerprint.weights_fingerprint"
        changed.setattr(fingerprint, lambda module: "others")
        with pytest.raises(ValueError, match="sweep that differs in model"):
            sx.localisation_sweep(model, HOOK, split, SAYS_IT, **GRID, **OPTIONS, folder=tmp_path)


def test_a_backend_of_threads_gives_the_same(model, split, swept):
    with joblib.parallel_config("threading"):
        found = sx.localisation_sweep(model, HOOK, split, SAYS_IT, **GRID, **OPTIONS, n_jobs=2)
    assert found.table().equals(swept.table())


def test_cells_without_a_candidate_are_shown_and_count(model, split, tmp_path):
    found = sx.localisation_sweep(model, HOOK, split, SAYS_IT, **GRID, **OPTIONS, min_members=20)
    table = found.table()
    assert len(table) == 6 and table["change"].isna().any()
    n = int(table["change"].isna().sum())
    assert f"{n} cells have no candidate" in found.verdict() and found.collapsed().n_units == 6
    assert sx.Evidence.load(found.save(tmp_path)).verdict() == found.verdict()
    page = sx.write_evidence_report(tmp_path / "page.html", [found.section()]).read_text()
    assert page.count("no candidate") == n + 1


@pytest.mark.parametrize("options", [{"percentiles": ()}, {"seeds": (1, 1)}, {"basis": "both"}, {"percentiles": (0,)}])
def test_bad_options(model, split, options):
    with pytest.raises(ValueError):
        sx.localisation_sweep(model, HOOK, split, SAYS_IT, **{**GRID, **OPTIONS, **options})


def test_a_behaviour_that_is_never_shown_is_refused(model, split):
    with pytest.raises(ValueError, match="never shown"):
        sx.localisation_sweep(model, HOOK, split, sx.begins_with(["xyzzy"]), **GRID, **OPTIONS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:joblib", "ignore::ResourceWarning")
@pytest.mark.parametrize("workers", ["joblib", "ray"])
def test_a_worker_that_is_killed_ends_the_call_and_the_next_goes_on(
    workers, model, split, swept, tmp_path, monkeypatch, request
):
    if workers == "ray":
        request.getfixturevalue("cluster")
    here, killed = os.getpid(), tmp_path / "killed"

    def dying(*args):
        if os.getpid() != here and not killed.exists():
            killed.touch()
            os._exit(9)
        # In a worker that is the function itself.
        return importlib.import_module("saelens_ext.evals.behaviour.sweep")._locate(*args)

    options = {**GRID, **OPTIONS, "folder": tmp_path / "sweep", "n_jobs": 2, "workers": workers}
    said = "A worker died .* What was finished is in the folder; the same call goes on"
    with pytest.MonkeyPatch.context() as patch:  # what travels to a worker cannot hold the function that it replaces
        patch.setattr(sweeping, "_locate", dying)
        with pytest.raises(RuntimeError, match=said):
            sx.localisation_sweep(model, HOOK, split, SAYS_IT, **options)
    assert killed.exists()
    asked, ask = [], Asking.ask

    def counted(self, prompts, conditions=(Condition(name="plain"),), *, progress=False):
        asked.append(len(conditions))
        return ask(self, prompts, conditions, progress=progress)

    monkeypatch.setattr(Asking, "ask", counted)
    found = sx.localisation_sweep(model, HOOK, split, SAYS_IT, **options)
    assert found.table().equals(swept.table())
    assert 1 not in asked[:1], "what the plain model answers was there"


def test_workers_are_those_that_are_known(model, split):
    with pytest.raises(ValueError, match="workers must be one of 'joblib', 'ray', got 'dask'"):
        sx.localisation_sweep(model, HOOK, split, SAYS_IT, **GRID, **OPTIONS, workers="dask")
