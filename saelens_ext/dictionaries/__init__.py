"""The dictionaries, which are SAELens SAEs: what they compute, how they are fitted, saved and registered.

Belongs here: dictionary classes, their configs, fits and fit results. Does not: what reads a finished dictionary
(``analysis``).
"""
