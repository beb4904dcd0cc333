"""What ``saelens-ext demo`` and ``make evidence`` run: everything the package does, on the packaged model.

Belongs here: runs of the whole package from end to end. Does not: the model, corpus and sentences they use (``demo``).
"""
