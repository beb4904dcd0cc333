"""The page about dictionaries: growth, regions, features, evaluation.

Belongs here: one module per section of that page. Does not: what pages share (``report``).
"""
