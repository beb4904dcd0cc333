"""The resolved config: what a run really reads, in place of defaults and of what was handed over."""

from dataclasses import replace

from saelens_ext.activations.stream import ActivationStream
from saelens_ext.host.models import describe_model
from saelens_ext.runner.config import MODEL_CLASSES, DictionaryRunnerConfig


def resolved(config: DictionaryRunnerConfig, stream: ActivationStream) -> DictionaryRunnerConfig:
    """The config with the model, the device and the beginning of sequences that the stream turned out to have."""
    changes = {"device": str(stream.device), "prepend_bos": stream.prepend_bos}
    if stream.model is not None:
        found = describe_model(stream.model)
        changes |= {
            "model_name": config.model_name or str(found["model_name"]),
            "model_class_name": _class_name(found["model_class_name"]),
        }
    if not config.dataset_path and config.cached_activations_path is None:
        changes["dataset_path"] = str(stream.describe().get("dataset_path") or "")
    return replace(config, **changes)


def _class_name(found: str) -> str:
    """The way of loading that gives a class."""
    if found in MODEL_CLASSES:
        return found
    return "SAETransformerBridge" if "Bridge" in found else "HookedTransformer"
