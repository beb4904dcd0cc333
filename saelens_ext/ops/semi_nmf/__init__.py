"""Semi-nonnegative matrix factorisation with sparse signed features, in memory, to a stream and in layers.

Belongs here: starting points, the steps of a fit and the published rule. Does not: non-negative least squares
(``nnls``).
"""
