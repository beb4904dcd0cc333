"""A dictionary as the live page shows it, with what lies beside it."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sae_lens import SAE
from transformers import PreTrainedTokenizerBase

from saelens_ext.analysis.labels import Labels
from saelens_ext.analysis.logit_lens import LensResult
from saelens_ext.analysis.profile import DictionaryProfile
from saelens_ext.analysis.show import LatentView
from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from saelens_ext.host.flat_sae import hooks_of, refuse_sequence_codes


@dataclass(frozen=True, kw_only=True, eq=False)
class Served:
    """A dictionary, and what is known about its latents."""

    name: str
    """What the page calls it."""
    sae: SAE[Any]
    """Any SAELens SAE or transcoder, under the hook names of the model."""
    profile: DictionaryProfile | None = None
    """What its latents respond to."""
    labels: Labels | None = None
    """What they could be called."""
    lens: LensResult | None = None
    """The tokens that their directions promote."""

    def __post_init__(self) -> None:
        refuse_sequence_codes(self.sae)
        hooks_of(self.sae, f"The dictionary {self.name}")
        sizes = {"profile": self.profile, "labels": self.labels}
        found = {name: one.d_sae for name, one in sizes.items() if one is not None}
        found |= {} if self.lens is None else {"lens": len(self.lens.promoted_ids)}
        wrong = [f"the {name} {n}" for name, n in found.items() if n != self.d_sae]
        if wrong:
            raise ValueError(f"The dictionary {self.name} has {self.d_sae} latents, {', '.join(wrong)}: make it again.")

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return int(self.sae.cfg.d_sae)

    @property
    def partition(self) -> ExemplarPartition | None:
        """The dictionary itself where its latents are regions."""
        return self.sae if isinstance(self.sae, ExemplarPartition) else None

    @property
    def noun(self) -> str:
        """What a latent is called."""
        return "latent" if self.partition is None else "region"

    @cached_property
    def _folded(self) -> list[str]:
        return [self.label(latent)["text"].casefold() for latent in range(self.d_sae)]

    def check(self, latent: Any) -> int:
        """A latent's number; ValueError for what is none."""
        if isinstance(latent, bool) or not isinstance(latent, int) or not 0 <= latent < self.d_sae:
            raise ValueError(
                f"{self.noun.capitalize()} {latent!r} is not in {self.name}; its {self.noun}s are 0 to "
                f"{self.d_sae - 1}."
            )
        return latent

    def label(self, latent: int) -> dict[str, Any]:
        """A latent's label, empty where it has none, and whether it does better than chance."""
        if self.labels is None:
            return {"text": "", "sure": False}
        found = self.labels[latent]
        return {"text": found.text, "sure": found.distinguishes}

    def find(self, query: str, n: int) -> list[int]:
        """The first latents whose label has all words of a query, or whose number it is; all where it is empty."""
        query = query.strip().casefold()
        if query.isdecimal() and int(query) < self.d_sae:
            return [int(query)]
        words = query.split()
        matching = (i for i, text in enumerate(self._folded) if all(word in text for word in words))
        return [latent for latent, _ in zip(matching, range(n))]

    def show(self, latent: int, tokenizer: PreTrainedTokenizerBase, n: int = 8) -> LatentView | None:
        """What is known of a latent; None without a profile."""
        latent = self.check(latent)
        if self.profile is None:
            return None
        return self.profile.show(latent, tokenizer, n, labels=self.labels, lens=self.lens)
