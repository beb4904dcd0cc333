"""Clusterings of continuations, supernodes and reasoning steps, beside their controls and over many prompts.

Belongs here: what repeats an audit's stages for many prompts. Does not: the clusterer and the steering of one prompt
(``saelens_ext.continuations``).
"""
