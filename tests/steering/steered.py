"""Steering as a user composes it: a direction added inside a context, and texts sampled there."""

from saelens_ext.steering.interventions import add_direction, latent_directions
from saelens_ext.steering.sampling import SamplingOptions, sample_texts


def sample_steered(model, prompts, hook_name, direction, coefficient, *, n, batch_size=32, **options):
    """Texts sampled while a multiple of a direction is added."""
    with add_direction(model, hook_name, direction, coefficient):
        return sample_texts(model, prompts, n=n, options=SamplingOptions(**options), batch_size=batch_size)


def along_latent(model, sae, latent, strength):
    """The intervention that adds a latent's direction, in units of the recorded norm where there is one."""
    hook_name, direction, norm = latent_directions(model, sae, latent)
    return add_direction(model, hook_name, direction, strength * (norm or 1.0))
