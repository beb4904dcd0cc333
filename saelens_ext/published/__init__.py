"""Dictionaries that others published, read as data and converted to this package's format.

Belongs here: foreign file formats, read without executing them. Does not: this package's own files (``hub``,
``dictionaries``).
"""
