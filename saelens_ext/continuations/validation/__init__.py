"""Tests of whether clusters of continuations matter: steering effects on held-out members, against controls.

Belongs here: controls, statistics and verdicts. Does not: steering itself, or the wording of pages.
"""
