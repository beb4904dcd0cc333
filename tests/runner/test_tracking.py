"""Logging to wandb, in its offline mode: what is in the run files that it wrote."""

import itertools
import json
import time

import pytest
import wandb
from sae_lens import LoggingConfig

from saelens_ext import ActivationStream, fit_exemplar_partitions, fit_snmf
from saelens_ext.dictionaries.activation_matrix import ActivationSource
from saelens_ext.runner import DictionaryRunner, ExemplarBuildConfig, SNMFBuildConfig
from saelens_ext.runner.tracking import WandbTracker, check_login
from tests.runner.runs import HOOK, NEURONS, TEXTS, config
from tests.wandb_files import read_run

FACTORS = SNMFBuildConfig(n_components=3, sparsity=0.2, held_out=0.2, max_iter=4, l1=0.0, hook_name=NEURONS)

# Keys that SAELens' trainer logs (sae_lens.training.sae_trainer); what it has under them means the same here.
SAELENS_KEYS = {
    "losses/overall_loss",
    "losses/mse_loss",
    "metrics/explained_variance",
    "metrics/explained_variance_legacy",
    "metrics/l0",
    "metrics/mean_log10_feature_sparsity",
    "sparsity/dead_features",
    "sparsity/below_1e-5",
    "sparsity/below_1e-6",
    "details/n_training_samples",
    "plots/feature_density_line_chart",
}
EVAL_GROUPS = {
    "model_behavior_preservation",
    "model_performance_preservation",
    "reconstruction_quality",
    "shrinkage",
    "sparsity",
    "token_stats",
}


@pytest.fixture(scope="module")
def wandb_folder(tmp_path_factory):
    """wandb, working offline on a folder of this file's."""
    folder = tmp_path_factory.mktemp("wandb")
    settings = {
        "MODE": "offline",
        "DIR": folder,
        "CONFIG_DIR": folder / "config",
        "CACHE_DIR": folder / "cache",
        "DATA_DIR": folder / "data",
        "SILENT": "true",
        "DISABLE_GIT": "true",
        "DISABLE_CODE": "true",
        "CONSOLE": "off",
        "X_DISABLE_STATS": "true",
        "X_DISABLE_META": "true",
        "X_DISABLE_MACHINE_INFO": "true",
        "X_SAVE_REQUIREMENTS": "false",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(f"WANDB_{name}", str(value))
        wandb.teardown()  # settings are read once per process
        yield folder
        wandb.teardown()


def files_of(folder):
    """The runs' files; elsewhere in the folder wandb's own process makes and removes others."""
    return set(folder.glob("wandb/offline-run-*/*.wandb"))


@pytest.fixture
def written(wandb_folder):
    """The runs that the test has written so far; wandb's own process may still be writing the end of the last."""
    before = files_of(wandb_folder)

    def read():
        deadline = time.monotonic() + 60
        while True:
            runs = [read_run(path) for path in sorted(files_of(wandb_folder) - before)]
            if runs and all(run.exit_code is not None for run in runs):
                return runs
            assert time.monotonic() < deadline, "wandb has not finished its files"
            time.sleep(0.05)

    return read


def logging_config(**options) -> LoggingConfig:
    return LoggingConfig(**{"log_to_wandb": True, "wandb_project": "tests", "wandb_log_frequency": 1} | options)


@pytest.mark.slow
def test_each_dictionary_of_a_run_has_its_own_wandb_run(written, tiny_bridge, tmp_path):
    given = config(
        tmp_path,
        hook_name=[HOOK, NEURONS],
        n_eval_batches=1,
        profile=True,
        logger=logging_config(wandb_id="abc"),
        dictionary=[ExemplarBuildConfig(percentile=20, calibration_activations=200, hook_name=HOOK), FACTORS],
    )
    result = DictionaryRunner(given, model=tiny_bridge, dataset=TEXTS).run()
    runs = {run.run_id: run for run in written()}
    assert set(runs) == {f"abc-{name}" for name in result.dictionaries} and len(runs) == 2
    for name, built in result.dictionaries.items():
        run = runs[f"abc-{name}"]
        assert (run.project, run.group, run.exit_code) == ("tests", "abc", 0)
        assert run.name == f"{name}-Tokens-6.000e+02"
        assert run.config["dictionary_name"] == name and run.config["training_tokens"] == 600
        keys = {
            key.removesuffix("._type").split(".bins")[0].split(".values")[0].split(".packed")[0] for key in run.keys
        }
        for key in keys:
            group = key.split("/")[0].split(".")[0]
            assert key in SAELENS_KEYS or key.startswith(("metrics/", "_")) or group in EVAL_GROUPS, key
        assert SAELENS_KEYS - {"losses/overall_loss"} <= keys
        assert run.logged("details/n_training_samples")[-1] == built.fit.n_seen
        assert run.logged("metrics/l0")[-1] == pytest.approx(built.evals["sparsity"]["l0"])
        assert run.logged("metrics/explained_variance")[-1] == pytest.approx(
            built.evals["reconstruction_quality"]["explained_variance"]
        )
        assert run.logged("sparsity/dead_features")[-1] == int((built.profile.counts == 0).sum())
        steps = run.logged("_step")
        assert steps == sorted(set(steps))
    check_losses(runs[f"abc-{name}"], built.fit, tiny_bridge)
    for name, built in result.dictionaries.items():
        check_artifacts(runs[f"abc-{name}"], built, {"cfg.json", "sae_weights.safetensors"})


def check_losses(run, fit, model) -> None:
    """They are squared errors per activation, as SAELens' are, where its trainer logs them."""
    stream = ActivationStream(model, TEXTS, NEURONS, context_size=16, batch_size=4, max_tokens=600)
    source = ActivationSource.of(stream, None, FACTORS.held_out)
    x = source.in_memory(10**9)
    scale = float(x.square().sum()) / len(x)
    assert run.logged("losses/overall_loss") == pytest.approx([value * scale for value in fit.history], rel=1e-5)
    error = float((x - fit.dictionary(x).detach()).square().sum(dim=1).mean())
    assert run.logged("losses/mse_loss")[FACTORS.max_iter - 1] == pytest.approx(error, rel=0.05)
    assert run.logged("metrics/relative_squared_error")[-1] == pytest.approx(fit.loss)


def check_artifacts(run, built, files: set[str]) -> None:
    """They have the names, types and files of SAELens' own."""
    model, sparsity = run.artifacts
    cfg = built.dictionary.cfg
    name = f"sae_tiny-llama_{cfg.metadata.hook_name}_{cfg.d_sae}"
    assert (model.name, model.type) == (name, "model") and "final_model" in model.aliases
    assert (sparsity.name, sparsity.type) == (f"{name}_log_feature_sparsity", "log_feature_sparsity")
    assert {entry.path for entry in model.manifest.contents} == files
    assert [entry.path for entry in sparsity.manifest.contents] == ["sparsity.safetensors"]
    assert json.loads(model.metadata)["training_tokens"] == 600


def test_progress_is_what_the_dictionary_was_and_goes_on_after_a_resume(written, tiny_bridge, tmp_path):
    given = config(
        tmp_path,
        n_checkpoints=2,
        profile=True,
        logger=logging_config(wandb_log_frequency=2, log_weights_to_wandb=False),
        dictionary=[ExemplarBuildConfig(percentile=20, calibration_activations=200)],
    )
    result = DictionaryRunner(given, model=tiny_bridge, dataset=TEXTS).run()
    (built,), (run,) = result.dictionaries.values(), written()
    assert run.run_id == result.run_id and run.group == ""
    seen, regions = run.logged("details/n_training_samples"), run.logged("metrics/n_regions")
    stream = ActivationStream(tiny_bridge, TEXTS, HOOK, context_size=16, batch_size=4, max_tokens=600)
    ends = list(itertools.accumulate(len(batch) for batch in stream))
    assert seen[:-1] == ends[1::2], "every second batch"
    assert regions[:-1] == [int((built.fit.exemplar_indices < n).sum()) for n in seen[:-1]]
    assert run.logged("_step")[:-1] == seen[:-1]
    check_artifacts(run, built, {"cfg.json"})
    time.sleep(1)  # wandb names a run's folder by its id and the second
    given.resume_from_checkpoint = str(next(result.checkpoint_path.glob("3*")))
    DictionaryRunner(given, model=tiny_bridge, dataset=TEXTS).run()
    (again,) = [other for other in written() if len(other.history) < len(run.history)]
    assert again.run_id == run.run_id and again.logged("details/n_training_samples")[0] > 300


def test_a_failed_run_is_marked_and_a_sweep_sees_the_run_that_its_agent_started(
    written, tiny_bridge, tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "given0")
    given = config(
        tmp_path,
        training_tokens=50,
        logger=logging_config(),
        dictionary=ExemplarBuildConfig(calibration_activations=200),
    )
    with pytest.raises(ValueError, match="fewer than the 200"):
        DictionaryRunner(given, model=tiny_bridge, dataset=TEXTS).run()
    assert [(run.run_id, run.exit_code) for run in written()] == [("given0", 1)]


def test_not_logged_in_is_found_out_before_the_build(monkeypatch, tmp_path, wandb_folder):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(
        RuntimeError, match="wandb is not logged in.*run `wandb login`, set WANDB_API_KEY, set WANDB_MODE=offline"
    ):
        DictionaryRunner(config(tmp_path, logger=logging_config())).run()
    assert not (tmp_path / "output").exists()
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_login()


def test_the_tracker_serves_the_fits_themselves(written, tiny_bridge):
    stream = ActivationStream(tiny_bridge, TEXTS, HOOK, context_size=16, batch_size=4, max_tokens=300)
    with WandbTracker(logging_config(), {"mine": 1}) as tracker:
        fits = fit_exemplar_partitions(stream, (20,), on_metrics=tracker.on_metrics)
        factors = fit_snmf(stream, 3, max_iter=3, sparsity=0.5, on_metrics=tracker.reporter("factors"))
    runs = {run.name: run for run in written()}
    assert set(runs) == {f"{HOOK}_p20", "factors"} and all(run.config["mine"] == 1 for run in runs.values())
    assert runs[f"{HOOK}_p20"].logged("metrics/n_regions")[-1] == fits[HOOK, 20].n_regions
    assert runs["factors"].logged("metrics/objective") == pytest.approx(factors.history)


def test_a_file_that_wandb_is_still_writing_can_be_read(written, wandb_folder, tmp_path):
    """These tests wait for the end of a file by reading it again and again, wherever its writer stands."""
    before = files_of(wandb_folder)
    with WandbTracker(logging_config()) as tracker:
        for step in range(1, 30):
            tracker.on_metrics("a", step, {f"metrics/{name}": step for name in range(400)})
    (run,), (file,) = written(), files_of(wandb_folder) - before
    data, part = file.read_bytes(), tmp_path / "part.wandb"
    assert len(data) > 3 * 2**15, "records that run over the ends of blocks"
    for end in [*range(0, len(data), 9973), *range(2**15 - 8, 2**15 + 8)]:
        part.write_bytes(data[:end])
        rows = read_run(part).history
        assert rows == run.history[: len(rows)]


def test_the_result_of_a_continued_run_is_not_dropped(written, monkeypatch):
    """wandb gives no history back offline: this run is as one that had logged up to step 600 when it was stopped."""
    monkeypatch.setattr(wandb.Run, "starting_step", property(lambda self: 601))
    with WandbTracker(logging_config()) as tracker:
        tracker.on_metrics("a", 300, {"metrics/n_regions": 3})
        tracker.log_result("a", {"metrics/explained_variance": 0.5})
    (run,) = written()
    assert [row["_step"] for row in run.history if "metrics/explained_variance" in row] == [601]


def test_runs_are_ended_when_a_later_one_cannot_be_opened_or_ended(written, tiny_bridge, tmp_path, monkeypatch):
    init, opened = wandb.init, []

    def failing(**options):
        if opened:
            raise wandb.errors.CommError("connection lost")
        opened.append(init(**options))
        return opened[-1]

    monkeypatch.setattr(wandb, "init", failing)
    with pytest.raises(wandb.errors.CommError, match="connection lost"):
        DictionaryRunner(config(tmp_path, logger=logging_config()), model=tiny_bridge, dataset=TEXTS).run()
    assert [run.exit_code for run in written()] == [1]

    class Run:
        def __init__(self, broken: bool) -> None:
            self.broken, self.ended = broken, False

        def finish(self, exit_code: int) -> None:
            self.ended = True
            if self.broken:
                raise wandb.errors.CommError("not ended")

    tracker = WandbTracker(logging_config())
    runs = tracker._runs = {"a": Run(True), "b": Run(False)}
    with pytest.raises(wandb.errors.CommError, match="not ended"):
        tracker.finish()
    assert runs["b"].ended and not tracker._runs
