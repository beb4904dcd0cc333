"""Clusters that live in two views, at the least rate and distortion.

Belongs here: the objective, and where and how it is lowered. Does not: stability and baselines
(``continuations.clustering``).
"""
