"""The packaged model and corpus, which need no hub, and the tour through the whole package on them.

Belongs here: what `make demo` runs and what tests and tutorials load. Does not: anything a user's own model needs.
"""

from saelens_ext.demo.packaged import load_demo_corpus, load_demo_model, split_corpus

__all__ = ["load_demo_corpus", "load_demo_model", "split_corpus"]
