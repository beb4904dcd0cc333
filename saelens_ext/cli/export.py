"""``export``: what steers with a latent here, as a file that other runtimes read."""

from dataclasses import dataclass

from saelens_ext.cli import opening
from saelens_ext.cli.errors import UsageError
from saelens_ext.cli.options import ReadingOptions
from saelens_ext.cli.output import Context, Result
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
    ((dictionary, _), *others) = opening.dictionaries_in(contents, options.dictionary)
    if others:
        raise ValueError(f"{options.dictionary} is a hierarchy; give one level, {options.dictionary}/level_0 for one.")
    model = opening.open_model(opening.reading_config(contents, dictionary, options, hook_name="unread"))
    dictionary = opening.attach(dictionary, model)
    hook_name, direction, norm = latent_directions(model, dictionary, how.latent, basis=how.basis)
    if how.coefficient is None and norm is None:
        raise UsageError(
            f"{options.dictionary} does not record how large activations are at {hook_name}: --coefficient=NUMBER."
        )
    coefficient = how.coefficient if how.coefficient is not None else 0.5 * norm
    path = export_direction(model, hook_name, direction, coefficient, how.output_path)
    data = {"path": path, "hook_name": hook_name, "latent": how.latent, "coefficient": coefficient}
    return Result(data=data, text=f"{coefficient:.4g} of latent {how.latent} at {hook_name}: {path}")
