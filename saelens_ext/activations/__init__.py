"""Streams of activations: what a model computes on documents, with the document, position and token of every row.

Belongs here: reading activations in order, whatever supplies them. Does not: what is computed from them.
"""

from saelens_ext.activations.stream import ActivationBatch, ActivationStream

__all__ = ["ActivationBatch", "ActivationStream"]
