"""What a report is told of the latents of any dictionary, and of SNMF dictionaries."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sae_lens import SAE

from saelens_ext.analysis.labels import Labels
from saelens_ext.analysis.logit_lens import LensResult
from saelens_ext.analysis.profile import DictionaryProfile
from saelens_ext.concepts.comparison import ConceptComparison
from saelens_ext.dictionaries.hierarchy import HierarchicalSNMF
from saelens_ext.dictionaries.snmf import SNMFDictionary
from saelens_ext.dictionaries.snmf_fit_result import SNMFFitResult
from saelens_ext.steering.steer_features import SteeredFeatures


@dataclass(frozen=True, kw_only=True, eq=False)
class ProfiledDictionary:
    """A dictionary with what is known of its latents."""

    dictionary: SAE[Any]
    """Any SAELens SAE or transcoder, k latents."""
    profile: DictionaryProfile
    """Of the dictionary."""
    lens: LensResult | None = None
    """The logit lens of its directions, k rows; None where they are not in the residual stream."""
    labels: Labels | None = None
    """Of the profile."""

    def check_sizes(self, which: str = "") -> None:
        """ValueError if the profile or the lens is of another dictionary; ``which`` says of which one."""
        k = self.dictionary.cfg.d_sae
        if self.profile.d_sae != k:
            raise ValueError(
                f"The profile{which} is of {self.profile.d_sae} latents, its dictionary of {k}; make it with "
                "profile_dictionary or profile_dictionaries."
            )
        if self.lens is not None and len(self.lens.promoted_ids) != k:
            raise ValueError(
                f"The lens{which} is of {len(self.lens.promoted_ids)} directions, its dictionary of {k}; make it with "
                "logit_lens of its directions, such as an SNMFDictionary's residual_directions."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class SNMFLevel(ProfiledDictionary):
    """One dictionary of the section: the only one, or a level of a hierarchy."""

    dictionary: SNMFDictionary
    held_out_loss: float | None = None
    """Squared error over the sum of squares of activations that it was not fitted to."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SNMFSection:
    """The part of a report about features of SNMF dictionaries.

    With ``fit`` alone the section is about its dictionary. With ``hierarchy`` it is about the hierarchy's levels and
    their trees, and ``fit``, if given, is a dictionary without a tree to compare with.

    Raises:
        ValueError: parts that are not of the same dictionaries, or neither a fit nor a hierarchy.
    """

    levels: Sequence[SNMFLevel]
    """The finest first: one, or all of the hierarchy."""
    fit: SNMFFitResult | None = None
    hierarchy: HierarchicalSNMF | None = None
    steered: SteeredFeatures | None = None
    """Continuations steered along features of the first level."""
    concept: ConceptComparison | None = None
    """How well a feature of the first level, and other methods, detect a concept."""

    @property
    def made(self) -> SNMFFitResult | HierarchicalSNMF:
        """What made the levels: the hierarchy, or else the fit."""
        made = self.fit if self.hierarchy is None else self.hierarchy
        if made is None:
            raise ValueError("An SNMFSection needs a fit or a hierarchy, which say how its dictionaries were made.")
        return made

    def __post_init__(self) -> None:
        own, made = [level.dictionary for level in self.levels], self.made
        if isinstance(made, HierarchicalSNMF):
            source, expected = "hierarchy.dictionaries", made.dictionaries
        else:
            source, expected = "fit.dictionary", [made.dictionary]
        if len(own) != len(expected) or any(a is not b for a, b in zip(own, expected, strict=True)):
            raise ValueError(
                f"levels must be of the dictionaries of {source}, {len(expected)} in this order; got {len(own)} others."
            )
        for number, level in enumerate(self.levels):
            level.check_sizes(f" of level {number}")
        k = self.levels[0].dictionary.cfg.d_sae
        steered = [] if self.steered is None else [text.feature for text in self.steered.texts]
        if wrong := [feature for feature in steered if not 0 <= feature < k]:
            raise ValueError(
                f"The continuations are of features such as {wrong[0]}, the first level has features 0 to {k - 1}."
            )
