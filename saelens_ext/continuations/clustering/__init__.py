"""Rate-distortion clustering of continuations by two views, its path over weights, its stability, and baselines.

Belongs here: the estimator and what chooses its settings. Does not: the descent itself, which is pure mathematics
(``ops``).
"""
