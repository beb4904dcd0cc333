"""Pure mathematics on tensors and arrays: clustering, factorisation, least squares, statistics.

Belongs here: functions that know no model, dictionary or file. Does not: anything that imports a host library.
"""
