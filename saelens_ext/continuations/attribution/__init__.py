"""How much each feature of the prefix contributes to each continuation, by backends that can be checked for
completeness.

Belongs here: sources, sites, freezes and backward passes. Does not: clustering or steering by what was found.
"""
