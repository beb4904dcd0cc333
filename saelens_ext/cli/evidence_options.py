"""Options of ``evidence``: what is evaluated, and the options of the evaluations themselves, from their signatures."""
# ruff: noqa: RUF009  `parsed` and `simple_parsing.field` make fields.

import dataclasses
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import docstring_parser
import simple_parsing
from sae_lens import LoggingConfig

from saelens_ext.cli.audit_options import EmbeddedInputs, SubjectInputs, as_option
from saelens_ext.cli.options import ReadingOptions, place
from saelens_ext.evals.behaviour.ablation import ablate_behaviour
from saelens_ext.evals.checkpoints.checkpoints import compare_checkpoints
from saelens_ext.evals.checkpoints.model_comparison import compare_models
from saelens_ext.evals.checkpoints.overlap import overlap_by_tokens
from saelens_ext.evals.continuations.clusters import evaluate_clusters
from saelens_ext.evals.continuations.supernodes import evaluate_supernodes
from saelens_ext.evals.detection.detection import evaluate_detection
from saelens_ext.evals.detection.probing import evaluate_probes
from saelens_ext.evals.dictionaries.decomposition import decompose_dictionary
from saelens_ext.evals.dictionaries.nesting import partition_nesting
from saelens_ext.evals.dictionaries.stability import dictionary_stability
from saelens_ext.evals.dictionaries.synthetic import evaluate_on_synthetic
from saelens_ext.evals.novelty.novelty import evaluate_novelty
from saelens_ext.evals.steering.steering import compare_steering
from saelens_ext.runner.config import quiet_logger
from saelens_ext.runner.parsing import items, mapping_or_none, number, parsed, text_or_none, texts


@dataclass(kw_only=True)
class ResultOptions:
    """Where the results go."""

    output_path: str = "evidence"
    """Folder of the page (evidence.html), the results (results.json) and the raw values."""
    logger: LoggingConfig = dataclasses.field(default_factory=quiet_logger)
    """SAELens' logging config; log_to_wandb is off by default."""


@dataclass(kw_only=True)
class EvidenceInputs(ReadingOptions):
    """What is evaluated, and where the results go. What is not given is as when the dictionary was built."""

    training_tokens: int | None = None
    """Activations to read; by default those that the dictionary was built from, or 200000."""
    compare: Any = simple_parsing.field(default_factory=list, action="append", type=str, metavar="FOLDER")
    """Another dictionary of the same hook, judged beside this one; may be repeated."""
    save: bool = True
    """Put the verdict and the figures beside the dictionary, for its card."""


@dataclass(kw_only=True)
class ConceptChoice:
    """Which concepts are asked for."""

    concepts: str | None = simple_parsing.field(default=None, type=text_or_none, metavar="FILE")
    """JSONL file of concepts: name, positives, negatives, hard_negatives, description; by default those packaged with
    sae-probes."""
    names: Any = simple_parsing.field(default=(), type=texts, metavar="NAME[,NAME…]")
    """Sets of sae-probes instead of its 24 default ones, such as 96_spam_is."""
    n_per_side: int = 100
    """Sentences with and without each packaged concept."""


@dataclass(kw_only=True)
class ConceptInputs(ConceptChoice):
    """Which concepts are to be detected, and the controls."""

    n_coresets: int = 5
    """Draws of as many random activations, which each dictionary is compared with."""


@dataclass(kw_only=True)
class WorkInputs:
    """Who does the work, and where what is done is kept."""

    folder: str | None = simple_parsing.field(default=None, type=text_or_none, metavar="FOLDER")
    """Folder where every concept is kept when it is done: the same command goes on from there. Workers on several
    machines need one that all share. By default nothing is kept."""
    n_workers: int = 1
    """Concepts at a time, each by a worker that loads the model."""
    workers: str = "joblib"
    """joblib: processes on this machine; ray: actors on a Ray cluster, or on this machine."""
    actor_options: dict[str, Any] | None = parsed(None, mapping_or_none, "JSON")
    """Ray's resources of an actor: '{"num_gpus": 1}'; one CPU by default."""


@dataclass(kw_only=True)
class DocumentInputs:
    """Documents that the dictionary was not fitted to."""

    inside: str | None = simple_parsing.field(default=None, type=text_or_none, metavar="FILE")
    """Documents of the kind that it was fitted to: a JSON list of texts, or a text in each line."""
    outside: Any = simple_parsing.field(default_factory=list, action="append", type=str, metavar="NAME=FILE")
    """Documents of another kind, likewise; may be repeated."""


@dataclass(kw_only=True)
class ReplicaInputs:
    """Dictionaries that were built alike, but for a seed. No model is read."""

    dictionary: str = place("FOLDER")
    """Folder of a saved dictionary, any that SAELens loads; the statistics of its fit are used where they are kept."""
    compare: Any = simple_parsing.field(default_factory=list, action="append", type=str, metavar="FOLDER")
    """Another replica; may be repeated."""
    save: bool = True
    """Put the verdict and the figures beside the dictionary, for its card."""


@dataclass(kw_only=True)
class OtherModelInputs:
    """The dictionaries of the other model."""

    second: Any = simple_parsing.field(default_factory=list, action="append", type=str, metavar="FOLDER")
    """A replica of the other model's dictionary; repeat it, at least 2 are needed."""


@dataclass(kw_only=True)
class TargetInputs:
    """The dictionary that is taken apart, and the one in whose directions. No model is read."""

    dictionary: str = place("FOLDER")
    """Folder of a saved dictionary, any that SAELens loads."""
    basis: str | None = simple_parsing.field(default=None, type=text_or_none, metavar="FOLDER")
    """The dictionary whose directions are the terms, of the same width."""
    save: bool = True
    """Put the verdict and the figures beside the dictionary, for its card."""


@dataclass(kw_only=True)
class ModelInputs:
    """The two models, and the texts that both read."""

    base: str = place("BASE")
    """Hugging Face name of the model before training, the folder of a saved one, or demo."""
    tuned: str = place("TUNED")
    """The model after it."""
    hook_name: str | None = simple_parsing.field(default=None, type=text_or_none, metavar="HOOK")
    """Where to read both."""
    dataset_path: str | None = simple_parsing.field(default=None, type=text_or_none, metavar="NAME")
    """Hugging Face name of a dataset, a file or folder of data, or demo. Include text of the kind that training was
    about."""
    text_column: str | None = None
    """Column of the documents."""
    model_class_name: str | None = None
    """SAETransformerBridge, HookedTransformer or AutoModelForCausalLM."""
    training_tokens: int = 200_000
    """Activations to read of each."""
    prompts: Any = simple_parsing.field(default_factory=list, action="append", type=str, metavar="NAME=FILE")
    """Prompts that are not among the texts, a JSON list or lines of texts and conversations (lists of messages):
    whether they move into regions that training added; may be repeated."""
    chat_template_options: dict[str, Any] | None = parsed(None, mapping_or_none, "JSON")
    """Passed to the chat template, such as {"enable_thinking": false}."""
    device: str = "auto"
    """Where to compute: auto (CUDA where there is one, else the CPU) or a device of torch."""


@dataclass(kw_only=True)
class BehaviourInputs:
    """Which behaviour is looked for, and the prompts, which are divided into those that build, choose and judge."""

    shows: str | None = simple_parsing.field(default=None, type=text_or_none, metavar="FILE")
    """Prompts that should bring the behaviour about: a JSON list or lines of texts and conversations (lists of
    messages)."""
    lacks: str | None = simple_parsing.field(default=None, type=text_or_none, metavar="FILE")
    """Prompts that should not, likewise."""
    phrases: str | None = simple_parsing.field(default=None, type=text_or_none, metavar="FILE")
    """Phrases that answers which show it begin with, a JSON list or lines; by default those of refusals."""
    neutral: str | None = simple_parsing.field(default=None, type=text_or_none, metavar="FILE")
    """Neutral texts on which side effects are measured, likewise."""
    within: int = 300
    """Characters of an answer that are searched for phrases."""
    chat_template: bool = True
    """Make each text a user's message."""
    chat_template_options: dict[str, Any] | None = parsed(None, mapping_or_none, "JSON")
    """Passed to the chat template, such as {"enable_thinking": false}."""
    max_new_tokens: int = 60
    """Tokens of an answer."""
    min_members: int = 5
    """Prompts that a candidate region must have."""
    min_rate: float = 0.3
    """Rate of the behaviour that it must have."""
    sweep: bool = False
    """Also build partitions of the prompts at 5 percentiles and in 5 orders, and ablate each best candidate; the cells
    are kept in the folder of the results, from which the same command goes on."""


@dataclass(kw_only=True)
class SteeringInputs:
    """What is continued under steering, and who rates it."""

    prompts: str | None = simple_parsing.field(default=None, type=text_or_none, metavar="FILE")
    """What is continued, at least 2: a JSON list or lines of texts and conversations (lists of messages); every other
    one chooses targets and signs."""
    chat_template_options: dict[str, Any] | None = parsed(None, mapping_or_none, "JSON")
    """Passed to the chat template, such as {"enable_thinking": false}."""
    max_new_tokens: int = 50
    """Tokens of a continuation."""
    temperature: float = 1.0
    """Of sampling."""
    judge_url: str | None = simple_parsing.field(default=None, type=text_or_none, metavar="URL")
    """OpenAI-compatible endpoint of a judging model, whose key is in OPENAI_API_KEY. By default the judge is offline: a
    sentence-embedding model and the model's own likelihoods."""
    judge_model: str | None = simple_parsing.field(default=None, type=text_or_none, metavar="NAME")
    """The judging model at the endpoint."""


def _pairs(text: str) -> tuple[tuple[float | int, ...], ...]:
    return tuple(tuple(number(part) for part in str(item).split(":")) for item in items(text))


@dataclass(kw_only=True)
class ClusterInputs(EmbeddedInputs):
    """What is clustered and steered."""

    prefixes: str | None = simple_parsing.field(default=None, type=text_or_none, metavar="FILE")
    """A JSON list or lines of texts and conversations (lists of messages); at least 6, and 10 for a claim."""
    second_embedder: str | None = simple_parsing.field(default=None, type=text_or_none, metavar="NAME")
    """Another one, whose clusters are compared with the first one's."""
    cells: Any = simple_parsing.field(default=(), type=_pairs, metavar="B:G[,B:G…]")
    """Pairs of beta and gamma, such as 1.5:0.5,2:0.3; by default 2:0.5. The verdict is on their mean."""
    clusterings: bool = True
    """Also judge the clusterings themselves on held-out continuations, at the same betas and gammas."""


@dataclass(kw_only=True)
class SupernodeInputs(SubjectInputs):
    """What is attributed."""

    swaps: str | None = simple_parsing.field(default=None, type=text_or_none, metavar="FILE")
    """JSONL file of prompts, at least 6: prompt, first and second in each line, two names of one token each that are in
    the prompt once, in that order."""


def _settings(name: str, function: Callable[..., Any], about: str, leave_out: Sequence[str] = ()) -> type:
    """A dataclass of the keyword options of a function that can be written on a command line, with their docstrings."""
    helps = _explained(inspect.getdoc(function) or "")
    made = []
    for option in inspect.signature(function).parameters.values():
        default = option.default
        if option.name in ("progress", *leave_out) or default is option.empty or default is None:
            continue
        kind = float if "float" in str(option.annotation) else type(default)
        made.append(as_option(option.name, kind, default, helps.get(option.name, "")))
    return dataclasses.make_dataclass(name, made, kw_only=True, namespace={"__doc__": about, "__module__": __name__})


def _explained(docstring: str) -> dict[str, str]:
    """What a docstring says of each argument, on one line."""
    found = {}
    for argument in docstring_parser.parse(docstring).params:
        sentence = " ".join((argument.description or "").replace("`", "").split())
        sentence = re.sub(r":(?:class|func|meth):~?", "", sentence)
        found[argument.arg_name] = sentence[:1].upper() + sentence[1:]
    return found


StabilitySettings = _settings("StabilitySettings", dictionary_stability, "How replicas are compared.")
CheckpointSettings = _settings("CheckpointSettings", compare_checkpoints, "How the models' replicas are compared.")
OverlapSettings = _settings("OverlapSettings", overlap_by_tokens, "How overlap is judged.")
DecompositionSettings = _settings("DecompositionSettings", decompose_dictionary, "How directions are taken apart.")
NestingSettings = _settings("NestingSettings", partition_nesting, "How nesting is judged.")
ModelSettings = _settings("ModelSettings", compare_models, "How the models are compared.")
BehaviourSettings = _settings("BehaviourSettings", ablate_behaviour, "How ablations are judged.")
_WORK = ("n_workers", "workers")  # of `WorkInputs`
DetectionSettings = _settings("DetectionSettings", evaluate_detection, "How methods are judged.", _WORK)
ProbeSettings = _settings("ProbeSettings", evaluate_probes, "How probes are judged.", _WORK)
NoveltySettings = _settings("NoveltySettings", evaluate_novelty, "How novelty is judged.", ("outside",))
ClusterSettings = _settings("ClusterSettings", evaluate_clusters, "What is compared.", ("cells", "audit", "generate"))
SupernodeSettings = _settings("SupernodeSettings", evaluate_supernodes, "How latents are grouped.", ("audit",))
SteeringSettings = _settings("SteeringSettings", compare_steering, "How methods are compared.", ("options", *_WORK))
SyntheticSettings = _settings("SyntheticSettings", evaluate_on_synthetic, "What is fitted and how it is judged.")
