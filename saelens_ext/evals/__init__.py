"""Evaluations that end in a claim: values per unit, matched controls, intervals and tests over units.

Belongs here: what compares methods over many concepts, documents or prompts, and the baselines for it. Does not: a
statistic (``ops``), what one sentence or token scores (``concepts``), or how a page is drawn (``report``).
"""

from saelens_ext.evals.evidence import Evidence

__all__ = ["Evidence"]
