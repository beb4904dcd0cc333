"""A run that was stopped anywhere and taken up again gives what it would have given."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saelens_ext import ExemplarFitResult, SNMFFitResult
from saelens_ext.activations.stream import ActivationStream
from saelens_ext.dictionaries.grow_exemplars import ExemplarBuild, ExemplarFitConfig
from saelens_ext.runner import DictionaryRunner, ExemplarBuildConfig, SNMFBuildConfig, build_pass
from tests.runner.runs import FACTORS, HOOK, NEURONS, PARTITIONS, TEXTS, assert_same_partition, config


def only_run(folder: Path) -> Path:
    (run,) = (folder / "checkpoints").iterdir()
    return run


@pytest.fixture(scope="module")
def straight(tiny_bridge, tmp_path_factory):
    given = config(tmp_path_factory.mktemp("straight"), n_checkpoints=6)
    return DictionaryRunner(given, model=tiny_bridge, dataset=TEXTS).run()


class Stopped(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(12))
def test_stopped_at_any_batch(batch, straight, tiny_bridge, tmp_path, monkeypatch):
    """An exception in the middle of a batch: one dictionary has taken it, the other has not."""
    taken = []
    original = ExemplarBuild._grow

    def stop(self, one):
        taken.append(one)
        if len(taken) == batch + 1:
            self._growths[0].take(one, self._config)
            raise Stopped
        original(self, one)

    monkeypatch.setattr(ExemplarBuild, "_grow", stop)
    try:
        DictionaryRunner(config(tmp_path, n_checkpoints=6), model=tiny_bridge, dataset=TEXTS).run()
    except Stopped:
        pass
    monkeypatch.undo()
    read = []
    forward = ActivationStream._forward
    monkeypatch.setattr(ActivationStream, "_forward", lambda self, *a: read.append(1) or forward(self, *a))
    made = sorted(int(path.name) for path in only_run(tmp_path).iterdir() if path.name.isdigit())
    result = DictionaryRunner(
        config(tmp_path, resume_from_checkpoint=str(only_run(tmp_path))), model=tiny_bridge, dataset=TEXTS
    ).run()
    assert result.run_id == only_run(tmp_path).name
    for name, built in straight.dictionaries.items():
        assert_same_partition(result.dictionaries[name].fit, built.fit)
        assert_same_partition(ExemplarFitResult.load(result.output_path / name), built.fit)
    if made:
        assert len(read) <= 12 - made[-1] // 60, "what was built is not read again"


@pytest.mark.parametrize("stop", ["budget", "unseen_mass", "paper"])
def test_the_state_of_a_build_holds_all_that_its_rule_to_stop_needs(stop, tiny_bridge):
    options = ExemplarFitConfig(stop=stop, saturation_window=3, unseen_mass_tolerance=0.03, calibration_activations=50)
    stream = ActivationStream(tiny_bridge, TEXTS * 3, HOOK, context_size=16, batch_size=4, max_tokens=3000)
    batches = list(stream)

    def build():
        return ExemplarBuild([HOOK], [], 0.9, options)

    straight, cut = build(), build()
    for number, batch in enumerate(batches):
        straight.take(batch)
        cut.take(batch)
        content, tensors = cut.state()
        cut = build()
        cut.load_state(json.loads(json.dumps(content)), tensors, torch.device("cpu"))
        assert cut.done == straight.done, number
    assert_same_partition(cut.finish(stream)[0], straight.finish(stream)[0])
    assert straight.finish(stream)[0].stopped_because == {"budget": "end_of_stream"}.get(stop, stop)


WHOLE = [
    ExemplarBuildConfig(percentile=[5, 20], calibration="across_documents", hook_name=HOOK),
    ExemplarBuildConfig(percentile=20, calibration="within_batch", hook_name=[HOOK, NEURONS]),
]
KINDS = {
    "the whole stream calibrates": {"hook_name": [HOOK, NEURONS], "dictionary": WHOLE},
    "factorisations": {"hook_name": NEURONS, "dictionary": FACTORS},
    "both": {"hook_name": [HOOK, NEURONS], "dictionary": [*WHOLE, FACTORS]},
    "more than fits in memory": {
        "hook_name": NEURONS,
        "dictionary": SNMFBuildConfig(n_components=3, sparsity=0.2, max_iter=3, max_passes=2, memory_limit=20_000),
    },
}


@pytest.fixture(scope="module")
def uninterrupted(tiny_bridge, tmp_path_factory):
    @functools.cache
    def run(kind):
        torch.set_num_threads(1)
        given = config(tmp_path_factory.mktemp("uninterrupted"), **KINDS[kind])
        return DictionaryRunner(given, model=tiny_bridge, dataset=TEXTS).run()

    return run


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["killed", "Ctrl-C"])
def test_stopped_before_anything_is_built(kind, how, uninterrupted, tiny_bridge, tmp_path, monkeypatch):
    straight, original = uninterrupted(kind), build_pass.BuildPass.batches

    def stopped(self):
        for number, batch in enumerate(original(self)):
            yield batch
            if number == 5:
                if how == "killed":
                    raise Stopped
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(build_pass.BuildPass, "batches", stopped)
    given = config(tmp_path, **KINDS[kind], n_checkpoints=4 if how == "killed" else 0)
    with pytest.raises(Stopped if how == "killed" else KeyboardInterrupt) as raised:
        DictionaryRunner(given, model=tiny_bridge, dataset=TEXTS).run()
    monkeypatch.undo()
    made = sorted(int(path.name) for path in only_run(tmp_path).iterdir() if path.name.isdigit())
    assert made and (how == "killed" or f"/{made[-1]}'" in str(raised.value))
    assert len(made) == 1 or kind == "the whole stream calibrates"
    read = []
    forward = ActivationStream._forward
    monkeypatch.setattr(ActivationStream, "_forward", lambda self, *a: read.append(1) or forward(self, *a))
    again = config(tmp_path, **KINDS[kind], resume_from_checkpoint=str(only_run(tmp_path)))
    resumed = DictionaryRunner(again, model=tiny_bridge, dataset=TEXTS).run()
    assert list(resumed.dictionaries) == list(straight.dictionaries)
    for name, built in straight.dictionaries.items():
        if "snmf" in name:
            assert torch.equal(resumed.dictionaries[name].dictionary.W_dec, built.dictionary.W_dec), name
            assert resumed.dictionaries[name].fit.held_out_loss == built.fit.held_out_loss
        else:
            assert_same_partition(resumed.dictionaries[name].fit, built.fit)
    if kind != "more than fits in memory":
        assert len(read) <= 12 - made[-1] // 60, "what was read is not read again"


@pytest.mark.slow
def test_a_run_killed_after_the_pass_reads_nothing_again(uninterrupted, tiny_bridge, tmp_path, monkeypatch):
    kind = "the whole stream calibrates"
    expected = uninterrupted(kind)  # made before anything is replaced

    def stop(self, stream):
        raise Stopped

    monkeypatch.setattr(ExemplarBuild, "finish", stop)
    with pytest.raises(Stopped):
        DictionaryRunner(config(tmp_path, **KINDS[kind], n_checkpoints=1), model=tiny_bridge, dataset=TEXTS).run()
    monkeypatch.undo()
    monkeypatch.setattr(ActivationStream, "_forward", None)
    again = config(tmp_path, **KINDS[kind], resume_from_checkpoint=str(only_run(tmp_path)))
    resumed = DictionaryRunner(again, model=tiny_bridge, dataset=TEXTS).run()
    for name, built in expected.dictionaries.items():
        assert_same_partition(resumed.dictionaries[name].fit, built.fit)


def test_checkpoints_are_spread_over_the_tokens(straight):
    names = sorted(int(path.name) for path in straight.checkpoint_path.iterdir() if path.name.isdigit())
    assert names[-1] == 600 and len(names) >= 4
    assert all(b // 100 > a // 100 for a, b in zip(names, names[1:]))


@pytest.mark.parametrize("number", [0, 1, -1])
def test_from_a_checkpoint_by_name(number, straight, tiny_bridge, tmp_path):
    run = tmp_path / "checkpoints" / straight.run_id
    shutil.copytree(straight.checkpoint_path, run)
    chosen = sorted((path for path in run.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))[number]
    result = DictionaryRunner(
        config(tmp_path, resume_from_checkpoint=str(chosen)), model=tiny_bridge, dataset=TEXTS
    ).run()
    for name, built in straight.dictionaries.items():
        assert_same_partition(result.dictionaries[name].fit, built.fit)


_SCRIPT = """
import sys
from pathlib import Path
from saelens_ext.runner import DictionaryRunner, build_pass
from tests.models_zoo import make_model
from tests.runner.runs import TEXTS, config
original = build_pass.BuildPass.batches
def held(self):
    for batch in original(self):
        yield batch
        if self.n_activations >= int(sys.argv[2]):
            print(self.n_activations, flush=True)
            sys.stdin.read()
build_pass.BuildPass.batches = held
model = make_model("llama", "SAETransformerBridge")
DictionaryRunner(config(Path(sys.argv[1]), n_checkpoints=6), model=model, dataset=TEXTS).run()
"""


def _start(folder: Path, after: int) -> subprocess.Popen:
    """A run in a process of its own that has read so many activations, and waits."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(folder), str(after)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=root,
    )
    if process.stdout.readline():
        return process
    raise AssertionError(process.stderr.read())


@pytest.mark.slow
def test_killed_and_resumed(straight, tiny_bridge, tmp_path):
    process = _start(tmp_path, after=350)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not any((tmp_path / "output").iterdir())
    result = DictionaryRunner(
        config(tmp_path, resume_from_checkpoint=str(only_run(tmp_path))), model=tiny_bridge, dataset=TEXTS
    ).run()
    for name, built in straight.dictionaries.items():
        assert_same_partition(result.dictionaries[name].fit, built.fit)


def test_interrupted_from_the_keyboard(straight, tiny_bridge, tmp_path, monkeypatch):
    """Ctrl-C ends the pass after the batch, with a checkpoint even where none was asked for."""
    original = build_pass.BuildPass.batches

    def interrupted(self):
        for number, batch in enumerate(original(self)):
            if number == 6:
                signal.raise_signal(signal.SIGINT)
            yield batch

    monkeypatch.setattr(build_pass.BuildPass, "batches", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="Resume with resume_from_checkpoint="):
        DictionaryRunner(config(tmp_path), model=tiny_bridge, dataset=TEXTS).run()
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    assert [path.name for path in only_run(tmp_path).iterdir() if path.name.isdigit()] != []
    result = DictionaryRunner(
        config(tmp_path, resume_from_checkpoint=str(only_run(tmp_path))), model=tiny_bridge, dataset=TEXTS
    ).run()
    for name, built in straight.dictionaries.items():
        assert_same_partition(result.dictionaries[name].fit, built.fit)


@pytest.mark.slow
def test_factorisations_that_were_finished_are_kept_and_the_others_are_the_same(tiny_bridge, tmp_path, monkeypatch):
    both = [ExemplarBuildConfig(percentile=20, calibration_activations=200, hook_name=HOOK), FACTORS]

    def run(folder):
        given = config(folder, hook_name=[HOOK, NEURONS], dictionary=both, n_checkpoints=2)
        return DictionaryRunner(given, model=tiny_bridge, dataset=TEXTS).run()

    straight = run(tmp_path / "straight")
    fits = []
    original = build_pass.fit_snmf_rows

    def stop(*arguments, **options):
        fits.append(1)
        if len(fits) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(build_pass, "fit_snmf_rows", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped")
    assert SNMFFitResult.load(tmp_path / "stopped" / "output" / f"{NEURONS}_snmf_k3_s0.2").loss > 0, (
        "what was finished is usable"
    )
    given = config(tmp_path / "stopped", hook_name=[HOOK, NEURONS], dictionary=both)
    given.resume_from_checkpoint = str(only_run(tmp_path / "stopped"))
    result = DictionaryRunner(given, model=tiny_bridge, dataset=TEXTS).run()
    assert len(fits) == 3, "the finished one is not fitted again"
    for name, built in straight.dictionaries.items():
        assert torch.equal(result.dictionaries[name].dictionary.W_dec, built.dictionary.W_dec), name
        if "snmf" in name:
            assert result.dictionaries[name].fit.loss <= built.fit.loss
        else:
            assert_same_partition(result.dictionaries[name].fit, built.fit)
    assert [name for name in result.dictionaries] == [name for name in straight.dictionaries]


def test_a_checkpoint_of_another_config_says_which_fields_differ(straight, tiny_bridge, tmp_path):
    def resume(**changes):
        options = {"resume_from_checkpoint": str(straight.checkpoint_path)} | changes
        return DictionaryRunner(config(tmp_path, **options), model=tiny_bridge, dataset=changes.get("dataset", TEXTS))

    with pytest.raises(
        ValueError,
        match=r"of another run: dictionary.percentile was \[5, 20\] and is \[5, 10\]; context_size was 16 and is 12\. "
        "Resume with",
    ):
        resume(context_size=12, dictionary=ExemplarBuildConfig(percentile=[5, 10], calibration_activations=200)).run()
    with pytest.raises(ValueError, match="seed was 42 and is 1"):
        resume(seed=1).run()
    with pytest.raises(ValueError, match="dictionary.architecture was 'exemplar_partition' and is 'snmf'"):
        resume(dictionary=SNMFBuildConfig()).run()
    runner = DictionaryRunner(
        config(tmp_path, resume_from_checkpoint=str(straight.checkpoint_path)), model=tiny_bridge, dataset=TEXTS[::-1]
    )
    with pytest.raises(ValueError, match="of another run: dataset_fingerprint was"):
        runner.run()


def test_a_checkpoint_of_another_model(straight, tiny_gpt2_bridge, tmp_path):
    with pytest.raises(ValueError, match="model_name was 'tiny-llama' and is 'tiny-gpt2'"):
        DictionaryRunner(
            config(tmp_path, resume_from_checkpoint=str(straight.checkpoint_path)),
            model=tiny_gpt2_bridge,
            dataset=TEXTS,
        ).run()


def test_nothing_to_resume_from(straight, tmp_path, tiny_bridge):
    with pytest.raises(FileNotFoundError, match="is not the folder of a run's checkpoints"):
        DictionaryRunner(config(tmp_path, resume_from_checkpoint=str(tmp_path / "nowhere"))).run()
    with pytest.raises(FileNotFoundError, match=rf"several runs; name one: .*{straight.run_id}"):
        DictionaryRunner(config(tmp_path, resume_from_checkpoint=str(straight.checkpoint_path.parent))).run()


def test_damaged_and_newer_checkpoints(straight, tiny_bridge, tmp_path):
    run = tmp_path / "checkpoints" / straight.run_id
    shutil.copytree(straight.checkpoint_path, run)
    given = config(tmp_path, resume_from_checkpoint=str(run))
    last = run / "600"
    whole = (last / "checkpoint.safetensors").read_bytes()
    (last / "checkpoint.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        DictionaryRunner(given, model=tiny_bridge, dataset=TEXTS).run()
    content = json.loads((last / "checkpoint.json").read_text())
    (last / "checkpoint.json").write_text(json.dumps(content | {"format_version": 2}))
    with pytest.raises(ValueError, match="format_version 2, this saelens-ext reads up to 1"):
        DictionaryRunner(given, model=tiny_bridge, dataset=TEXTS).run()


def test_a_new_run_does_not_mix_with_an_earlier_one_of_its_id(tiny_bridge, tmp_path):
    given = config(tmp_path, n_checkpoints=2, dictionary=PARTITIONS)
    given.logger.wandb_id = "mine"
    DictionaryRunner(given, model=tiny_bridge, dataset=TEXTS).run()
    with pytest.raises(
        ValueError, match="holds the checkpoints of an earlier run of the same id. Set resume_from_checkpoint="
    ):
        DictionaryRunner(given, model=tiny_bridge, dataset=TEXTS).run()
