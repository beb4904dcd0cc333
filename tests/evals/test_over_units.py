"""Measurements of units by several workers: the same results, kept one by one, and one model here at a time."""

import gc
import weakref
from functools import partial

import joblib
import pytest

from saelens_ext.continuations.subject import Inputs
from saelens_ext.evals.over_units import OverUnits
from saelens_ext.evals.sweep_store import SweepStore
from tests.models_zoo import make_model

PROMPTS = ["a", "b", "c"]


def run(measure, model, folder=None, **options):
    inputs = Inputs(model=model, dictionaries=[], embedder=None, embeds=False)
    each = OverUnits(inputs=inputs, keys=PROMPTS, kind="prompt", **options)
    assert each.opened(lambda subject: subject.about) == each.about
    with joblib.parallel_config(backend="sequential"):
        return each.measured(partial(partial, measure), SweepStore.at(folder, {}), progress=False)


@pytest.mark.slow
def test_workers_give_what_one_process_gives_and_keep_it(tiny_bridge, tmp_path):
    measured, loaded = [], []

    def model():
        loaded.append(1)
        return tiny_bridge

    def measure(subject, number):
        measured.append(number)
        if number == 1 and "fails" in folder.name:
            raise ValueError("not this one")
        return {"value": number / 3, "width": (subject.model.cfg.d_model,)}

    expected = [{"value": number / 3, "width": [tiny_bridge.cfg.d_model]} for number in range(3)]
    for n_workers in (1, 2):
        folder = tmp_path / f"fails with {n_workers}"
        options = {"n_workers": n_workers}
        with pytest.raises(ValueError, match="not this one"):
            run(measure, model, folder, **options)
        before = len(measured)
        folder = folder.rename(tmp_path / f"works with {n_workers}")
        assert run(measure, model, folder, **options) == expected and measured[before:] == [1, 2]
        before = len(loaded)
        assert run(measure, model, folder, **options) == expected and len(loaded) == before + 1, "nothing to do"
        assert run(measure, model, None, **options) == expected


def test_what_does_not_last_is_measured_again(tiny_bridge, tmp_path):
    measured = []

    def measure(subject, number):
        measured.append(number)
        return {"value": number}

    for _ in range(2):
        found = run(measure, tiny_bridge, tmp_path, lasting=lambda found: found["value"] != 1)
        assert [one["value"] for one in found] == [0, 1, 2]
    assert measured == [0, 1, 2, 1]


@pytest.mark.slow
def test_the_model_here_is_let_go_before_workers_load_theirs():
    held = []

    def model():
        gc.collect()
        held.append([one() is not None for one, _ in held])
        made = make_model("llama", "SAETransformerBridge")
        held[-1] = weakref.ref(made), held[-1]
        return made

    run(lambda subject, number: {}, model, n_workers=2)
    assert [others for _, others in held] == [[], [False]]


def test_bad_input(tiny_bridge):
    with pytest.raises(ValueError, match="n_workers=2 needs a model for each worker: give a function without argum"):
        run(None, tiny_bridge, n_workers=2)
    with pytest.raises(ValueError, match="workers must be one of 'joblib', 'ray', got 'dask'"):
        run(None, tiny_bridge, workers="dask")
    with pytest.raises(ValueError, match="n_workers must be"):
        run(None, tiny_bridge, n_workers=0)
    models = iter(["llama", "gpt2"])
    with pytest.raises(ValueError, match="A worker audits another model"):
        run(lambda subject, number: {}, lambda: make_model(next(models), "SAETransformerBridge"), n_workers=2)
