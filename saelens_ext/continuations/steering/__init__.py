"""Steering continuations along the attribution directions of clusters, and scoring or sampling them under it.

Belongs here: edits of latents at prefix positions. Does not: steering a prompt along one direction
(``saelens_ext.steering``).
"""
