"""Pure mathematics on tensors and arrays: clustering, factorisation, least squares, statistics.

Belongs here: functions that know no model, dictionary or file, and how torch is to compute them (its modes, float64,
memory). Does not: anything that imports a host library.
"""
