"""The packaged model and corpus, which need no hub, the same model with a planted behaviour, and sentences.

Belongs here: what the tour, the tests and the tutorials load. Does not: anything a user's own model needs.
"""

from saelens_ext.demo.packaged import load_demo_corpus, load_demo_model, split_corpus

__all__ = ["load_demo_corpus", "load_demo_model", "split_corpus"]
