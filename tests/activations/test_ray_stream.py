"""Builds and sweeps spread over a local Ray cluster of two workers, against the same in one process."""

import os
from typing import Any

import distributed
import joblib
import numpy as np
import pytest
import ray
import torch

from saelens_ext.activations.ray_stream import RayActivationStream
from saelens_ext.activations.stream import ActivationStream
from saelens_ext.analysis.profile import profile_dictionary
from saelens_ext.continuations.clustering.joint_clusterer import rate_distortion_path
from saelens_ext.dictionaries.activation_matrix import ActivationSource, Restartable
from saelens_ext.dictionaries.fit_exemplars import fit_exemplar_partitions
from saelens_ext.dictionaries.fit_snmf import fit_snmf
from saelens_ext.ops import uniform_sample
from saelens_ext.ops.semi_nmf import streaming as semi_nmf_streaming
from saelens_ext.workers import ray_actors
from tests import models_zoo
from tests.test_modes import leaves

HOOKS = ["blocks.0.hook_out", "blocks.1.hook_out"]
OPTIONS = {"context_size": 16, "batch_size": 3, "max_tokens": 500}


def load():
    return models_zoo.make_model("llama", "SAETransformerBridge")


pytestmark = pytest.mark.slow  # starts clusters


def kill(actor):
    """Kill it and wait until it is dead: until then it goes on answering."""
    ray.kill(actor)
    with pytest.raises(ray.exceptions.RayActorError):
        while True:
            ray.get(actor.__ray_ready__.remote())


@pytest.fixture
def spread(cluster, tiny_texts):
    with RayActivationStream(load, tiny_texts, HOOKS, n_workers=2, **OPTIONS) as stream:
        yield stream


def test_batches_and_exemplars_are_those_of_one_process(spread, tiny_texts):
    single = ActivationStream(load(), tiny_texts, HOOKS, **OPTIONS)
    for mine, other in zip(single, spread, strict=True):
        for hook in HOOKS:
            assert torch.equal(mine.activations[hook], other.activations[hook])
        for name in ("token_ids", "sequence_ids", "positions", "document_ids", "windows"):
            assert torch.equal(getattr(mine, name), getattr(other, name))
    fits, spread_fits = (fit_exemplar_partitions(stream, (4, 10)) for stream in (single, spread))
    for cell, fit in fits.items():
        assert torch.equal(fit.dictionary.exemplars, spread_fits[cell].dictionary.exemplars)
        assert fit.dictionary.cfg.threshold == spread_fits[cell].dictionary.cfg.threshold
    # The work was done elsewhere: this process's model never ran.
    assert len(spread._actors) == 2 and spread.d_in == single.d_in


def test_modes_of_the_caller_change_nothing(spread, tiny_texts):
    single = list(ActivationStream(load(), tiny_texts, HOOKS, **OPTIONS))
    for mode in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            found = list(spread)
        for mine, other in zip(single, found, strict=True):
            assert torch.equal(mine.activations[HOOKS[1]], other.activations[HOOKS[1]])
            assert torch.equal(mine.token_ids, other.token_ids)
            assert not other.activations[HOOKS[1]].is_inference() and not other.windows.is_inference()


def test_an_actor_fails_as_the_stream_would(cluster, tiny_texts):
    def overflowing():
        model = load()
        model.blocks[0].hook_out.add_hook(lambda x, hook: x * torch.nan, is_permanent=True)
        return model

    with RayActivationStream(overflowing, tiny_texts, HOOKS, n_workers=1, **OPTIONS) as stream:
        with pytest.raises(ValueError, match="holds NaN or infinity"):
            next(iter(stream))


def test_another_model_in_an_actor_is_refused(cluster, tiny_texts):
    here = os.getpid()

    def other_there():
        return models_zoo.make_model("llama", "SAETransformerBridge", seed=int(os.getpid() != here))

    with RayActivationStream(other_there, tiny_texts, HOOKS, n_workers=1, **OPTIONS) as stream:
        with pytest.raises(ValueError, match=r"gives another model in a Ray actor \(weights '\w+' for '\w+'\)"):
            next(iter(stream))


def test_what_fails_in_loading_there_is_raised_as_it_is(cluster, tiny_texts):
    here = os.getpid()

    def fails_there():
        if os.getpid() != here:
            raise OSError("no such weights here")
        return load()

    with RayActivationStream(fails_there, tiny_texts, HOOKS, n_workers=1, restarts=1, **OPTIONS) as stream:
        with pytest.raises(OSError, match="no such weights here"):
            next(iter(stream))


def test_a_model_is_no_function_that_loads_it(tiny_texts):
    model: Any = load()
    with pytest.raises(ValueError, match="load_model must be a function .* got a SAETransformerBridge"):
        RayActivationStream(model, tiny_texts, HOOKS)


def test_more_actors_than_there_is_room_for(cluster, tiny_texts):
    with RayActivationStream(load, tiny_texts, HOOKS, n_workers=3, **OPTIONS) as stream:
        with pytest.raises(ValueError, match="n_workers=3 actors need 3 CPU .*and Ray has 2: lower n_workers"):
            next(iter(stream))
    with RayActivationStream(load, tiny_texts, HOOKS, n_workers=1, actor_options={"num_gpus": 9}, **OPTIONS) as stream:
        with pytest.raises(ValueError, match="need 9 GPU"):
            next(iter(stream))


def test_actors_that_wait_for_those_of_another_stream_say_so(cluster, tiny_texts, monkeypatch):
    monkeypatch.setattr(ray_actors, "_PATIENCE", 0.5)
    options: Any = {"n_workers": 1, "actor_options": {"num_cpus": 2}, **OPTIONS}
    with RayActivationStream(load, tiny_texts, HOOKS, **options) as second:
        with RayActivationStream(load, tiny_texts, HOOKS, **options) as first:
            n = sum(map(len, first))
            with pytest.warns(UserWarning, match=r"actors need 2 CPU .*Ray has 0 free. They wait .* close\(\) other"):
                second._started()
        assert sum(map(len, second)) == n, "they have begun since"


def test_an_actor_that_died_ends_the_pass_and_not_the_stream(cluster, tiny_texts):
    with RayActivationStream(load, tiny_texts, HOOKS, n_workers=1, **OPTIONS) as stream:
        batches = iter(stream)
        next(batches)
        kill(stream._actors[0])
        with pytest.raises(RuntimeError, match="A Ray actor died .*The next pass starts new ones"):
            list(batches)
        assert stream._actors == [] and len(next(iter(stream))) > 0
    assert ray.is_initialized(), "whoever started Ray shuts it down"


def test_work_on_batches_is_that_of_one_process(cluster, tiny_texts):
    def work(batches):
        # Documents longer than a window leave windows, and batches, of which nothing is read.
        return [(batch.first_sequence_id, batch.token_ids.tolist(), batch.activations[HOOKS[1]]) for batch in batches]

    def failing(batches):
        raise ValueError(f"of {sum(map(len, batches))}")

    options = OPTIONS | {"batch_size": 2, "last_token_only": True, "max_tokens": 7}
    single = ActivationStream(load(), tiny_texts, HOOKS, **options)
    with RayActivationStream(load, tiny_texts, HOOKS, n_workers=2, **options) as stream:
        expected, found = (list(one.mapped(work, 2)) for one in (single, stream))
        assert [len(part) for part in expected] == [2] * (len(expected) - 1) + [len(expected[-1])]
        assert sum(len(ids) for part in expected for _, ids, _ in part) == 7 and stream.d_in == single.d_in
        for mine, other in zip(
            [one for part in expected for one in part], [one for part in found for one in part], strict=True
        ):
            assert mine[:2] == other[:2] and torch.equal(mine[2], other[2])
        with pytest.raises(ValueError, match="^of 2$"):
            next(stream.mapped(failing, 2))


def _summed_up(stream, l1, held_out):
    """A profile, and a factorisation whose activations do not fit in memory."""
    fit = fit_snmf(stream, 3, max_iter=5, memory_limit=10_000, l1=l1, held_out=held_out)
    return fit, profile_dictionary(fit.dictionary, stream, hook_name=HOOKS[1], n_examples=2)


@pytest.mark.parametrize(
    ("killed", "l1", "held_out"),
    [(False, 0.0, 0.0), (True, 0.1, 0.25)],
    ids=["undisturbed", "a worker dies on the way"],
)
def test_factorisations_and_profiles_are_those_of_one_process(
    cluster, tiny_texts, killed, l1, held_out, caplog, monkeypatch
):
    monkeypatch.setattr(uniform_sample, "BATCHES", 2)
    single = ActivationStream(load(), tiny_texts, HOOKS[1], **OPTIONS)
    expected = _summed_up(single, l1, held_out)
    assert (expected[0].n_held_out > 0) == (held_out > 0)
    passes = []
    with RayActivationStream(load, tiny_texts, HOOKS[1], n_workers=2, restarts=1, **OPTIONS) as stream:
        in_turn = stream._in_turn

        def watched(tasks, work):
            passes.append(0)
            for answer in in_turn(tasks, work):
                passes[-1] += 1
                yield answer
                if killed and passes[-1] == 1 and len(passes) in (2, 3):  # the sample, and the first sums
                    kill(stream._actors[0])

        def not_here(x, problem, tol=0.0, max_sweeps=30, l1=0.0):
            raise AssertionError("codes of a pass over the stream are found in the actors")

        stream._in_turn = watched
        monkeypatch.setattr(semi_nmf_streaming, "solve_codes", not_here)
        found = _summed_up(stream, l1, held_out)
    for (path, one), (_, other) in zip(leaves(expected), leaves(found), strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7)) if isinstance(one, torch.Tensor) else one == other, (
            path
        )
    assert [record.message[:18] for record in caplog.records].count("A Ray actor died, ") == 2 * killed
    assert all(4 < n < len(list(single)) for n in passes[1:3]), "samples and sums are of several batches"


def test_of_a_sample_only_rows_that_may_stay_come_back(cluster, tiny_texts, monkeypatch):
    monkeypatch.setattr(uniform_sample, "BATCHES", 3)
    single = ActivationStream(load(), tiny_texts, HOOKS[1], **OPTIONS)
    sizes = []
    with RayActivationStream(load, tiny_texts, HOOKS[1], n_workers=2, **OPTIONS) as stream:
        in_turn = stream._in_turn

        def watched(tasks, work):
            for (part, met), n_read in in_turn(tasks, work):
                sizes.append((0 if part.rows is None else len(part.rows), n_read))
                yield (part, met), n_read

        stream._in_turn = watched
        expected, found = (
            uniform_sample.uniform_sample(
                Restartable(ActivationSource.of(one, None, 0.25)), 10, torch.Generator().manual_seed(4)
            )
            for one in (single, stream)
        )
    assert len(found.rows) == 10 and torch.equal(found.rows, expected.rows) and torch.equal(found.keys, expected.keys)
    assert (found.n, found.n_batches) == (expected.n, expected.n_batches) and found.n > 100
    assert len(sizes) > 2 and all(n_back <= 10 < n_read for n_back, n_read in sizes[:-1])


def test_restarts_are_counted_from_zero(tiny_texts):
    with pytest.raises(ValueError, match="restarts must be at least 0, got -1"):
        RayActivationStream(load, tiny_texts, HOOKS, restarts=-1, **OPTIONS)


def test_ray_is_shut_down_by_the_last_stream_that_started_it(tiny_texts):
    """No cluster of the tests': these streams use a stand-in that says what Ray would be asked."""

    class Ray:
        up, node, calls = False, "n1", []

        def is_initialized(self):
            return self.up

        def init(self, **_):
            self.up = True

        def shutdown(self):
            self.up = False

        def get_runtime_context(self):
            return self

        def get_node_id(self):
            return self.node

        def cluster_resources(self):
            return {"CPU": 2.0}

        available_resources = cluster_resources

        def kill(self, actor):
            self.calls.append(actor)

    stand_in = Ray()
    stand_in.remote = lambda *_, **__: lambda kind: type("Actor", (), {"remote": staticmethod(lambda *_: "actor")})
    one, other = (RayActivationStream(load, tiny_texts, HOOKS, n_workers=1, **OPTIONS) for _ in range(2))
    one._ray = other._ray = stand_in
    one._started(), other._started()
    one.close()
    assert stand_in.up
    other.close()
    assert not stand_in.up and stand_in.calls == ["actor"] * 2
    stand_in.up, stand_in.node = True, "n2"  # the user's own
    one._started()
    one.close()
    assert stand_in.up


def check_sweep(backend):
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(40, 5)), rng.normal(size=(40, 60))
    here = rate_distortion_path(X, y, [0.75, 1.25], [0.3, 0.7], random_state=0)
    with joblib.parallel_config(backend=backend, n_jobs=2):
        there = rate_distortion_path(X, y, [0.75, 1.25], [0.3, 0.7], random_state=0)
    for mine, other in zip(here.points, there.points, strict=True):
        assert np.array_equal(mine.labels, other.labels) and mine.objective == other.objective


def test_a_sweep_of_the_clusterer_spreads_over_ray(cluster):
    from ray.util.joblib import register_ray

    register_ray()
    check_sweep("ray")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_sweep_of_the_clusterer_spreads_over_dask(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    # Threads of this process rather than processes of their own: the same scheduler, and no second import of
    # everything.
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as local:
        with distributed.Client(local):
            check_sweep("dask")
