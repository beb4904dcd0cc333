"""What goes wrong around a build: full disks, interruptions, failing evaluations, other data; and what a run claims of
itself.
"""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from sae_lens.load_model import HookedProxyLM

from saelens_ext import DictionaryProfile
from saelens_ext.activations.cached_stream import CachedStream
from saelens_ext.runner import (
    DictionaryRunner,
    DictionaryRunnerConfig,
    ExemplarBuildConfig,
    SNMFBuildConfig,
    build_pass,
    runner,
)
from saelens_ext.runner.checkpoints import Checkpoint
from saelens_ext.runner.evaluation import eval_windows
from saelens_ext.runner.results import BuiltDictionary
from saelens_ext.runner.sources import open_stream
from tests import models_zoo
from tests.runner.runs import FACTORS, HOOK, NEURONS, TEXTS, config

COARSE = ExemplarBuildConfig(percentile=20, calibration_activations=100)

_ON_A_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from saelens_ext import _files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    _files.write_tensors(Path(sys.argv[1]) / "x.safetensors", {"x": torch.zeros(100_000)})
except OSError as error:
    print(error.errno, error.filename)
"""


@pytest.mark.slow
def test_a_disk_that_is_really_full_gives_the_error_of_the_system(tmp_path):
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _ON_A_FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=600)
    number, path = done.stdout.split(maxsplit=1) if done.stdout else (done.stderr, "")
    assert number == str(errno.EFBIG) and "x.safetensors" in path
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_has_read_what_the_whole_one_would_have(tiny_bridge, tmp_path, monkeypatch):
    """The partition is done long before the end, which the factorisations, finished before the stop, have read to."""
    saturating = ExemplarBuildConfig(
        percentile=20, calibration_activations=50, stop="paper", saturation_window=1, hook_name=HOOK
    )
    options = {
        "hook_name": [HOOK, NEURONS],
        "dictionary": [saturating, FACTORS],
        "training_tokens": 400,
        "n_eval_batches": 1,
        "eval_batch_size_prompts": 2,
    }
    lasts = []

    def stop(stream, last, *_):
        lasts.append(last)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "eval_windows", stop)
    first = DictionaryRunner(config(tmp_path, **options), model=tiny_bridge, dataset=TEXTS)
    with pytest.raises(KeyboardInterrupt, match="Saved so far: .*snmf_k4"):
        first.run()
    given = config(tmp_path, **options, resume_from_checkpoint=str(first.result.checkpoint_path))
    again = DictionaryRunner(given, model=tiny_bridge, dataset=TEXTS)
    with pytest.raises(KeyboardInterrupt):
        again.run()
    assert lasts[0] == lasts[1] and again.result.n_activations == first.result.n_activations == 400


def test_windows_of_a_cache_are_never_called_unseen():
    stream = CachedStream.__new__(CachedStream)
    stream.context_size, stream.has_tokens = 3, True
    stream.token_windows = lambda: iter([(number, [1, 2, 3]) for number in range(8)])
    found = eval_windows(stream, last_document=3, batch_size=2, n_batches=2)
    assert len(found.windows) == 4 and not found.unseen


def test_figures_over_other_positions_do_not_pass_for_the_trainers(tiny_bridge, tmp_path):
    for positions, keys in (((None,), True), ((0, None), True), ((2, -2), False)):
        given = config(tmp_path, seqpos_slice=positions, n_eval_batches=1, training_tokens=300, dictionary=COARSE)
        (built,) = DictionaryRunner(given, model=tiny_bridge, dataset=TEXTS).run().dictionaries.values()
        assert ({"metrics/explained_variance", "metrics/l0", "losses/mse_loss"} <= set(built.figures())) is keys
        assert ("metrics/l0" in built.figures()) is keys
        assert built.evals["token_stats"].get("all_positions_of_windows", False) is not keys
        assert json.loads((built.path / "evals.json").read_text())["sparsity"]["l0"] > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_during_the_last_checkpoint(number, tiny_bridge, tmp_path, monkeypatch):
    save = Checkpoint.save

    def interrupted(self, folder):
        signal.raise_signal(number)
        return save(self, folder)

    monkeypatch.setattr(Checkpoint, "save", interrupted)
    one = DictionaryRunner(config(tmp_path, n_checkpoints=1), model=tiny_bridge, dataset=TEXTS)
    with pytest.raises(KeyboardInterrupt, match="Resume with resume_from_checkpoint=.*/600'"):
        one.run()
    assert not one.result.dictionaries and one.result.n_activations == 600


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_the_profile(number, tiny_bridge, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    # Without a handler of the run's own SIGTERM would end the tests.
    monkeypatch.setattr(runner, "profile_dictionaries", lambda *_, **__: signal.raise_signal(number))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(
            KeyboardInterrupt, match=f"Saved so far: {HOOK}_exemplars_p5, .*Resume with resume_from_checkpoint="
        ):
            DictionaryRunner(config(tmp_path, profile=True, n_checkpoints=1), model=tiny_bridge, dataset=TEXTS).run()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_a_named_model_needs_is_refused_with_an_open_one(tiny_bridge, tmp_path):
    given = config(tmp_path, model_from_pretrained_kwargs={"dtype": "bfloat16"})
    with pytest.raises(
        ValueError, match="model_from_pretrained_kwargs are for a model that is loaded by name, and an open"
    ):
        DictionaryRunner(given, model=tiny_bridge, dataset=TEXTS).run()
    with pytest.warns(
        UserWarning, match="model_name='gpt2' is recorded, and the model that was handed over calls itself 'tiny-llama'"
    ):
        open_stream(config(tmp_path, model_name="gpt2"), tiny_bridge, TEXTS)
    open_stream(config(tmp_path, model_name="someone/Tiny-Llama"), tiny_bridge, TEXTS)
    proxy = HookedProxyLM(models_zoo.make_hf_model("llama"), models_zoo.make_tokenizer())
    with pytest.warns(UserWarning, match="model_name='gpt2'"):
        open_stream(config(tmp_path, model_name="gpt2", hook_name="model.layers.1"), proxy, TEXTS)


def test_gathered_activations_are_let_go_with_their_last_fit(tiny_bridge, tmp_path, monkeypatch):
    seen = []
    original = build_pass.BuildPass.results

    def watched(self):
        for name, fit in original(self):
            seen.append([len(one.gathered.rows) for one in self._factorisations])
            yield name, fit

    monkeypatch.setattr(build_pass.BuildPass, "results", watched)
    factors = SNMFBuildConfig(n_components=[2, 3], sparsity=0.2, max_iter=2)
    given = config(tmp_path, hook_name=["blocks.0.mlp.out.hook_in", NEURONS], dictionary=factors, training_tokens=300)
    DictionaryRunner(given, model=tiny_bridge, dataset=TEXTS).run()
    # Two fits to each of two hooks, that share their rows.
    assert [[bool(n) for n in row] for row in seen] == [
        [True] * 4,
        [False] * 2 + [True] * 2,
        [False] * 2 + [True] * 2,
        [False] * 4,
    ]


def test_data_that_has_changed_is_noticed_however_it_is_read(tiny_bridge, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    options = {"dataset_path": str(data), "dictionary": COARSE, "training_tokens": 300}
    first = DictionaryRunner(config(tmp_path, **options, n_checkpoints=2), model=tiny_bridge).run()
    resume = {"resume_from_checkpoint": str(first.checkpoint_path)}
    DictionaryRunner(config(tmp_path, **options, **resume, streaming=False), model=tiny_bridge).run()
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[::-1]))
    for streaming in (True, False):
        with pytest.raises(ValueError, match="of another run: dataset_fingerprint was"):
            DictionaryRunner(config(tmp_path, **options, **resume, streaming=streaming), model=tiny_bridge).run()


def test_in_the_middle_of_a_bridge_s_block_predictions_are_not_evaluated(tiny_bridge, tiny_hooked, tmp_path, caplog):
    """SAELens would put the reconstruction into the MLP's input alone."""
    given = {"hook_name": "blocks.1.hook_resid_mid", "n_eval_batches": 1, "training_tokens": 300, "dictionary": COARSE}
    found = []
    for folder, model in ((tmp_path / "bridge", tiny_bridge), (tmp_path / "hooked", tiny_hooked)):
        one = DictionaryRunner(config(folder, **given), model=model, dataset=TEXTS).run()
        found.append(next(iter(one.dictionaries.values())).evals)
    assert "blocks.1.ln2.hook_in is the middle of a block" in caplog.text
    predictions = {"model_behavior_preservation", "model_performance_preservation"}
    assert not predictions & set(found[0]) and predictions <= set(found[1])
    for group in ("reconstruction_quality", "sparsity"):
        assert found[0][group] == pytest.approx(found[1][group], rel=1e-3)


def test_an_evaluation_that_fails_costs_neither_the_others_nor_what_is_logged(
    tiny_bridge, tmp_path, monkeypatch, caplog
):
    evaluate, tracked, calls = runner.evaluate, [], []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return evaluate(*arguments)

    monkeypatch.setattr(runner, "evaluate", failing)
    monkeypatch.setattr(DictionaryRunner, "_track", lambda self, built: tracked.append(built.name))
    one = DictionaryRunner(config(tmp_path, n_eval_batches=1), model=tiny_bridge, dataset=TEXTS)
    with caplog.at_level(logging.ERROR), pytest.raises(RuntimeError, match="out of memory"):
        one.run()
    assert tracked == list(one.result.dictionaries) and len(tracked) == 2
    assert [built.evals is None for built in one.result.dictionaries.values()] == [True, False]
    assert f"The evaluation of {HOOK}_exemplars_p5 failed (RuntimeError: out of memory)" in caplog.text


@pytest.mark.parametrize("step", ["save_fit", "save_profile", "save_evals"])
def test_an_error_in_saving_costs_only_what_is_saved(step, tiny_bridge, tmp_path, monkeypatch, caplog):
    save = getattr(BuiltDictionary, step)

    def failing(self, *arguments):
        if self.name.endswith("_p5"):
            raise TypeError("not JSON serializable")
        return save(self, *arguments)

    monkeypatch.setattr(BuiltDictionary, step, failing)
    one = DictionaryRunner(config(tmp_path, n_eval_batches=1, profile=True), model=tiny_bridge, dataset=TEXTS)
    with caplog.at_level(logging.ERROR), pytest.raises(TypeError, match="not JSON serializable"):
        one.run()
    assert f"{HOOK}_exemplars_p5 failed (TypeError: not JSON serializable)" in caplog.text
    names = {path.name for path in (tmp_path / "output" / f"{HOOK}_exemplars_p20").iterdir()}
    assert {"fit.json", "profile.json", "evals.json", "runner_cfg.json"} <= names
    assert all(built.evals is not None and built.profile is not None for built in one.result.dictionaries.values())


def test_paths_and_devices_of_a_config_cost_no_pass(tiny_bridge, tmp_path):
    given = config(tmp_path, output_path=tmp_path / "output", device=torch.device("cpu"), n_checkpoints=1)
    given.checkpoint_path = tmp_path / "checkpoints"  # even where it is set later
    result = DictionaryRunner(given, model=tiny_bridge, dataset=TEXTS).run()
    for built in result.dictionaries.values():
        saved = DictionaryRunnerConfig.from_json(built.path / "runner_cfg.json")
        assert saved.output_path == str(tmp_path / "output") and saved.device == "cpu"


@pytest.mark.slow
def test_a_finished_run_that_is_run_again_and_killed_keeps_its_profiles(tiny_bridge, tmp_path, monkeypatch):
    def run(**changes):
        given = config(tmp_path, n_eval_batches=1, profile=True, **changes)
        DictionaryRunner(given, model=tiny_bridge, dataset=TEXTS).run()

    run()
    folder = tmp_path / "output" / f"{HOOK}_exemplars_p5"
    kept = {name: (folder / name).read_bytes() for name in ("profile.json", "evals.json", "sparsity.safetensors")}

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "profile_dictionaries", killed)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert {name: (folder / name).read_bytes() for name in kept} == kept
    DictionaryProfile.load(folder, SAE.load_from_disk(folder))
    with pytest.raises(KeyboardInterrupt):
        run(training_tokens=500)
    assert not any((folder / name).exists() for name in kept), "they are of another dictionary"
