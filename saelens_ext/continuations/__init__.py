"""Continuations of a prefix: sampled, embedded, attributed, clustered, steered and validated, as row-aligned sets.

Belongs here: the stages of an audit, each usable alone, and what runs them in order for one prefix. Does not: audits of
many prefixes (``audit``), pages (``report``).
"""
