"""Dictionaries built from a config, with checkpoints, evaluation and wandb: one run reads a model once and gives one or
many.

Belongs here: configs and what a long run needs. Does not: a single fit (``dictionaries``) or a stream
(``activations``).
"""

from saelens_ext.runner.config import DictionaryRunnerConfig, ExemplarRunnerConfig, SNMFRunnerConfig
from saelens_ext.runner.dictionary_configs import ExemplarBuildConfig, SNMFBuildConfig
from saelens_ext.runner.results import BuiltDictionary, RunResult
from saelens_ext.runner.runner import DictionaryRunner

__all__ = [
    "BuiltDictionary",
    "DictionaryRunner",
    "DictionaryRunnerConfig",
    "ExemplarBuildConfig",
    "ExemplarRunnerConfig",
    "RunResult",
    "SNMFBuildConfig",
    "SNMFRunnerConfig",
]
