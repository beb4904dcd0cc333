"""``export`` and ``neuronpedia``: dictionaries for other runtimes and viewers."""

from dataclasses import asdict, dataclass

from simple_parsing import field

from saelens_ext.cli import opening
from saelens_ext.cli.errors import UsageError
from saelens_ext.cli.options import ReadingOptions
from saelens_ext.cli.output import Context, Result
from saelens_ext.cli.report import lens_of
from saelens_ext.host.models import tokenizer_of
from saelens_ext.hub.neuronpedia import push_to_neuronpedia
from saelens_ext.steering.export import export_direction
from saelens_ext.steering.interventions import latent_directions


@dataclass(kw_only=True)
class ExportOptions:
    """What to write."""

    output_path: str
    """File to write: .gguf for llama.cpp and repeng, or .safetensors."""
    latent: int
    """Which latent's direction."""
    coefficient: float | None = None
    """How much of the direction the file adds at scale 1, in units of the activations; by default half their typical
    norm, where the dictionary records it.
    """
    basis: str | None = None
    """exemplar or mean, of an exemplar partition; by default the dictionary's own."""


def export(options: ReadingOptions, how: ExportOptions, context: Context) -> Result:
    """Write the direction of a latent as a control vector."""
    contents = opening.open_contents(options.dictionary, options.device)
    dictionary = opening.only_dictionary(contents, options.dictionary)
    model = opening.open_model(opening.reading_config(contents, dictionary, options, hook_name="unread"))
    dictionary = opening.attach(dictionary, model)
    hook_name, direction, norm = latent_directions(model, dictionary, how.latent, basis=how.basis)
    coefficient = how.coefficient
    if coefficient is None:
        if norm is None:
            raise UsageError(
                f"{options.dictionary} does not record how large activations are at {hook_name}: --coefficient=NUMBER."
            )
        coefficient = 0.5 * norm
    path = export_direction(model, hook_name, direction, coefficient, how.output_path)
    data = {"path": path, "hook_name": hook_name, "latent": how.latent, "coefficient": coefficient}
    return Result(data=data, text=f"{coefficient:.4g} of latent {how.latent} at {hook_name}: {path}")


@dataclass(kw_only=True)
class NeuronpediaOptions:
    """What it is called there."""

    model_id: str | None = None
    """The model's name on Neuronpedia, such as gpt2-small; by default as metadata.neuronpedia_id says."""
    source: str | None = None
    """Layer and set, such as 6-res-ep; the set must exist there."""
    dry_run: str | None = field(default=None, type=str, metavar="FOLDER")
    """Write the batches into a folder and send nothing."""


def neuronpedia(options: ReadingOptions, how: NeuronpediaOptions, context: Context) -> Result:
    """Upload a profiled dictionary with its labels, or write what would be sent."""
    contents = opening.read_folder(options.dictionary)
    dictionary = opening.only_dictionary(contents, options.dictionary)
    if contents.profile is None:
        raise ValueError(f"{options.dictionary} holds no profile: make it with `saelens-ext profile`.")
    recorded = str(dictionary.cfg.metadata.neuronpedia_id or "/").partition("/")
    model_id, source = how.model_id or recorded[0], how.source or recorded[2]
    if not model_id or not source:
        raise UsageError("Neuronpedia's names are not known: --model_id=gpt2-small --source=6-res-ep, for example.")
    model = opening.open_model(opening.reading_config(contents, dictionary, options, hook_name="unread"))
    sent = push_to_neuronpedia(
        contents.profile,
        tokenizer_of(model),
        model_id,
        source,
        lens=lens_of(model, opening.attach(dictionary, model)),
        labels=contents.labels,
        state=options.dictionary,
        dry_run=how.dry_run,
        progress=context.progress,
    )
    done = f"written to {how.dry_run}" if how.dry_run else f"sent to {sent.url}"
    return Result(data=asdict(sent), text=f"{sent.n_features} features in {sent.n_batches} batches {done}")
