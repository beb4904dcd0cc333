"""Continuations of a prefix: sampled, embedded, attributed, clustered, steered and validated, as row-aligned sets.

Belongs here: the stages of an audit, each usable alone. Does not: their order and settings (``audit``), pages
(``report``).
"""
