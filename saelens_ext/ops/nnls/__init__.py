"""Exact non-negative least squares of many activations on the same features.

Belongs here: solvers and their kernels. Does not: fits of the features (``semi_nmf``).
"""
