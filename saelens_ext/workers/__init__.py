"""Work done by other processes, here or on a cluster: their start and end, and numbered jobs handed out to them.

Belongs here: what knows joblib and Ray. Does not: what the work is.
"""
