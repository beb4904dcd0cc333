"""Options of the commands that have no config of their own. Nothing here takes time to import."""
# ruff: noqa: RUF009  `field`, `choice` and `place` make fields.

from dataclasses import dataclass
from typing import Any

from simple_parsing import choice, field

DEMO = "demo"
"""As the name of a model or a dataset: those of :mod:`saelens_ext.demo`."""


def place(metavar: str) -> Any:
    """A field that is given by its place on the command line."""
    return field(positional=True, type=str, metavar=metavar)


@dataclass(kw_only=True)
class OutputOptions:
    """How results and failures are told. Results go to stdout, all else to stderr."""

    json: bool = False
    """Print the result as one JSON object."""
    quiet: bool = False
    """Only warnings and errors on stderr, no progress."""
    debug: bool = False
    """Show where an error comes from, and more of what happens."""


@dataclass(kw_only=True)
class ReadingOptions:
    """What to read. What is not given is as when the dictionary was built, if its folder says so."""

    dictionary: str = place("FOLDER")
    """Folder of a saved dictionary, any that SAELens loads."""
    model_name: str | None = None
    """Hugging Face name of the model, the folder of a saved one, or demo."""
    model_class_name: str | None = None
    """SAETransformerBridge, HookedTransformer or AutoModelForCausalLM."""
    model_from_pretrained_kwargs: str | None = field(default=None, type=str, metavar="JSON")
    """Passed to the model's loader: '{"dtype": "bfloat16"}'."""
    dataset_path: str | None = None
    """Hugging Face name of a dataset, a file or folder of data, or demo."""
    text_column: str | None = None
    """Column of the documents."""
    context_size: int | None = None
    """Tokens in a window."""
    store_batch_size_prompts: int | None = None
    """Windows in a forward pass."""
    device: str = "auto"
    """Where to compute: auto (CUDA where there is one, else MPS, else the CPU) or a device of torch."""


@dataclass(kw_only=True)
class ProfileOptions:
    """What to gather."""

    training_tokens: int | None = None
    """Activations to read; by default those that the dictionary was built from, or 200000."""
    n_examples: int = 10
    """Examples of each latent."""
    n_boundary: int = 5
    """Farthest members of each region."""
    context: int = 16
    """Tokens on either side of an example."""


@dataclass(kw_only=True)
class EvalOptions:
    """How much to evaluate on."""

    n_eval_batches: int = 10
    """Batches of windows."""
    eval_batch_size_prompts: int | None = None
    """Windows in a batch; by default store_batch_size_prompts."""
    save: bool = True
    """Write the figures to evals.json in the dictionary's folder."""


@dataclass(kw_only=True)
class ReportOptions:
    """What to report on."""

    dictionary: str = place("FOLDER")
    """Folder of a saved dictionary with its profile, any that SAELens loads, or of a hierarchy of SNMF dictionaries
    with a profile in each level's folder; or repo_id:sae_id on the Hub, or release:sae_id of SAELens, which is profiled
    if no profile lies beside it.
    """
    html: str | None = field(default=None, type=str, metavar="FILE")
    """Where to write it; by default report.html in the folder, or here for what is not in a folder."""
    title: str | None = None
    """Heading; by default the hook and the model."""
    compare: Any = field(default_factory=list, action="append", type=str, metavar="FOLDER")
    """Another dictionary of the same hook, by its folder or name: the directions of the first are matched with this
    one's, and the growth of partitions is shown beside this one's; may be repeated.
    """
    model_name: str | None = None
    """Hugging Face name of the model, the folder of a saved one, or demo; by default the one it was built on."""
    model_class_name: str | None = None
    """SAETransformerBridge or HookedTransformer."""
    dataset_path: str | None = None
    """What to profile a dictionary on that has no profile; by default as it was built from."""
    training_tokens: int | None = None
    """Activations to profile such a dictionary on, 200000 by default."""
    labels: bool = True
    """Label latents by their contexts where no labels are saved beside the profile."""
    lens: bool = True
    """Show the tokens that directions promote. Without it only the model's tokenizer is loaded."""
    device: str = "auto"
    """Where to compute: auto (CUDA where there is one, else MPS, else the CPU) or a device of torch."""


@dataclass(kw_only=True)
class MatchOptions:
    """What to match."""

    first: str = place("FIRST")
    """Folder of a saved dictionary, or repo_id:sae_id on the Hub."""
    second: str = place("SECOND")
    """The other."""
    center: str = choice("own", "shared", default="own")
    """Compare directions each about its own origin, or about the mean of the two."""
    null: str = choice("directions", "rotation", default="directions")
    """What chance is: random directions of the same covariance, or the dictionary turned at random."""
    level: float = 0.99
    """Share of chance's best cosines that the cutoff is above."""
    n_null: int | None = None
    """Made-up dictionaries of either side; by default as many as give 1000 cosines."""
    seed: int = 0
    """Of chance."""
    csv: str | None = field(default=None, type=str, metavar="FILE")
    """Write one row per latent of either dictionary."""


@dataclass(kw_only=True)
class ConvertOptions:
    """What to convert."""

    source: str = place("SOURCE")
    """A .pkl file, or a build of the published dataset such as gemma-2-2b_L12_p10."""
    output_path: str = place("OUTPUT")
    """Folder to write."""
    hook_name: str | None = None
    """Where the activations came from; by default as the file or its name says."""
    model_name: str | None = None
    """Which model; by default as the file or its name says."""
    percentile: float | None = None
    """Of the threshold; by default as the file or its folder says."""
    sha256: str | None = None
    """Checksum that the file must have; a downloaded file is held to the Hub's anyway."""
    revision: str | None = None
    """Commit of the published dataset, 40 hexadecimal digits; by default the one that was checked."""
    max_bytes: int | None = None
    """Refuse larger files; by default 8 GiB."""
    reservoir: bool = False
    """Convert the sampled members too."""


@dataclass(kw_only=True)
class PushOptions:
    """What to push, and where to."""

    dictionary: str = place("FOLDER")
    """Folder of a saved dictionary; its profile, statistics, config and report go along."""
    repo_id: str = place("REPO_ID")
    """Repository, owner/name; made if it does not exist."""
    sae_id: str = place("SAE_ID")
    """Folder in it."""
    private: bool = False
    """Make a new repository private."""
    revision: str | None = None
    """Branch; made if it does not exist."""
    license: str | None = None
    """For the card, such as mit."""
    base_model: str | None = None
    """The model's name on the Hub; by default as the dictionary says."""
    report: str | None = field(default=None, type=str, metavar="FILE")
    """Another HTML report than the folder's."""
    message: str | None = None
    """Of the commit."""
    token: str | None = None
    """By default the one of `hf auth login` or HF_TOKEN, where other users of this machine cannot see it."""


@dataclass(kw_only=True)
class ListOptions:
    """Where to look."""

    repo_id: str = place("REPO_ID")
    """Repository, owner/name."""
    revision: str | None = None
    """Branch, tag or commit; by default main."""
    token: str | None = None
    """By default the one of `hf auth login` or HF_TOKEN, where other users of this machine cannot see it."""


@dataclass(kw_only=True)
class PullOptions(ListOptions):
    """What to pull, and where to."""

    sae_id: str = place("SAE_ID")
    """Folder in it."""
    output_path: str = place("FOLDER")
    """Where to put it; holds no other dictionary."""


@dataclass(kw_only=True)
class DemoOptions:
    """What the demo does."""

    output_path: str = "demo_output"
    """Folder to write."""
    max_tokens: int = 12_000
    """Activations to build from."""
