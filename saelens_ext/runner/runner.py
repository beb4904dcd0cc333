"""Build dictionaries as a config says: read, build, checkpoint, profile, evaluate, log, save."""

import logging
import shutil
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from saelens_ext import _files
from saelens_ext.activations.kept_stream import KeptStream
from saelens_ext.activations.stream import ActivationBatch, ActivationStream
from saelens_ext.analysis.profile import profile_dictionaries
from saelens_ext.ops.modes import standard_modes
from saelens_ext.runner.build_pass import BuildPass
from saelens_ext.runner.checkpoints import SNMF_FOLDER, Checkpoint, RunIdentity, find_run, list_checkpoints
from saelens_ext.runner.config import DictionaryRunnerConfig
from saelens_ext.runner.evaluation import default_eval_size, eval_windows, evaluate
from saelens_ext.runner.results import BuiltDictionary, RunResult
from saelens_ext.runner.sources import open_stream, resolved
from saelens_ext.runner.tracking import WandbTracker, check_login

logger = logging.getLogger(__name__)


class DictionaryRunner:
    """Build the dictionaries of a config.

    Args:
        config: what to read, what to build, and what to do with it.
        model: an open model to read instead of the one the config names: a HookedTransformer, a bridge, or SAELens'
            HookedProxyLM.
        dataset: an open dataset or a list of strings, instead of the one the config names.
        as_named: whether these are what the config names, only opened already.

    Attributes:
        result: what is finished so far; there after an interruption too.
    """

    def __init__(
        self, config: DictionaryRunnerConfig, *, model: Any = None, dataset: Any = None, as_named: bool = False
    ) -> None:
        self._given, self._model, self._dataset, self._as_named = config, model, dataset, as_named
        self._tracker: WandbTracker | None = None
        self._errors: list[tuple[str, BuiltDictionary, Exception]] = []
        self.result: RunResult | None = None

    @property
    def _begun(self) -> RunResult:
        """The result, within a run."""
        assert self.result is not None
        return self.result

    @standard_modes()
    def run(self) -> RunResult:
        """Build, save, profile, evaluate and log every dictionary.

        Ctrl-C or SIGTERM during the pass ends it after the batch at hand, with a checkpoint; a second one, or one after
        the pass, ends the run at once. Whatever ends the run, dictionaries that were finished are in their folders and
        in ``result``. What cannot be saved, evaluated or logged of one dictionary costs none of the others.

        Raises:
            ValueError: an option out of range, nothing to read, or a checkpoint of another config, whose fields are
                named.
            FileNotFoundError: nothing to resume from at ``resume_from_checkpoint``.
            OSError: a folder cannot be written, the disk is full.
            RuntimeError: wandb is not logged in; before anything is built.
            KeyboardInterrupt: after Ctrl-C or SIGTERM; it says what is saved and how to resume.
            Exception: the first error in saving, evaluating or logging one dictionary, once everything else is done.
        """
        given = self._given
        if given.logger.log_to_wandb:
            check_login()
        for path, name in ((given.output_path, "output_path"), (given.checkpoint_path, "checkpoint_path")):
            if path is not None:
                _check_writable(Path(path), name)
        found = find_run(given.resume_from_checkpoint) if given.resume_from_checkpoint is not None else None
        stream = open_stream(given, self._model, self._dataset, as_named=self._as_named)
        config = resolved(given, stream)
        run_id, checkpoint = self._identify(config, stream, found)
        folder = None if given.checkpoint_path is None else Path(given.checkpoint_path) / run_id
        output = None if given.output_path is None else Path(given.output_path)
        self.result = RunResult(run_id=run_id, config=config, output_path=output, checkpoint_path=folder)
        try:
            # As Ctrl-C: what is open is closed, and the run says what is left.
            with _handled(signal.default_int_handler, signal.SIGTERM):
                self._start_tracking(config, run_id, resume=found is not None)
                build = BuildPass(config, stream, folder, self._on_metrics)
                if found is not None:
                    build.resume(checkpoint)
                self._read(build, folder)
                self._finish(build, stream)
        except BaseException as error:
            self._stop_tracking(exit_code=1)
            if isinstance(error, KeyboardInterrupt) and not str(error):
                raise KeyboardInterrupt(_what_is_left(self.result)) from error
            raise
        self._stop_tracking(exit_code=0)
        return self.result

    # --- which run it is ---

    def _identify(
        self, config: DictionaryRunnerConfig, stream: ActivationStream, found: tuple[Path, Path | None] | None
    ) -> tuple[str, Checkpoint | None]:
        """The run's id, and the checkpoint to start from; a new run puts down what it is."""
        content, source = config.to_dict(), stream.describe()
        if found is not None:
            identity = RunIdentity.load(found[0])
            identity.check_same(content, source, found[0])
            run_id = identity.run_id
            checkpoint = None if found[1] is None else Checkpoint.load(found[1])
            start = "its start" if checkpoint is None else f"{checkpoint.n_activations} activations"
            logger.info("Resuming run %s from %s", run_id, start)
        else:
            run_id, checkpoint = config.logger.wandb_id or uuid.uuid4().hex[:8], None
        if config.checkpoint_path is not None:
            folder = Path(config.checkpoint_path) / run_id
            if found is None and (list_checkpoints(folder) or (folder / SNMF_FOLDER).exists()):
                raise ValueError(
                    f"{folder} holds the checkpoints of an earlier run of the same id. Set "
                    f"resume_from_checkpoint={str(folder)!r} to go on with it, or change logger.wandb_id or "
                    "checkpoint_path for a new run."
                )
            if found is None or found[0].resolve() != folder.resolve():
                RunIdentity(run_id=run_id, config=content, source=source).save(folder)
        return run_id, checkpoint

    # --- the pass ---

    def _read(self, build: BuildPass, folder: Path | None) -> None:
        """Read the activations; checkpoint on the way, at the end, and when interrupted."""
        config = self._begun.config
        every = config.training_tokens / config.n_checkpoints if config.n_checkpoints else None
        interruption = _Interruption()
        with _handled(interruption.hold, signal.SIGINT, signal.SIGTERM), _bar(config, build) as bar:
            for batch in build.batches():
                bar.update(len(batch))
                before = build.n_activations - len(batch)
                due = every is not None and build.n_activations // every > before // every
                if due and folder is not None and interruption.signal is None and build.has_state:
                    self._checkpoint(build, folder)
                if interruption.signal is not None:
                    break
            self._begun.n_activations = build.n_activations
            if (every is not None or interruption.signal is not None) and build.has_state and folder is not None:
                self._checkpoint(build, folder)
            # It may have come at any time, during the last checkpoint too.
            if interruption.signal is not None:
                raise KeyboardInterrupt(_how_to_resume(folder))

    def _checkpoint(self, build: BuildPass, folder: Path) -> None:
        """Write a checkpoint; a full disk must not cost the build."""
        try:
            path = build.checkpoint().save(folder)
            logger.info("Checkpoint after %d activations: %s", build.n_activations, path)
            # Gathered activations fill gigabytes, and those of an earlier checkpoint are among those of a later one.
            for earlier in list_checkpoints(folder) if build.gathers else []:
                if earlier.name != path.name:
                    shutil.rmtree(earlier)
        except OSError as error:
            whole = list_checkpoints(folder)
            last = f"the last whole one is {whole[-1]}" if whole else "there is none yet"
            said = "The checkpoint after %d activations could not be written (%s). The build goes on; %s."
            logger.error(said, build.n_activations, error, last)

    # --- what is finished ---

    def _finish(self, build: BuildPass, stream: ActivationStream) -> None:
        """Save every dictionary as soon as it is there, then profile and evaluate them; the first error in what is done
        with one is raised after the others.
        """
        config, result = self._begun.config, self._begun
        for name, fit in build.results():
            path = None if result.output_path is None else result.output_path / name
            built = result.dictionaries[name] = BuiltDictionary(name=name, fit=fit, path=path)
            if path is not None:
                with self._going_on("The saving", built):
                    built.save_fit(config)
        result.dictionaries = {name: result.dictionaries[name] for name in build.names}
        built_all = list(result.dictionaries.values())
        try:
            self._profile(built_all, stream, build.take_kept())
            self._evaluate(built_all, stream, build.last_document)
        finally:
            for built in built_all:
                with self._going_on("The tracking", built):
                    self._track(built)
        for what, built, error in self._errors:
            if isinstance(error, OSError) and what.startswith("The saving"):
                raise _not_written(built, error, result)
            raise error

    @contextmanager
    def _going_on(self, what: str, built: BuiltDictionary) -> Iterator[None]:
        """Note an error in what is done with one dictionary, which must not cost the others."""
        try:
            yield
        except Exception as error:
            said = "%s of %s failed (%s: %s); the run goes on with the others."
            logger.error(said, what, built.name, type(error).__name__, error)
            self._errors.append((what, built, error))

    def _profile(
        self, built_all: list[BuiltDictionary], stream: ActivationStream, kept: list[ActivationBatch] | None
    ) -> None:
        """Profile every dictionary, on the activations that the pass has kept, or else on those of another."""
        config = self._begun.config
        stream = stream if kept is None else KeptStream.holding(stream, kept)
        if config.profile:
            profiles = profile_dictionaries([built.dictionary for built in built_all], stream, progress=config.progress)
            for built, profile in zip(built_all, profiles):
                built.profile = profile
                if built.path is not None:
                    with self._going_on("The saving of the profile", built):
                        built.save_profile()

    def _evaluate(self, built_all: list[BuiltDictionary], stream: ActivationStream, last_document: int) -> None:
        config = self._begun.config
        if config.n_eval_batches == 0:
            return
        size = config.eval_batch_size_prompts or config.store_batch_size_prompts
        n_batches = config.n_eval_batches
        if n_batches is None:
            n_activations = self._begun.n_activations // len(built_all)
            size, n_batches = default_eval_size(n_activations, stream.context_size, size)
        windows = None if stream.model is None else eval_windows(stream, last_document, size, n_batches)
        if windows is None:
            missing = "no model" if stream.model is None else "no text"
            logger.warning("Not evaluated: there is %s to evaluate on.", missing)
            return
        for built in built_all:
            with self._going_on("The evaluation", built):
                built.evals = evaluate(built.dictionary, stream, windows)
            if built.path is not None and built.evals is not None:
                with self._going_on("The saving of the evaluation", built):
                    built.save_evals()

    # --- tracking ---

    def _start_tracking(self, config: DictionaryRunnerConfig, run_id: str, *, resume: bool) -> None:
        if not config.logger.log_to_wandb:
            return
        self._tracker = WandbTracker(replace(config.logger, wandb_id=run_id), config.to_dict(), resume=resume)
        names = [name for _, _, own in config.dictionary_names() for name in own]
        # The beginning of SAELens' names is the architecture and the setting, their end the tokens.
        self._tracker.open(names, [f"{name}-Tokens-{config.training_tokens:3.3e}" for name in names])

    def _on_metrics(self, name: str, step: int, figures: dict[str, float]) -> None:
        if self._tracker is not None:
            self._tracker.on_metrics(name, step, figures)

    def _track(self, built: BuiltDictionary) -> None:
        if self._tracker is None:
            return
        self._tracker.log_result(built.name, built.figures() | (built.evals or {}), built.log_sparsity)
        if built.path is not None:
            self._tracker.log_files(built.name, built.dictionary.get_name(), *built.files)

    def _stop_tracking(self, exit_code: int) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is None:
            return
        try:
            tracker.finish(exit_code)
        except Exception as error:
            # What ended the run matters more than what wandb says of it.
            if exit_code == 0:
                raise
            logger.error("A wandb run could not be ended (%s: %s).", type(error).__name__, error)


class _Interruption:
    """Holds Ctrl-C and SIGTERM back until the batch at hand is done; the second one is not held back."""

    signal: int | None = None

    def hold(self, number: int, frame: Any) -> None:
        """Note the first signal, and let the second one through."""
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        logger.warning("Interrupted: the run ends after this batch. Once more ends it at once.")


@contextmanager
def _handled(handler: Callable[[int, Any], Any], *signals: int) -> Iterator[None]:
    """Have a function called for some signals, in the main thread; elsewhere they arrive as they always do."""
    in_main = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, handler) for number in signals if in_main}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def _bar(config: DictionaryRunnerConfig, build: BuildPass) -> Any:
    options = {"total": config.training_tokens, "initial": build.n_activations, "unit": "tok", "desc": "activations"}
    return tqdm(**options, disable=not config.progress)


def _how_to_resume(folder: Path | None) -> str:
    whole = [] if folder is None else list_checkpoints(folder)
    return f"Resume with resume_from_checkpoint={str(whole[-1])!r}." if whole else "There is no checkpoint."


def _what_is_left(result: RunResult) -> str:
    built = [(one.name, one.path) for one in result.dictionaries.values()]
    saved = [name for name, path in built if path is not None and (path / "fit.json").exists()]
    done = f"Saved so far: {', '.join(saved)}. " if saved else ""
    return done + _how_to_resume(result.checkpoint_path)


def _not_written(built: BuiltDictionary, error: OSError, result: RunResult) -> OSError:
    """An error in writing that says what was being written, and what is left."""
    message = f"{built.name} could not be written to {built.path} ({error.strerror or error}). {_what_is_left(result)}"
    failure = OSError(error.errno, message)
    failure.__cause__ = error
    return failure


def _check_writable(path: Path, name: str) -> None:
    """Find out before the build that a folder cannot be written."""
    probe = path / f".{uuid.uuid4().hex[:8]}"
    try:
        _files.write_json(probe, {})
        probe.unlink()
    except OSError as error:
        raise OSError(
            error.errno,
            f"{name}={str(path)!r} cannot be written ({error.strerror or error}): choose a folder of yours with space "
            "left.",
        ) from error
