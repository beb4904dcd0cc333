"""A run: what it builds is what the fits build, from one pass, saved whole, evaluated, and kept when something
fails.
"""

import errno
import json
import logging
from pathlib import Path

import pytest
import torch
from sae_lens import SAE, run_evals

from saelens_ext import (
    ActivationStream,
    ExemplarFitResult,
    SNMFFitResult,
    _files,
    fit_exemplar_partitions,
    fit_snmf,
    profile_dictionary,
)
from saelens_ext.analysis.profile import DictionaryProfile
from saelens_ext.runner import (
    DictionaryRunner,
    DictionaryRunnerConfig,
    ExemplarBuildConfig,
    SNMFBuildConfig,
    build_pass,
    evaluation,
)
from saelens_ext.runner import runner as runner_module
from saelens_ext.runner.evaluation import default_eval_size
from tests.runner.runs import FACTORS, HOOK, NEURONS, TEXTS, assert_same_partition, config


@pytest.fixture(scope="module")
def whole(tiny_bridge, tmp_path_factory):
    """One run with everything: two kinds of dictionaries, two hooks, profiles, evaluation."""
    folder = tmp_path_factory.mktemp("whole")
    given = config(
        folder,
        hook_name=[HOOK, NEURONS],
        profile=True,
        n_eval_batches=2,
        n_checkpoints=3,
        dictionary=[ExemplarBuildConfig(percentile=[5, 20], calibration_activations=200, hook_name=HOOK), FACTORS],
    )
    passes = []
    original = build_pass.BuildPass.batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_pass.BuildPass, "batches", lambda self: passes.append(1) or original(self))
        result = DictionaryRunner(given, model=tiny_bridge, dataset=TEXTS).run()
    assert len(passes) == 1
    return result


@pytest.mark.slow
def test_a_run_builds_what_the_fits_build(whole, tiny_bridge):
    stream = ActivationStream(tiny_bridge, TEXTS, HOOK, context_size=16, batch_size=4, max_tokens=600)
    fits = fit_exemplar_partitions(stream, (5, 20), calibration_activations=200, seed=42)
    for (_, percentile), fit in fits.items():
        assert_same_partition(whole.dictionaries[f"{HOOK}_exemplars_p{percentile}"].fit, fit)
    neurons = ActivationStream(tiny_bridge, TEXTS, NEURONS, context_size=16, batch_size=4, max_tokens=600)
    fit = fit_snmf(neurons, 4, sparsity=0.2, held_out=0.2, max_iter=4, seed=42)
    built = whole.dictionaries[f"{NEURONS}_snmf_k4_s0.2"].fit
    assert torch.equal(built.dictionary.W_dec, fit.dictionary.W_dec) and built.history == fit.history
    assert built.held_out_loss == pytest.approx(fit.held_out_loss, rel=1e-6) and built.n_held_out == fit.n_held_out > 0


def test_every_dictionary_has_a_whole_folder(whole):
    assert list(whole.dictionaries) == [
        f"{HOOK}_exemplars_p5",
        f"{HOOK}_exemplars_p20",
        f"{NEURONS}_snmf_k3_s0.2",
        f"{NEURONS}_snmf_k4_s0.2",
    ]
    for name, built in whole.dictionaries.items():
        assert built.path == whole.output_path / name
        loaded = SAE.load_from_disk(built.path)
        assert torch.equal(loaded.W_dec, built.dictionary.W_dec)
        kind = ExemplarFitResult if "exemplars" in name else SNMFFitResult
        assert kind.load(built.path).n_seen == built.fit.n_seen
        assert DictionaryProfile.load(built.path, loaded).n_activations == 600
        assert json.loads((built.path / "evals.json").read_text()) == built.evals
        assert DictionaryRunnerConfig.from_json(built.path / "runner_cfg.json").to_dict() == whole.config.to_dict()
        share = _files.read_tensors(built.path / "sparsity.safetensors")["sparsity"]
        assert torch.equal(share, torch.log10(built.profile.counts.double().div(600).float() + 1e-10))
    json.dumps(whole.to_dict(), allow_nan=False)


def test_what_built_a_dictionary_is_recorded(whole):
    metadata = SAE.load_from_disk(next(iter(whole.dictionaries.values())).path).cfg.metadata
    assert metadata.model_class_name == "SAETransformerBridge" and metadata.compatibility_mode is False
    assert metadata.hook_name == HOOK and metadata.context_size == 16 and metadata.prepend_bos is True
    resolved = whole.config
    assert (resolved.model_name, resolved.model_class_name, resolved.device) == (
        "tiny-llama",
        "SAETransformerBridge",
        "cpu",
    )
    assert resolved.prepend_bos is True


def test_the_profile_is_that_of_a_pass_alone(whole, tiny_bridge):
    built = whole.dictionaries[f"{HOOK}_exemplars_p20"]
    stream = ActivationStream(tiny_bridge, TEXTS, HOOK, context_size=16, batch_size=4, max_tokens=600)
    again = profile_dictionary(built.dictionary, stream)
    assert torch.equal(again.counts, built.profile.counts) and torch.equal(
        again.top.positions, built.profile.top.positions
    )


def test_evaluation_is_saelens_own_on_unseen_documents(tiny_bridge, tmp_path, monkeypatch):
    evaluated = []

    def watched(sae, store, model, scaler, eval_config, **options):
        evaluated.append(([row["tokens"] for row in store.dataset], eval_config, options))
        return run_evals(sae, store, model, scaler, eval_config, **options)

    monkeypatch.setattr(evaluation, "run_evals", watched)
    given = config(
        tmp_path,
        training_tokens=300,
        n_eval_batches=3,
        eval_batch_size_prompts=2,
        dictionary=ExemplarBuildConfig(percentile=20),
    )
    runner = DictionaryRunner(given, model=tiny_bridge, dataset=TEXTS)
    built = runner.run().dictionaries[f"{HOOK}_exemplars_p20"]
    ((tokens, eval_config, options),) = evaluated
    assert len(tokens) == 6 and eval_config.batch_size_prompts == 2 and eval_config.n_eval_reconstruction_batches == 3
    assert options["exclude_special_tokens"] == [0, 1, 2]
    last = int(built.fit.provenance.document_ids.max())
    stream = ActivationStream(tiny_bridge, TEXTS, HOOK, context_size=16)
    later = {tuple(w.token_ids) for w in stream._windows if w.document_id > last}
    assert {tuple(map(int, row)) for row in tokens} <= later
    assert built.evals["token_stats"]["unseen_documents"] is True
    assert built.figures()["metrics/l0"] == built.evals["sparsity"]["l0"] == 1


def test_evaluation_says_when_there_was_no_unseen_text(tiny_bridge, tmp_path):
    given = config(tmp_path, training_tokens=10**6, n_eval_batches=1, dictionary=ExemplarBuildConfig(percentile=20))
    result = DictionaryRunner(given, model=tiny_bridge, dataset=TEXTS[:4]).run()
    (built,) = result.dictionaries.values()
    assert built.evals["token_stats"]["unseen_documents"] is False
    assert built.fit.n_seen == result.n_activations < 10**6 and built.fit.stopped_because == "end_of_stream"


def test_dictionaries_are_of_the_dtype_asked_for(tiny_bridge, tmp_path):
    builds = [ExemplarBuildConfig(percentile=20), SNMFBuildConfig(n_components=3, max_iter=2)]
    given = config(tmp_path, dtype="bfloat16", profile=True, n_eval_batches=1, dictionary=builds)
    for built in DictionaryRunner(given, model=tiny_bridge, dataset=TEXTS).run().dictionaries.values():
        assert built.dictionary.dtype == SAE.load_from_disk(built.path).dtype == torch.bfloat16
        assert built.evals["sparsity"]["l0"] > 0 and built.profile.n_activations == 600


def test_a_given_threshold_and_a_stop(tiny_bridge, tmp_path):
    given = config(
        tmp_path,
        training_tokens=10**6,
        dictionary=ExemplarBuildConfig(threshold=0.95, stop="paper", calibration_activations=50),
    )
    result = DictionaryRunner(given, model=tiny_bridge, dataset=TEXTS).run()
    (built,) = result.dictionaries.values()
    assert built.name == f"{HOOK}_exemplars_t0.95" and built.fit.stopped_because == "paper"
    assert result.n_activations == built.fit.n_seen, "nothing is read once all have stopped"


@pytest.mark.slow
def test_factorisations_beyond_the_memory_limit_read_again(tiny_bridge, tmp_path):
    options = {"n_components": 3, "sparsity": 0.5, "max_iter": 3, "max_passes": 2, "held_out": 0.2}
    given = config(tmp_path, dictionary=SNMFBuildConfig(**options, memory_limit=5_000))
    (built,) = DictionaryRunner(given, model=tiny_bridge, dataset=TEXTS).run().dictionaries.values()
    stream = ActivationStream(tiny_bridge, TEXTS, HOOK, context_size=16, batch_size=4, max_tokens=600)
    assert built.fit.stopped_because in ("max_passes", "converged")
    assert torch.equal(
        built.dictionary.W_dec, fit_snmf(stream, seed=42, memory_limit=5_000, **options).dictionary.W_dec
    )
    assert built.fit.n_held_out > 0


def test_nothing_is_written_where_nothing_is_wanted(tiny_bridge, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = DictionaryRunner(
        config(tmp_path, output_path=None, checkpoint_path=None, profile=True), model=tiny_bridge, dataset=TEXTS
    ).run()
    assert list(tmp_path.iterdir()) == [] and all(built.path is None for built in result.dictionaries.values())


def test_a_second_run_leaves_nothing_of_the_first_in_a_folder(tiny_bridge, tmp_path):
    DictionaryRunner(config(tmp_path, n_eval_batches=1, profile=True), model=tiny_bridge, dataset=TEXTS).run()
    result = DictionaryRunner(config(tmp_path, training_tokens=500), model=tiny_bridge, dataset=TEXTS).run()
    for built in result.dictionaries.values():
        assert {path.name for path in built.path.iterdir()} == {
            "cfg.json",
            "sae_weights.safetensors",
            "fit.json",
            "fit.safetensors",
            "runner_cfg.json",
        }


def test_a_folder_that_cannot_be_written_is_found_out_before_the_build(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("output_path", "checkpoint_path"):
        with pytest.raises(OSError, match=f"{name}=.*cannot be written .*choose a folder"):
            DictionaryRunner(config(tmp_path, **{name: str(tmp_path / "file" / "below")})).run()


def test_a_folder_without_permission(tmp_path, monkeypatch):
    def refuse(path, content):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(_files, "write_json", refuse)
    with pytest.raises(PermissionError, match=r"output_path=.*cannot be written \(Permission denied\)"):
        DictionaryRunner(config(tmp_path)).run()


def test_no_space_for_a_dictionary_names_it_and_keeps_the_others(tiny_bridge, tmp_path, monkeypatch):
    write = _files.write_together

    def full(files):
        if any("_p20" in path.parent.name for path in files):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(files)

    monkeypatch.setattr(_files, "write_together", full)
    runner = DictionaryRunner(config(tmp_path, n_checkpoints=2), model=tiny_bridge, dataset=TEXTS)
    message = (
        rf"{HOOK}_exemplars_p20 could not be written to .*No space left.*"
        rf"Saved so far: {HOOK}_exemplars_p5\. Resume with"
    )
    with pytest.raises(OSError, match=message) as raised:
        runner.run()
    assert raised.value.errno == errno.ENOSPC
    assert ExemplarFitResult.load(tmp_path / "output" / f"{HOOK}_exemplars_p5").n_regions > 0
    assert runner.result.dictionaries[f"{HOOK}_exemplars_p20"].fit.n_regions > 0
    monkeypatch.setattr(_files, "write_together", write)
    again = config(tmp_path, resume_from_checkpoint=str(runner.result.checkpoint_path))
    result = DictionaryRunner(again, model=tiny_bridge, dataset=TEXTS).run()
    assert_same_partition(
        result.dictionaries[f"{HOOK}_exemplars_p20"].fit, runner.result.dictionaries[f"{HOOK}_exemplars_p20"].fit
    )


def test_no_space_for_a_checkpoint_does_not_cost_the_build(tiny_bridge, tmp_path, monkeypatch, caplog):
    write = _files.write_together

    def full(files):
        if any(path.name.endswith("checkpoint.json") for path in files):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(files)

    monkeypatch.setattr(_files, "write_together", full)
    with caplog.at_level(logging.ERROR):
        result = DictionaryRunner(config(tmp_path, n_checkpoints=2), model=tiny_bridge, dataset=TEXTS).run()
    assert (
        len(result.dictionaries) == 2 and "could not be written" in caplog.text and "there is none yet" in caplog.text
    )
    assert not list(Path(result.checkpoint_path).rglob("checkpoint.json"))


def test_what_is_missing_is_asked_for(tmp_path, tiny_bridge):
    with pytest.raises(ValueError, match="model_name is empty: name a model"):
        DictionaryRunner(config(tmp_path)).run()
    with pytest.raises(ValueError, match="dataset_path is empty: name a dataset"):
        DictionaryRunner(config(tmp_path), model=tiny_bridge).run()
    with pytest.raises(ValueError, match="fewer than the 200 that calibration takes"):
        DictionaryRunner(config(tmp_path, training_tokens=100), model=tiny_bridge, dataset=TEXTS).run()
    with pytest.raises(ValueError, match="has no hook 'blocks.1.hook_ot'"):
        DictionaryRunner(config(tmp_path, hook_name="blocks.1.hook_ot"), model=tiny_bridge, dataset=TEXTS).run()


@pytest.mark.slow
def test_evaluation_and_profile_take_less_than_the_build_by_default(tiny_bridge, tmp_path, monkeypatch):
    """The profile runs the model on no token, since the activations are held, and the evaluation on few."""
    read, evaluated = [], []
    forward, evaluate = ActivationStream._forward, runner_module.evaluate
    monkeypatch.setattr(
        ActivationStream, "_forward", lambda self, tokens, *a: read.append(tokens.numel()) or forward(self, tokens, *a)
    )

    def watched(dictionary, stream, given):
        evaluated.append(len(given.windows) * stream.context_size)
        return evaluate(dictionary, stream, given)

    monkeypatch.setattr(runner_module, "evaluate", watched)
    given = config(tmp_path, n_eval_batches=None, profile=True, training_tokens=2000)
    result = DictionaryRunner(given, model=tiny_bridge, dataset=TEXTS * 6).run()
    for built in result.dictionaries.values():
        assert built.profile.n_activations == 2000 and built.evals is not None
    n_read = sum(read)
    DictionaryRunner(config(tmp_path / "again", training_tokens=2000), model=tiny_bridge, dataset=TEXTS * 6).run()
    assert sum(read) == 2 * n_read, "the profile reads nothing again"
    assert len(evaluated) == 2 and 0 < sum(evaluated) <= 2000 / 20


@pytest.mark.parametrize(
    ("n_activations", "size"), [(4_000, (1, 1)), (40_000, (15, 1)), (200_000, (32, 2)), (10**7, (32, 10)), (1, (1, 1))]
)
def test_the_default_size_of_an_evaluation(n_activations, size):
    assert default_eval_size(n_activations, 128, 32) == size


def test_more_than_is_held_in_memory_is_read_again(tiny_bridge, tmp_path, monkeypatch):
    def run(folder):
        return DictionaryRunner(config(folder, profile=True), model=tiny_bridge, dataset=TEXTS).run()

    held = run(tmp_path / "held")
    monkeypatch.setattr("saelens_ext.runner.build_pass.KEPT_BYTES", 10_000)
    read = run(tmp_path / "read")
    for name, built in held.dictionaries.items():
        other = read.dictionaries[name].profile
        assert torch.equal(built.profile.counts, other.counts)
        assert torch.equal(built.profile.top.values.nan_to_num(-1), other.top.values.nan_to_num(-1))
