"""Evaluations that end in a claim: values per unit, matched controls, intervals and tests over units.

Belongs here: what compares methods over many concepts, documents or prompts, and the baselines for it. Does not: a
statistic (``ops``), what one sentence or token scores (``concepts``), or how a page is drawn (``report``).

The public names are listed in ``__init__.pyi`` and imported when first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
