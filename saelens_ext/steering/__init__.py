"""Changing what a model does along directions: interventions, matched strengths, sampling under them, and judges.

Belongs here: edits of a forward pass and the scores of what they lead to. Does not: how directions are found.
"""
