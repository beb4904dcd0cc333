"""How clusters are tested by steering."""

from collections.abc import Sequence
from dataclasses import dataclass

from saelens_ext import _checks
from saelens_ext.continuations.steering.latents import SIGNS
from saelens_ext.continuations.steering.steer import checked_strengths
from saelens_ext.continuations.validation.methods import EXTRA

REPRESENTATIVES = ("medoid", "center", "contrast")

VALIDATION_STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0)
"""The published strengths without the smallest, which cost as much as the others and say least."""


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """Which directions ``validate_clusters`` steers along, how far, and how their effects are compared.

    Raises:
        ValueError: a value out of range.
    """

    direction: str = "medoid"
    """What stands for a cluster, for all methods alike: the signature of its ``"medoid"``, its ``"center"`` (weighted
    median of the signatures), or ``"contrast"``, the medoid minus the median of all."""
    top: int = 10
    """Latents to scale at most."""
    sign: str = "all"
    """Latents of ``"all"`` weights, or of ``"positive"`` or ``"negative"`` ones alone."""
    strengths: Sequence[float | int] = VALIDATION_STRENGTHS
    """eps, two or more; 0 is measured in any case."""
    held_out: float | int = 0.5
    """Fraction of each cluster's members to measure on, in (0, 1); at least one member, and not all."""
    max_rows: int = 32
    """Members to measure at most, one from each cluster in rotation. Cost grows with it, with the strengths and the
    methods: about 8 forward rows for each member and strength."""
    controls: Sequence[str] = ()
    """Further controls, of ``"coherent_semantic"`` and ``"coherent_attribution"`` (tight k-means clusters of one view
    with the sizes of the clusters under test; see ``further``), ``"length"`` (clusters by number of tokens) and
    ``"top_activation"`` (the most active latents)."""
    n_bootstrap: int = 2000
    """Resamples for intervals."""
    n_permutations: int = 10000
    """Sign flips for p-values."""
    seed: int = 0
    """Of the split, the controls and the resampling."""

    def __post_init__(self) -> None:
        if len(checked_strengths(self.strengths)) < 2:
            raise ValueError(f"A dose-response needs two strengths or more, got {self.strengths!r}.")
        _checks.choice(self.direction, REPRESENTATIVES, "direction")
        _checks.choice(self.sign, SIGNS, "sign")
        _checks.between(self.held_out, 0, 1, "held_out")
        checked_controls(self.controls, "controls")
        for name in ("top", "max_rows", "n_bootstrap", "n_permutations"):
            _checks.positive(getattr(self, name), name)


def checked_controls(controls: Sequence[str], name: str) -> tuple[str, ...]:
    """Names of further controls; ValueError for another name, or one twice."""
    found = tuple(_checks.choice(control, EXTRA, name) for control in controls)
    if len(set(found)) < len(found):
        raise ValueError(f"{name} must name each control once, got {list(controls)}.")
    return found
