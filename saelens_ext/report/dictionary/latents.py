"""The part of a report about the latents of any SAELens SAE: what each responds to, whoever made it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from saelens_ext.dictionaries.architecture_names import plain_name
from saelens_ext.host.tokens import token_strings
from saelens_ext.report.dictionary.evaluation import evaluation_rows
from saelens_ext.report.dictionary.features import latent_columns, latent_map, of_rows
from saelens_ext.report.dictionary.regions import Vocabulary, token_ids
from saelens_ext.report.dictionary.snmf_section import ProfiledDictionary
from saelens_ext.report.dictionary.summary import active_fact, excluded, hook_fact, model_fact, read_from
from saelens_ext.report.format import Fact, count
from saelens_ext.report.page import embed_json

MAX_LATENTS = 3000
"""Latents shown, those active most often; the page says so."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentSection(ProfiledDictionary):
    """A dictionary of which no fit is known; ValueError if the profile, the lens or the labels are of another one."""

    evals: Mapping[str, Any] | None = None
    """What ``sae_lens.evals.run_evals`` gave for it."""

    def __post_init__(self) -> None:
        self.check_sizes()
        if self.labels is not None:
            self.labels.check_belongs(self.profile)


def latent_part(section: LatentSection, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the template shows of the latents."""
    return {
        "heading": "Features",
        "lead": _lead(section),
        "facts": _facts(section),
        "evaluation": [] if section.evals is None else evaluation_rows(section.evals),
        "levels": [],
        "plots": [],
        "has_tree": False,
        "steered": None,
        "concept": None,
        "data": embed_json(_data(section, tokenizer)),
    }


def _lead(section: LatentSection) -> str:
    config = section.dictionary.cfg
    out = config.metadata.hook_name_out
    made = f"predicts the activation at {out}" if out and out != config.metadata.hook_name else "reconstructs it"
    return (
        f"This dictionary ({plain_name(config.architecture())}) encodes an activation of width {count(config.d_in)} "
        f"into {count(config.d_sae)} features, and {made} from those that are active. How it was made is not recorded "
        "beside it; shown is what its features respond to."
    )


def _facts(section: LatentSection) -> list[Fact]:
    config, profile = section.dictionary.cfg, section.profile
    metadata: dict[str, Any] = config.metadata.to_dict()
    cut = f"; shown are the {count(MAX_LATENTS)} active most often" if config.d_sae > MAX_LATENTS else ""
    return [
        model_fact(metadata),
        hook_fact(str(metadata.get("hook_name") or profile.hook_name), config.d_in, metadata),
        Fact("seen", "Activations profiled", count(profile.n_activations), read_from(metadata)),
        Fact("excluded", "Excluded", *excluded(metadata)),
        Fact("features", "Features", count(config.d_sae), f"architecture {plain_name(config.architecture())}{cut}"),
        active_fact(profile),
    ]


def _data(section: LatentSection, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    profile, lens, k = section.profile, section.lens, section.dictionary.cfg.d_sae
    rows = profile.counts.argsort(descending=True, stable=True)[:MAX_LATENTS].sort().values
    lens = None if lens is None else of_rows(lens, rows)
    vocabulary = Vocabulary(token_ids(of_rows(profile.top, rows), lens))
    return {
        "n_profiled": profile.n_activations,
        "context": [profile.context],
        "width": section.dictionary.cfg.d_in,
        "sizes": [len(rows)],
        "last": k - 1,
        "level": [0] * len(rows),
        "index": rows.tolist(),
        "vocabulary": token_strings(tokenizer, vocabulary.token_ids),
        "distances": profile.max_distance is not None,
        "neurons": None,
        "overlaps": None,
        "steered": None,
        **latent_map(section.dictionary, rows),
        **latent_columns(section, vocabulary, rows),
    }
