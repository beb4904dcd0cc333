"""Feature dictionaries made from observed activations, as SAELens SAEs.

Importing the package registers its architectures, after which ``SAE.load_from_disk``, ``SAE.from_pretrained`` and
``SAE.from_dict`` return its classes.
"""

from saelens_ext.activations.stream import ActivationBatch, ActivationStream
from saelens_ext.analysis.logit_lens import logit_lens
from saelens_ext.analysis.match import match_dictionaries
from saelens_ext.analysis.neuron_effect import neuron_group_effect
from saelens_ext.analysis.neuron_overlap import core_and_exclusive_neurons, neuron_overlap
from saelens_ext.analysis.profile import DictionaryProfile, profile_dictionaries, profile_dictionary
from saelens_ext.audit.audit import Audit, AuditConfig, audit_continuations
from saelens_ext.concepts.comparison import compare_detection
from saelens_ext.concepts.detection import Detector, concept_scores
from saelens_ext.concepts.diff_means import diff_means
from saelens_ext.continuations.attribution.attribute import attribute_continuations
from saelens_ext.continuations.clustering.joint_clusterer import JointClusterer
from saelens_ext.continuations.clustering.path import rate_distortion_path
from saelens_ext.continuations.continuation_set import ContinuationSet
from saelens_ext.continuations.embed import embed_continuations
from saelens_ext.continuations.sample import sample_continuations
from saelens_ext.continuations.steering.steer import steer_continuations
from saelens_ext.continuations.validation.validate import validate_clusters
from saelens_ext.dictionaries.exemplar_partition import Assignment, ExemplarPartition, ExemplarPartitionConfig
from saelens_ext.dictionaries.fit_exemplars import FitResult, fit_exemplar_partition, fit_exemplar_partitions
from saelens_ext.dictionaries.fit_hierarchy import fit_hierarchical_snmf
from saelens_ext.dictionaries.fit_sae import fit_sae
from saelens_ext.dictionaries.fit_snmf import fit_snmf
from saelens_ext.dictionaries.hierarchy import HierarchicalSNMF
from saelens_ext.dictionaries.registering import register as _register
from saelens_ext.dictionaries.snmf import SNMFDictionary, SNMFDictionaryConfig
from saelens_ext.dictionaries.snmf_fit_result import SNMFFitResult
from saelens_ext.host.mlp_output import residual_directions
from saelens_ext.host.models import load_model, retarget
from saelens_ext.hub import load_from_hub, push_to_hub
from saelens_ext.ops.leader_clustering import LeaderClustering
from saelens_ext.published.convert import convert_published_dictionary
from saelens_ext.report.dictionary.dictionary_report import write_dictionary_report
from saelens_ext.report.dictionary.snmf_section import SNMFLevel, SNMFSection
from saelens_ext.runner.config import DictionaryRunnerConfig, ExemplarRunnerConfig, SNMFRunnerConfig
from saelens_ext.runner.runner import DictionaryRunner
from saelens_ext.steering.interventions import ablate_directions, add_direction, clamp_latent, scale_latent, steer_with
from saelens_ext.steering.judges import EmbeddingJudge, Judge, JudgeScore
from saelens_ext.steering.openai_judge import OpenAIJudge
from saelens_ext.steering.sampling import SamplingOptions, sample_steered
from saelens_ext.steering.score import steering_score
from saelens_ext.steering.steer_features import steer_features
from saelens_ext.steering.strength import match_strength

__version__ = "0.1.0"

__all__ = [
    "ActivationBatch",
    "ActivationStream",
    "Assignment",
    "Audit",
    "AuditConfig",
    "ContinuationSet",
    "Detector",
    "DictionaryProfile",
    "DictionaryRunner",
    "DictionaryRunnerConfig",
    "EmbeddingJudge",
    "ExemplarPartition",
    "ExemplarPartitionConfig",
    "ExemplarRunnerConfig",
    "FitResult",
    "HierarchicalSNMF",
    "JointClusterer",
    "Judge",
    "JudgeScore",
    "LeaderClustering",
    "OpenAIJudge",
    "SNMFDictionary",
    "SNMFDictionaryConfig",
    "SNMFFitResult",
    "SNMFLevel",
    "SNMFRunnerConfig",
    "SNMFSection",
    "SamplingOptions",
    "ablate_directions",
    "add_direction",
    "attribute_continuations",
    "audit_continuations",
    "clamp_latent",
    "compare_detection",
    "concept_scores",
    "convert_published_dictionary",
    "core_and_exclusive_neurons",
    "diff_means",
    "embed_continuations",
    "fit_exemplar_partition",
    "fit_exemplar_partitions",
    "fit_hierarchical_snmf",
    "fit_sae",
    "fit_snmf",
    "load_from_hub",
    "load_model",
    "logit_lens",
    "match_dictionaries",
    "match_strength",
    "neuron_group_effect",
    "neuron_overlap",
    "profile_dictionaries",
    "profile_dictionary",
    "push_to_hub",
    "rate_distortion_path",
    "residual_directions",
    "retarget",
    "sample_continuations",
    "sample_steered",
    "scale_latent",
    "steer_continuations",
    "steer_features",
    "steer_with",
    "steering_score",
    "validate_clusters",
    "write_dictionary_report",
]

_register(
    {
        "exemplar_partition": (ExemplarPartition, ExemplarPartitionConfig),
        "snmf": (SNMFDictionary, SNMFDictionaryConfig),
    }
)
