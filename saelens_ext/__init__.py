"""Feature dictionaries made from observed activations, as SAELens SAEs.

Importing the package registers its architectures, after which ``SAE.load_from_disk``, ``SAE.from_pretrained`` and
``SAE.from_dict`` return its classes.
"""

from sae_lens import SAE, SAEConfig, register_sae_class
from sae_lens.registry import SAE_CLASS_REGISTRY

from saelens_ext.activations import ActivationBatch, ActivationStream
from saelens_ext.concepts import Detector, concept_scores
from saelens_ext.dictionaries.exemplar_partition import Assignment, ExemplarPartition, ExemplarPartitionConfig
from saelens_ext.dictionaries.fit_exemplars import FitResult, fit_exemplar_partition, fit_exemplar_partitions
from saelens_ext.dictionaries.fit_hierarchy import fit_hierarchical_snmf
from saelens_ext.dictionaries.fit_sae import fit_sae
from saelens_ext.dictionaries.fit_snmf import fit_snmf
from saelens_ext.dictionaries.hierarchy import HierarchicalSNMF
from saelens_ext.dictionaries.profile import DictionaryProfile, profile_dictionaries, profile_dictionary
from saelens_ext.dictionaries.snmf import SNMFDictionary, SNMFDictionaryConfig
from saelens_ext.dictionaries.snmf_fit_result import SNMFFitResult
from saelens_ext.diff_means import diff_means
from saelens_ext.interventions import ablate_directions, add_direction, clamp_latent, scale_latent, steer_with
from saelens_ext.judges import EmbeddingJudge, Judge, JudgeScore
from saelens_ext.judges_http import OpenAIJudge
from saelens_ext.lens import logit_lens
from saelens_ext.mlp_output import residual_directions
from saelens_ext.models import load_model, retarget
from saelens_ext.neuron_effect import neuron_group_effect
from saelens_ext.neuron_overlap import core_and_exclusive_neurons, neuron_overlap
from saelens_ext.ops.leader_clustering import LeaderClustering
from saelens_ext.report.dictionary_report import write_dictionary_report
from saelens_ext.report.snmf_section import SNMFLevel, SNMFSection
from saelens_ext.sampling import SamplingOptions, sample_steered
from saelens_ext.steered_features import steer_features
from saelens_ext.steering_score import steering_score
from saelens_ext.steering_strength import match_strength

__version__ = "0.1.0"

__all__ = [
    "ActivationBatch",
    "ActivationStream",
    "Assignment",
    "Detector",
    "DictionaryProfile",
    "EmbeddingJudge",
    "ExemplarPartition",
    "ExemplarPartitionConfig",
    "FitResult",
    "HierarchicalSNMF",
    "Judge",
    "JudgeScore",
    "LeaderClustering",
    "OpenAIJudge",
    "SNMFDictionary",
    "SNMFDictionaryConfig",
    "SNMFFitResult",
    "SNMFLevel",
    "SNMFSection",
    "SamplingOptions",
    "ablate_directions",
    "add_direction",
    "clamp_latent",
    "concept_scores",
    "core_and_exclusive_neurons",
    "diff_means",
    "fit_exemplar_partition",
    "fit_exemplar_partitions",
    "fit_hierarchical_snmf",
    "fit_sae",
    "fit_snmf",
    "load_model",
    "logit_lens",
    "match_strength",
    "neuron_group_effect",
    "neuron_overlap",
    "profile_dictionaries",
    "profile_dictionary",
    "residual_directions",
    "retarget",
    "sample_steered",
    "scale_latent",
    "steer_features",
    "steer_with",
    "steering_score",
    "write_dictionary_report",
]


def _register(architecture: str, sae_class: type[SAE], config_class: type[SAEConfig]) -> None:
    """Register with SAELens; a second import or a notebook's reload of the same class is fine."""
    known = SAE_CLASS_REGISTRY.get(architecture)
    if known is None:
        register_sae_class(architecture, sae_class, config_class)
    elif (known[0].__module__, known[0].__qualname__) == (sae_class.__module__, sae_class.__qualname__):
        SAE_CLASS_REGISTRY[architecture] = (sae_class, config_class)
    else:
        raise ValueError(
            f"SAELens already knows the architecture {architecture!r} as {known[0].__module__}.{known[0].__qualname__}, "
            "registered by another package; saelens_ext cannot be used beside it in one process."
        )


_register("exemplar_partition", ExemplarPartition, ExemplarPartitionConfig)
_register("snmf", SNMFDictionary, SNMFDictionaryConfig)
