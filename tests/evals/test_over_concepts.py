"""Evaluations of many concepts by several workers: the evidence of one process to the bit, kept concept by concept."""

import gc
import os
import threading
import weakref
from dataclasses import replace

import joblib
import pytest
import torch

import saelens_ext as sx
from saelens_ext.concepts.detector import Detector
from saelens_ext.evals import untrained_twin
from tests.continuations._dictionaries import make
from tests.models_zoo import D_MODEL, make_model

HOOK = "blocks.1.hook_out"
CONCEPTS = [
    sx.Concept(
        name=letter,
        positives=[f"{letter} {letter}{letter} number {n}{more}" for n in range(4)],
        negatives=[f"nothing is number {n}{more}" for n in range(4)],
    )
    for letter, more in (("q", ""), ("z", " and so on, and on, and on it goes, to the end"), ("x", " or so"))
]


def load():
    return make_model("llama", "SAETransformerBridge")


def of_few_tokens(x):
    """Scores that there are only of a concept with short sentences."""
    if len(x) > 200:
        raise ValueError("too many tokens")
    return x[:, :2]


def methods():
    rows = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(1))
    picky = Detector(hook_name=HOOK, names=("one", "two"), score=of_few_tokens, row_cost=2)
    return [
        sx.Method.from_directions("directions", rows, HOOK),
        sx.Method.from_dictionary("codes", make("standard", "blocks.1.hook_out"), similarity="code"),
        sx.Method(name="picky", detector=picky, directions=rows[:2], acts_at=HOOK),
    ]


def detection(model, concepts=CONCEPTS, **options):
    given = {"n_splits": 2, "probe": False, "untrained_twin": untrained_twin} | options
    return sx.evaluate_detection(model, methods(), concepts, **given)


def probes(model, concepts=CONCEPTS, **options):
    dictionaries = {"codes": make("standard", HOOK)}
    return sx.evaluate_probes(model, dictionaries, concepts, **{"ks": (1, 2), "n_splits": 1} | options)


def counting(concept, prompt, texts):
    """A judge that cannot travel, since it holds a lock, and remembers what it has seen."""
    with LOCK:
        SEEN.append((concept, prompt, *texts))
    return [sx.JudgeScore(min(2.0, 0.1 + text.count(concept)), 2.0) for text in texts]


LOCK, SEEN = threading.Lock(), []


def steering(model, concepts=CONCEPTS, **options):
    given = {"prompts": ["The assert statement", "A list of names"], "targets": (0.1, 1.0), "signs": (1,), "n": 2}
    given |= {"options": sx.SamplingOptions(max_new_tokens=4), "columns": {"directions": {"q": 3}}}
    return sx.compare_steering(model, methods(), concepts, counting, **given | options)


EVALUATIONS = {"detection": detection, "probes": probes, "steering": steering}
OTHERS = {"detection": {"pooling": "mean"}, "probes": {"ks": (1,)}, "steering": {"targets": (0.1,)}}


def same(first, second):
    """Whether two evaluations found the same to the bit."""
    assert first.cells.equals(second.cells) and list(first.cells.dtypes) == list(second.cells.dtypes)
    assert first.failures == second.failures and first.settings == second.settings
    assert (first.kinds, first.descriptions) == (second.kinds, second.descriptions)
    if hasattr(first, "texts"):
        assert first.texts.equals(second.texts) and list(first.texts.dtypes) == list(second.texts.dtypes)
    return True


def whole(name):
    """The concepts that nothing fails on."""
    return 3 if name == "probes" else 2


@pytest.mark.slow
@pytest.mark.parametrize("name", EVALUATIONS)
def test_over_workers_it_is_the_same_to_the_bit_and_goes_on_from_the_folder(name, tmp_path):
    evaluate, loaded = EVALUATIONS[name], []

    def counted():
        loaded.append(1)
        return load()

    alone = evaluate(load())
    assert bool(alone.failures) == (whole(name) == 2)
    options = {"folder": tmp_path, "n_workers": 2}
    with joblib.parallel_config(backend="sequential"):
        assert same(evaluate(counted, CONCEPTS[:2], **options | {"folder": None}), evaluate(counted, CONCEPTS[:2]))
        before = len(loaded)
        assert same(evaluate(counted, **options), alone) and len(loaded) == before + 2, "here, and in the worker"
        kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("concept *.json")}
        assert len(kept) == whole(name)
        before = len(loaded)
        assert same(evaluate(counted, **options), alone)
    assert len(loaded) == before + (1 if whole(name) == 3 else 2), "what failed is tried again"
    assert same(evaluate(load(), folder=tmp_path), alone)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("concept *.json")} == kept
    for other in (OTHERS[name], {"seed": 1}, {"batch_size": 5}):
        with pytest.raises(ValueError, match="holds a sweep that differs in"):
            evaluate(load(), folder=tmp_path, **other)
    with pytest.raises(ValueError, match="holds a sweep that differs in model"):
        evaluate(make_model("gpt2", "SAETransformerBridge"), folder=tmp_path)


@pytest.mark.slow
def test_concepts_can_be_added_to_a_folder(tmp_path):
    detection(load(), CONCEPTS[:2], folder=tmp_path)
    kept = set(tmp_path.glob("concept *.json"))
    assert same(detection(load(), CONCEPTS[::-1], folder=tmp_path), detection(load(), CONCEPTS[::-1]))
    assert len(kept) == 1 and kept < set(tmp_path.glob("concept *.json"))
    x = torch.randn(60, D_MODEL, generator=torch.Generator().manual_seed(2))
    for given in ({"activations": {HOOK: x}}, {}):
        folder = tmp_path / str(len(given))
        first = probes(load(), CONCEPTS[:2], folder=folder, **given)
        assert not first.failures
        if given:
            assert same(probes(load(), folder=folder, **given), probes(load(), **given))
        else:  # sentences of all concepts take part in the coresets
            with pytest.raises(ValueError, match="holds a sweep that differs in activations"):
                probes(load(), folder=folder)


def test_a_concept_with_other_sentences_is_measured_anew(tmp_path):
    one, others = CONCEPTS[0], [f"some number, {n} or so" for n in range(4)]
    detection(load(), [one], folder=tmp_path)
    for changed in ({"positives": others}, {"negatives": others}, {"hard_negatives": others}):
        other = replace(one, **changed)
        assert same(detection(load(), [other], folder=tmp_path), detection(load(), [other]))


@pytest.mark.slow
def test_directions_of_all_concepts_are_made_anew_for_others(tmp_path):
    """Principal components and k-means of the sentences, which a folder of other concepts does not fit."""
    for baseline in ("pca", "kmeans"):
        given = {"folder": tmp_path / baseline, "baselines": (baseline,)}
        steering(load(), CONCEPTS[:1], **given)
        with pytest.raises(ValueError, match="holds a sweep that differs in concepts"):
            steering(load(), CONCEPTS[:2], **given)


def test_other_methods_are_told_from_those_of_a_folder(tmp_path, monkeypatch):
    detection(load(), CONCEPTS[:1], folder=tmp_path)
    first, codes, picky = methods()
    turned = sx.Method.from_directions("directions", -first.directions, HOOK)
    others = sx.Method.from_dictionary("codes", make("standard", HOOK, seed=3), similarity="code")
    narrower = replace(picky, detector=replace(picky.detector, score=lambda x: x[:, 1:3]))
    for changed in ([turned, codes, picky], [first, others, picky], [first, codes, narrower]):
        monkeypatch.setitem(globals(), "methods", lambda changed=changed: changed)
        with pytest.raises(ValueError, match="holds a sweep that differs in methods"):
            detection(load(), CONCEPTS[:1], folder=tmp_path)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_what_workers_need(name):
    with pytest.raises(ValueError, match="n_workers=2 needs a model for each worker: give a function"):
        EVALUATIONS[name](load(), n_workers=2)
    with pytest.raises(ValueError, match="workers must be one of 'joblib', 'ray', got 'dask'"):
        EVALUATIONS[name](load, workers="dask")
    with pytest.raises(ValueError, match="n_workers=2 needs a twin for each worker: give a function of the model"):
        detection(load, n_workers=2, untrained_twin=load())


@pytest.mark.slow
def test_judges_read_in_one_order_whoever_sampled(tmp_path):
    orders = []
    for options in ({}, {"n_workers": 2, "folder": tmp_path}, {"folder": tmp_path}):
        SEEN.clear()
        with joblib.parallel_config(backend="sequential"):
            steering(load, CONCEPTS[:2], baselines=("random", "prompting"), **options)
        orders.append(SEEN.copy())
    assert len(orders[0]) == 4 and orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize("name", EVALUATIONS)
def test_what_is_found_of_a_concept_does_not_depend_on_the_others(name):
    others = {"probes": {"controls": ()}, "steering": {"baselines": ("diff_means", "random")}, "detection": {}}[name]
    alone, found = (EVALUATIONS[name](load(), some, **others) for some in (CONCEPTS[:1], CONCEPTS))
    own = found.cells[found.cells["concept"] == "q"].reset_index(drop=True)
    assert own.equals(alone.cells) and len(own)
    if name == "steering":
        said = found.texts[found.texts["concept"] == "q"].reset_index(drop=True)
        assert said.equals(alone.texts)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVALUATIONS)
def test_the_model_here_is_let_go_before_workers_load_theirs(name):
    held = []

    def counted():
        gc.collect()
        held.append([one() is not None for one, _ in held])
        made = load()
        held[-1] = weakref.ref(made), held[-1]
        return made

    with joblib.parallel_config(backend="sequential"):
        EVALUATIONS[name](counted, CONCEPTS[:1], n_workers=2)
    assert [others for _, others in held] == [[], [False]]


# --- real workers ---


@pytest.mark.slow
def test_over_a_ray_cluster_it_is_the_same_to_the_bit(cluster):
    assert same(probes(load, n_workers=2, workers="ray"), probes(load))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:joblib", "ignore::ResourceWarning")
@pytest.mark.parametrize(("name", "workers"), [("detection", "joblib"), ("steering", "ray")])
def test_a_worker_that_is_killed_ends_the_call_and_the_next_goes_on(name, workers, tmp_path, request):
    if workers == "ray":
        request.getfixturevalue("cluster")
    here, folder, killed = os.getpid(), tmp_path / "kept", tmp_path / "killed"
    # One of the two has to do another after one that is kept.
    concepts = [*CONCEPTS, replace(CONCEPTS[0], name="q again")]

    def dying():
        """A model whose process is killed once a concept is done."""
        model = load()

        def die(x, hook):
            if os.getpid() != here and list(folder.glob("concept *.json")) and not killed.exists():
                killed.touch()
                os._exit(9)

        model.blocks[0].hook_out.add_hook(die, is_permanent=True)
        return model

    options = {"folder": folder, "n_workers": 2, "workers": workers}
    with pytest.raises(RuntimeError, match="A worker died .*the same call goes on from there"):
        EVALUATIONS[name](dying, concepts, **options)
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("concept *.json")}
    assert killed.exists() and kept
    assert same(EVALUATIONS[name](dying, concepts, **options), EVALUATIONS[name](dying, concepts))
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in folder.glob("concept *.json")}.items()
