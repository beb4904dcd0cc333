"""What training changed between two models, or two dictionaries of them.

Belongs here: regions, prompts and tokens of one model beside those of another. Does not: nested partitions of one
model (``dictionaries``).
"""
