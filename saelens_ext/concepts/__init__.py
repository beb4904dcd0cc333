"""Concepts given by sentences: scores that detect them, the difference of means, and comparisons of methods.

Belongs here: what needs labelled sentences. Does not: dictionaries, or statistics that know no concept (``ops``).
"""

from saelens_ext.concepts.comparison import compare_detection
from saelens_ext.concepts.detection import concept_scores
from saelens_ext.concepts.detector import Detector
from saelens_ext.concepts.diff_means import diff_means
from saelens_ext.concepts.token_activations import read_texts

__all__ = ["Detector", "compare_detection", "concept_scores", "diff_means", "read_texts"]
