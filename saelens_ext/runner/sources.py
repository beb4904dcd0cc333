"""From a config to what it reads: the model, the dataset, and the stream of their activations."""

import hashlib
import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
from sae_lens.constants import DTYPE_MAP
from sae_lens.load_model import load_model as load_with_saelens

from saelens_ext import _checks
from saelens_ext.activations.cached_stream import CachedStream
from saelens_ext.activations.stream import ActivationStream
from saelens_ext.host.devices import check_spread, chosen_device
from saelens_ext.host.models import bridge_of, describe_model, hooked_of, load_model
from saelens_ext.runner.config import MODEL_CLASSES, DictionaryRunnerConfig
from saelens_ext.runner.dictionary_configs import ExemplarBuildConfig, SNMFBuildConfig

logger = logging.getLogger(__name__)

_FILE_KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text", ".parquet": "parquet"}
_MIB = 2**20


def open_model(config: DictionaryRunnerConfig) -> Any:
    """Load the model that a config names, in evaluation mode.

    ValueError: no name, a dtype that torch has not, or arguments that the way of loading does not take.
    """
    if not config.model_name:
        raise ValueError("model_name is empty: name a model or a saved one's folder, or give the runner a model=.")
    arguments = dict(config.model_from_pretrained_kwargs or {})
    for key in ("dtype", "torch_dtype"):
        if isinstance(arguments.get(key), str):
            _checks.choice(arguments[key], tuple(DTYPE_MAP), f"model_from_pretrained_kwargs[{key!r}]")
            arguments[key] = DTYPE_MAP[arguments[key]]
    if "max_memory" in arguments:  # whose numbers of devices are texts in JSON
        given = arguments["max_memory"] or {}
        arguments["max_memory"] = {int(k) if str(k).isdigit() else k: v for k, v in given.items()} or None
    device = _device(config, arguments)
    logger.info("Loading %s as %s", config.model_name, config.model_class_name)
    if config.model_class_name == "AutoModelForCausalLM":
        check_spread(arguments.get("device_map"), None, arguments.get("max_memory"))
        if arguments.pop("n_devices", None) is not None:
            raise ValueError("n_devices spreads an SAETransformerBridge; device_map='auto' an AutoModelForCausalLM.")
        return load_with_saelens("AutoModelForCausalLM", config.model_name, device, arguments).eval()
    if config.model_class_name == "SAETransformerBridge":
        return bridge_of(config.model_name, device=device, **arguments)
    if not Path(config.model_name).is_dir():
        return hooked_of(config.model_name, device=device, **arguments)
    _checks.known_keys(arguments, ["dtype", "trust_remote_code"], "A saved model loaded as HookedTransformer")
    return load_model(config.model_name, model_class="HookedSAETransformer", device=device, **arguments)


def _device(config: DictionaryRunnerConfig, arguments: dict[str, Any]) -> str | None:
    """Where the loader is to put the model; None where its arguments say how it is spread over devices."""
    spread = arguments.get("device_map") is not None or (arguments.get("n_devices") or 1) > 1
    if config.model_class_name == "HookedTransformer" or not spread:
        return chosen_device(arguments.pop("device", config.device))
    if "device" in arguments:
        raise ValueError(
            f"model_from_pretrained_kwargs name both a device ({arguments['device']!r}) and how to spread the model "
            "over devices (device_map or n_devices): leave out one."
        )
    return None


def open_dataset(config: DictionaryRunnerConfig) -> Any:
    """Open the dataset that a config names; ValueError if it names none."""
    path = config.dataset_path
    if not path:
        raise ValueError("dataset_path is empty: name a dataset, a folder or file, or give the runner a dataset=.")
    if _saved_to_disk(path):
        found = datasets.load_from_disk(path)
        return found["train"] if isinstance(found, datasets.DatasetDict) else found
    if Path(path).is_file():
        kind = _FILE_KINDS.get(Path(path).suffix)
        if kind is None:
            raise ValueError(f"dataset_path {path} is a file of an unknown kind; known are {', '.join(_FILE_KINDS)}.")
        return datasets.load_dataset(kind, data_files=path, split="train", streaming=config.streaming)
    return datasets.load_dataset(path, split="train", streaming=config.streaming)


def open_stream(
    config: DictionaryRunnerConfig, model: Any = None, dataset: Any = None, *, as_named: bool = False
) -> ActivationStream:
    """The activations that a config asks for.

    ``model`` and ``dataset`` (or a list of strings) are used instead of the named ones; ``as_named`` says that they are
    what the config names, only opened already.

    Raises:
        ValueError: as :func:`open_model`, :func:`open_dataset` and the streams.
    """
    if model is not None and not as_named:
        _check_named(config, model)
    if model is None and (config.model_name or config.cached_activations_path is None):
        model = open_model(config)
    options = {
        "context_size": config.context_size,
        "batch_size": config.store_batch_size_prompts,
        "max_tokens": config.training_tokens,
        "exclude_special_tokens": config.exclude_special_tokens,
        "seqpos_slice": config.seqpos_slice,
    }
    if config.cached_activations_path is not None:
        if dataset is not None or config.dataset_path:
            raise ValueError("Give cached_activations_path or a dataset, not both.")
        device = chosen_device(config.device) if model is None else next(model.parameters()).device
        stream = CachedStream(config.cached_activations_path, config.hook_names, model=model, device=device, **options)
        if stream.prepend_bos is None:
            stream.prepend_bos = config.prepend_bos
        if config.prepend_bos not in (None, stream.prepend_bos):
            raise ValueError(f"prepend_bos={config.prepend_bos}, and the cached windows differ: leave it at none.")
        _say_what_windows_are(config)
        return stream
    assert model is not None
    stream = ActivationStream(
        model,
        open_dataset(config) if dataset is None else dataset,
        config.hook_names,
        prepend_bos=config.prepend_bos,
        text_column=config.text_column,
        **options,
    )
    if dataset is None or as_named:
        stream._windows.name = config.dataset_path
        # What Dataset.save_to_disk wrote has a fingerprint of its own, and later steps leave files beside it.
        if Path(config.dataset_path).exists() and not _saved_to_disk(config.dataset_path):
            stream._windows.fingerprint = _fingerprint_files(config.dataset_path)
    return stream


def _fingerprint_files(path: str | Path) -> str:
    """A fingerprint of a file, or of all files in a folder but hidden ones: of their names, sizes, first and last MiB.

    It tells the same data however it is read, streamed or not; a change in the middle of a large file that keeps its
    size goes unnoticed.
    """
    path = Path(path)
    root, files = (path, path.rglob("*")) if path.is_dir() else (path.parent, [path])
    inside = [(file.relative_to(root), file) for file in files]
    digest = hashlib.sha256()
    for name, file in sorted(inside):
        if not file.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        size = file.stat().st_size
        digest.update(f"{name.as_posix()}\0{size}\0".encode())
        with open(file, "rb") as content:
            digest.update(content.read(_MIB))
            if size > _MIB:
                content.seek(max(_MIB, size - _MIB))
                digest.update(content.read(_MIB))
    return digest.hexdigest()[:16]


def resolved(config: DictionaryRunnerConfig, stream: ActivationStream) -> DictionaryRunnerConfig:
    """The config with the model, the device and the beginning of sequences that the stream turned out to have."""
    changes = {"device": str(stream.device), "prepend_bos": stream.prepend_bos}
    if stream.model is not None:
        found = describe_model(stream.model)
        kind = found["model_class_name"]
        if kind not in MODEL_CLASSES:
            kind = "SAETransformerBridge" if "Bridge" in kind else "HookedTransformer"
        changes |= {"model_name": config.model_name or str(found["model_name"]), "model_class_name": kind}
    if not config.dataset_path and config.cached_activations_path is None:
        changes["dataset_path"] = str(stream.describe().get("dataset_path") or "")
    return replace(config, **changes)


def _saved_to_disk(path: str) -> bool:
    """Whether ``Dataset.save_to_disk`` wrote a folder."""
    return (Path(path) / "dataset_dict.json").exists() or (Path(path) / "state.json").exists()


def _check_named(config: DictionaryRunnerConfig, model: Any) -> None:
    """Refuse or question what a config says of the model where an open one was handed over."""
    if config.model_from_pretrained_kwargs:
        raise ValueError(
            f"model_from_pretrained_kwargs are for a model that is loaded by name, and an open {type(model).__name__} "
            f"was handed over with {config.model_from_pretrained_kwargs!r}: leave them out."
        )
    own = str(describe_model(model)["model_name"])
    # The same model may be named with its owner or the folder that it lies in.
    if config.model_name and Path(config.model_name).name.lower() != Path(own).name.lower():
        warnings.warn(
            f"model_name={config.model_name!r} is recorded, and the model that was handed over calls itself {own!r}: "
            "leave model_name out to record that.",
            UserWarning,
            stacklevel=3,
        )


def _say_what_windows_are(config: DictionaryRunnerConfig) -> None:
    """Cached activations do not say where documents end: name the options that count on it."""
    across = any(
        isinstance(one, ExemplarBuildConfig) and one.threshold is None and one.calibration == "across_documents"
        for one in config.dictionaries
    )
    apart = any(isinstance(one, SNMFBuildConfig) and one.held_out for one in config.dictionaries)
    counting = [name for name, used in (('calibration="across_documents"', across), ("held_out", apart)) if used]
    if counting:
        logger.warning(
            "The cache does not say where documents end, so every window counts as a document for %s: windows of one "
            "document may be on both sides.",
            " and ".join(counting),
        )
