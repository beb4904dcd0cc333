"""Options of the audit: what is audited, and the audit's own config as it can be written on a command line."""
# ruff: noqa: RUF009  `parsed` and `simple_parsing.field` make fields.

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import simple_parsing
from sae_lens import LoggingConfig
from simple_parsing.docstring import get_attribute_docstring

from saelens_ext.cli.errors import UsageError
from saelens_ext.continuations.audit_stages.config import AuditConfig
from saelens_ext.continuations.samplers.endpoint_sampler import EndpointSampler
from saelens_ext.evals.continuations.supernodes import READ
from saelens_ext.runner.config import quiet_logger
from saelens_ext.runner.parsing import mapping_or_none, number, parsed, text_or_none, texts, tuple_of, whole_number


@dataclass(kw_only=True)
class SamplerOptions:
    """Where continuations are sampled, if not from the model: a completions endpoint."""

    url: str | None = simple_parsing.field(default=None, type=text_or_none, metavar="URL")
    """Any OpenAI-compatible completions endpoint (vLLM, llama.cpp, TGI), such as http://localhost:8000/v1; the model
    scores its texts. A key is read from the environment variable OPENAI_API_KEY.
    """
    model: str | None = simple_parsing.field(default=None, type=text_or_none, metavar="NAME")
    """Name of the model at the endpoint; by default that of the audited one."""
    prompt_as: str = "tokens"
    """tokens: the ids that the model reads; text: for an endpoint of another tokenizer, or that takes no ids (TGI)."""
    choices_per_request: int = 1
    """Continuations to ask for at a time."""
    request_options: dict[str, Any] | None = parsed(None, mapping_or_none, "JSON")
    """Further fields of a request: '{"return_token_ids": true}' with vLLM."""
    timeout: float = 60.0
    """Seconds to wait for one answer."""
    max_retries: int = 5
    """How often a failed call is made again."""
    max_concurrency: int = 4
    """Calls at a time."""

    def made(self, model_name: str, folder: Path | None) -> EndpointSampler | None:
        """The sampler, whose answers are kept in the folder of the results."""
        if self.url is None:
            if self != SamplerOptions():
                raise UsageError("Options of the sampler were given without --sampler.url=URL.")
            return None
        names = ("prompt_as", "choices_per_request", "request_options", "timeout", "max_retries", "max_concurrency")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        kept = None if folder is None else str(folder / "endpoint")
        return EndpointSampler(self.url, self.model or model_name, cache_directory=kept, **options)


@dataclass(kw_only=True)
class SubjectInputs:
    """What is audited."""

    # A field typed as a list would take several words; these take one, or are repeated.
    model_name: str = ""
    """Hugging Face name of the model, the folder of a saved one, or demo."""
    model_class_name: str = "SAETransformerBridge"
    """SAETransformerBridge or HookedTransformer."""
    model_from_pretrained_kwargs: dict[str, Any] | None = parsed(None, mapping_or_none, "JSON")
    """Passed to the model's loader: '{"dtype": "bfloat16"}'."""
    device: str = "auto"
    """Where to compute: auto (CUDA where there is one, else MPS, else the CPU) or a device of torch."""
    dictionaries: Any = simple_parsing.field(default_factory=list, type=texts, metavar="NAME[,NAME…]")
    """Dictionaries to attribute to: folders of saved ones (their profiles go into the report), repo_id:sae_id on the
    Hub, or release:sae_id of SAELens.
    """
    actor_options: dict[str, Any] | None = parsed(None, mapping_or_none, "JSON")
    """Ray's resources of an actor: '{"num_gpus": 1}'; one CPU by default."""
    sampler: SamplerOptions = dataclasses.field(default_factory=SamplerOptions)
    """Where continuations are sampled, if not from the model."""


@dataclass(kw_only=True)
class EmbeddedInputs(SubjectInputs):
    """The same, and what embeds continuations."""

    embedder: str | None = simple_parsing.field(default=None, type=text_or_none, metavar="NAME")
    """Name or folder of a sentence-transformers model; by default the packaged one."""


@dataclass(kw_only=True)
class AuditInputs(EmbeddedInputs):
    """What is audited, and where the results go."""

    prefix: Any = simple_parsing.field(default_factory=list, action="append", type=str, metavar="TEXT")
    """A text that the model continues; may be repeated."""
    prefixes: str | None = simple_parsing.field(default=None, type=text_or_none, metavar="FILE")
    """File of prefixes: a JSON list or lines of texts and conversations (lists of messages)."""
    continuations: str | None = simple_parsing.field(default=None, type=text_or_none, metavar="FILE")
    """Continuations to audit instead of samples: a JSONL file, {"prompt": …, "continuation": …} in each line, or a log
    of Inspect (.eval, .json). Without prefixes, all of the file's are audited.
    """
    samples: Any = simple_parsing.field(default_factory=list, type=texts, metavar="ID[,ID…]")
    """Samples of the log of Inspect; all by default."""
    n_workers: int = 1
    """Prefixes audited at a time, each by a worker that loads the model."""
    workers: str = "joblib"
    """joblib: processes on this machine; ray: actors on a Ray cluster, or on this machine."""
    output_path: str | None = simple_parsing.field(default="audit", type=text_or_none, metavar="FOLDER")
    """Folder of the results, stage by stage: the same command goes on where it was; none writes nothing."""
    logger: LoggingConfig = dataclasses.field(default_factory=quiet_logger)
    """SAELens' logging config; log_to_wandb is off by default. The audit has one wandb run."""


_NAMES = (tuple_of(str), "NAME[,NAME…]")
_LISTS: dict[str, tuple[Callable[[str], Any], str]] = {
    **dict.fromkeys(("betas", "gammas", "strengths", "rates", "targets"), (tuple_of(number), "X[,X…]")),
    **dict.fromkeys(("ks", "n_directions", "signs"), (tuple_of(whole_number), "N[,N…]")),
    "n_clusters": (tuple_of(whole_number), "N,N"),
    "partitions": (texts, "NAME[,NAME…]"),
    "chat_template_options": (mapping_or_none, "JSON"),
    # A text, which may hold commas, or a JSON list.
    "stop": (lambda text: texts(text) if text.startswith("[") else (text,), "TEXT|JSON"),
}


def as_option(name: str, kind: Any, default: Any, explained: str) -> tuple[str, Any, Any]:
    """A field of a dataclass, read from one text where it holds several values."""
    named = isinstance(default, tuple) and isinstance((*default, None)[0], str)
    if not named and name not in _LISTS:
        return name, kind, simple_parsing.field(default=default, help=explained)
    convert, metavar = _NAMES if named else _LISTS[name]
    # Without the type of the field, from which the parser would take how many words belong to it.
    return name, Any, simple_parsing.field(default=default, type=convert, metavar=metavar, help=explained)


def _of_config(names: Collection[str]) -> list[tuple[str, Any, Any]]:
    """Some fields of AuditConfig."""
    fields = [field for field in dataclasses.fields(AuditConfig) if field.name in names]
    helps = [get_attribute_docstring(AuditConfig, field.name).docstring_below for field in fields]
    return [as_option(field.name, field.type, field.default, text) for field, text in zip(fields, helps)]


AuditSettings = dataclasses.make_dataclass(
    "AuditSettings",
    _of_config(_LISTS),
    bases=(AuditConfig,),
    kw_only=True,
    frozen=True,
    namespace={"__doc__": AuditConfig.__doc__},
)
"""AuditConfig, whose fields of several values are given as ``1,2`` or ``[1, 2]``."""

_OF_THE_CHOICE = ("betas", "gammas", "n_clusters", "n_resamples", "validate", "direction", "sign", "partitions")


def _some(name: str, about: str, names: Collection[str]) -> type:
    """A dataclass of some fields of AuditConfig."""
    namespace = {"__doc__": about, "__module__": __name__}
    return dataclasses.make_dataclass(name, _of_config(names), kw_only=True, namespace=namespace)


GivenCells = _some(
    "GivenCells",
    "How continuations are sampled, read and steered.",
    {field.name for field in dataclasses.fields(AuditConfig)}.difference(_OF_THE_CHOICE),
)
"""AuditConfig without what chooses a clustering, for evaluations that are given their cells."""

Attributed = _some("Attributed", "How continuations are sampled and attributed.", READ)
"""AuditConfig without what is done after attribution."""
