"""From names on the command line to models, datasets and dictionaries."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from sae_lens import SAE
from transformers import AutoConfig

from saelens_ext.activations.stream import ActivationStream
from saelens_ext.cli.errors import UsageError
from saelens_ext.cli.options import DEMO, ReadingOptions
from saelens_ext.demo.packaged import load_demo_corpus, load_demo_model
from saelens_ext.dictionaries.hierarchy import HierarchicalSNMF
from saelens_ext.host.by_name import same_model
from saelens_ext.host.devices import chosen_device
from saelens_ext.host.models import describe_model, in_residual_space, retarget
from saelens_ext.hub.contents import Contents
from saelens_ext.hub.contents import read_folder as read_contents
from saelens_ext.hub.share import load_from_hub
from saelens_ext.runner import sources
from saelens_ext.runner.config import MODEL_CLASSES, DictionaryRunnerConfig
from saelens_ext.runner.parsing import mapping_or_none

logger = logging.getLogger(__name__)

# What the metadata of a dictionary, or the config of a run, says about what was read.
_OF_THE_METADATA = ("model_name", "dataset_path", "context_size", "prepend_bos", "seqpos_slice")
_OF_THE_METADATA += ("exclude_special_tokens",)
_OF_THE_RUN = (*_OF_THE_METADATA, "model_class_name", "model_from_pretrained_kwargs", "streaming", "text_column")
_OF_THE_RUN += ("cached_activations_path", "store_batch_size_prompts", "training_tokens")
_TOKENS = 200_000


def open_model(config: DictionaryRunnerConfig) -> Any:
    """The model that a config names; "demo" is the packaged one. UsageError or ValueError if it cannot be loaded."""
    if not config.model_name:
        raise UsageError("No model was named: --model_name=NAME, the folder of a saved one, or demo.")
    if config.model_name == DEMO:
        if config.model_class_name != "SAETransformerBridge" or config.model_from_pretrained_kwargs:
            raise UsageError("The demo model is a SAETransformerBridge, without model_from_pretrained_kwargs.")
        return load_demo_model(config.device)
    try:
        return sources.open_model(config)
    except (OSError, KeyError) as error:
        # The libraries' messages are pages about tokens and mirrors; the first line says what is wrong.
        first = (str(error).strip("'\"\n ").splitlines() or [type(error).__name__])[0]
        name = f"{config.model_name!r} {_where(config.model_name)}"
        raise ValueError(f"The model {name}: {first.rstrip('.')}.") from error


def open_dataset(config: DictionaryRunnerConfig) -> Any:
    """The dataset that a config names; "demo" is the packaged corpus; None where cached activations are read."""
    if config.cached_activations_path is not None:
        return None
    if not config.dataset_path:
        raise UsageError("No dataset was named: --dataset_path=NAME, a file or folder of data, or demo.")
    if config.dataset_path == DEMO:
        return load_demo_corpus()
    try:
        return sources.open_dataset(config)
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"The dataset {config.dataset_path!r} {_where(config.dataset_path)}: {said}.") from error


def _where(name: str) -> str:
    """Where a name was looked for in vain."""
    local = Path(name).exists()
    return "could not be read" if local else "is no file or folder here, and could not be loaded from the hub"


def check_writable(path: str | Path | None, option: str) -> None:
    """Find out before a model is loaded that a folder cannot be made or written, as an OSError."""
    if path is None:
        return
    nearest = next(folder for folder in (Path(path).absolute(), *Path(path).absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"--{option}={path}: {nearest} is a file; results go into a folder of another name.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"--{option}={path}: {nearest} may not be written; choose a folder of yours.")


def open_stream(config: DictionaryRunnerConfig) -> ActivationStream:
    """The activations that a config asks for."""
    needs_model = bool(config.model_name) or config.cached_activations_path is None
    # The dataset first: a model takes long to load.
    dataset = open_dataset(config)
    stream = sources.open_stream(config, open_model(config) if needs_model else None, dataset, as_named=True)
    if dataset is not None:
        stream._windows.name = config.dataset_path
    return stream


def read_folder(folder: str) -> Contents:
    """A saved dictionary and what lies beside it.

    Raises:
        FileNotFoundError: no such folder, or none with a dictionary.
        ValueError: damaged files, or an unknown architecture.
    """
    refuse_file(folder)
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"There is no folder {folder}; give the one a dictionary was saved into.")
    return read_contents(Path(folder))


def refuse_file(name: str) -> None:
    """Raise NotADirectoryError for a file where a dictionary's folder is wanted."""
    if Path(name).is_file():
        raise NotADirectoryError(f"{name} is a file; give the folder that the dictionary is in: {Path(name).parent}.")


def open_contents(name: str, device: str = "cpu") -> Contents:
    """A dictionary and what lies beside it, by folder, ``repo_id:sae_id`` (Hub) or ``release:sae_id`` (SAELens)."""
    refuse_file(name)
    device = chosen_device(device)
    if Path(name).is_dir():
        return read_contents(Path(name), device)
    repo_id, _, sae_id = name.partition(":")
    if not (repo_id and sae_id):
        raise FileNotFoundError(f"There is no folder {name}, and it is not written as repo_id:sae_id.")
    if "/" in repo_id:
        return load_from_hub(repo_id, sae_id, device=device)
    return Contents(dictionary=SAE.from_pretrained(repo_id, sae_id, device=device))


def open_dictionary(name: str, device: str = "cpu") -> SAE[Any]:
    """The dictionary alone, by its folder or name."""
    return only_dictionary(open_contents(name, device), name)


def only_dictionary(contents: Contents, name: str) -> SAE[Any]:
    """The dictionary of some contents; ValueError for a hierarchy of several."""
    found = contents.dictionary
    if isinstance(found, HierarchicalSNMF):
        raise ValueError(f"{name} is a hierarchy of {len(found.dictionaries)}: name one, {name}/level_0 for instance.")
    return found


def dictionaries_in(contents: Contents, folder: str) -> list[tuple[SAE[Any], Path]]:
    """The dictionaries of a folder with the folder of each: one, or the levels of a hierarchy."""
    if isinstance(contents.dictionary, HierarchicalSNMF):
        return [(sae, Path(folder) / f"level_{level}") for level, sae in enumerate(contents.dictionary.dictionaries)]
    return [(contents.dictionary, Path(folder))]


def attach(dictionary: SAE[Any], model: Any) -> SAE[Any]:
    """The dictionary under the hook name that fires on the model; ValueError for one of another width."""
    if model is None:
        return dictionary
    found = describe_model(model)
    _check_width(dictionary, str(found["model_name"]), found.get("d_model"))
    return retarget(dictionary, model)


def check_model(dictionary: SAE[Any], name: str) -> None:
    """Before a model is loaded: warn of another than the dictionary was built on, and refuse one of another width."""
    built_on = str(dictionary.cfg.metadata.model_name or "")
    if name == DEMO or not built_on or same_model(name, built_on):
        return
    try:
        width = AutoConfig.from_pretrained(name).get_text_config().hidden_size
    except (OSError, ValueError, AttributeError):  # loading the model will say what is wrong, or it is of another kind
        width = None
    _check_width(dictionary, name, width)
    logger.warning(
        "The dictionary was built on %s, and %s is read: figures are of activations that it was not made for.",
        built_on,
        name,
    )


def _check_width(dictionary: SAE[Any], name: str, width: int | None) -> None:
    """Raise ValueError where a model is known to have another width than that of the dictionary's."""
    metadata = dictionary.cfg.metadata
    of_residuals = metadata.hook_name is not None and in_residual_space(metadata.hook_name)
    expected = metadata.d_model or (dictionary.cfg.d_in if of_residuals else None)
    if None not in (expected, width) and expected != width:
        raise ValueError(
            f"The dictionary was built on {metadata.model_name or 'a model that is not recorded'}, of width "
            f"{expected}, and {name} has width {width}: give the model that it was built on, "
            f"--model_name={metadata.model_name or 'NAME'}."
        )


def reading_config(
    contents: Contents, dictionary: SAE[Any], options: ReadingOptions, **more: Any
) -> DictionaryRunnerConfig:
    """What to read for a saved dictionary: as given, else as its run or metadata say, else the runner's defaults."""
    recorded = recorded_settings(contents, dictionary)
    given = {field.name: getattr(options, field.name) for field in fields(ReadingOptions) if field.name != "dictionary"}
    given = {name: value for name, value in (given | more).items() if value is not None}
    if text := given.get("model_from_pretrained_kwargs"):
        try:
            given["model_from_pretrained_kwargs"] = mapping_or_none(text)
        except ValueError as error:
            raise UsageError(f"--model_from_pretrained_kwargs takes a JSON object, got {text!r} ({error}).") from error
    if "dataset_path" in given:
        recorded.pop("cached_activations_path", None)
    hook_name = dictionary.cfg.metadata.hook_name
    if not hook_name:
        raise ValueError(f"{options.dictionary} records no hook name: set metadata.hook_name in its cfg.json.")
    if given.get("model_name"):
        check_model(dictionary, given["model_name"])
    defaults = {"training_tokens": _TOKENS, "hook_name": hook_name, "checkpoint_path": None, "output_path": None}
    return DictionaryRunnerConfig(**defaults | recorded | given)


def recorded_settings(contents: Contents, dictionary: SAE[Any]) -> dict[str, Any]:
    """What a dictionary's own files say about the model and the text that it was built from."""
    metadata = dictionary.cfg.metadata
    found = {name: metadata.get(name) for name in _OF_THE_METADATA}
    named = str(metadata.model_class_name).replace("HookedSAETransformer", "HookedTransformer")
    found["model_class_name"] = named if named in MODEL_CLASSES else None
    run = contents.runner_config
    # SAELens' own trainer writes a file of the same name, whose tokens are those of a training.
    if run is not None and isinstance(run.get("dictionary"), (Mapping, list)):
        found |= {name: run.get(name) for name in _OF_THE_RUN}
    return {name: value for name, value in found.items() if value not in (None, "")}


def texts_in(path: Path, *, conversations: bool = False) -> list[Any]:
    """The texts in a file, without empty ones; where that is said, conversations (lists of messages) among them.

    A file is a JSON list, or has a text in each line, which can also be a conversation as JSON; in a ``.jsonl`` file
    every line is JSON.
    """
    what = f"a JSON list of texts{' and conversations' if conversations else ''}, or one in each line"
    try:
        listed = _listed(path.read_text(encoding="utf-8"), path.suffix == ".jsonl", conversations)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must hold {what}; it is not readable as either ({error}).") from error
    if conversations and listed and all(isinstance(entry, Mapping) for entry in listed):
        listed = [listed]  # one conversation is a JSON list too
    kinds = str | list if conversations else str
    if not all(isinstance(entry, kinds) for entry in listed):
        raise ValueError(f"{path} must hold {what}; it lists something else.")
    return [entry for entry in listed if entry]


def _listed(text: str, all_json: bool, conversations: bool) -> list[Any]:
    """The entries of a JSON list, or of lines."""
    if text.lstrip().startswith("[") and not all_json:
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data" or not conversations:  # otherwise a conversation stands in each line
                raise
    lines = [line for line in text.splitlines() if line.strip()]
    talks = [all_json or (conversations and line.replace(" ", "").startswith("[{")) for line in lines]
    return [json.loads(line) if is_json else line for line, is_json in zip(lines, talks, strict=True)]
