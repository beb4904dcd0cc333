"""Which methods detect a concept in a sentence.

Belongs here: one latent per concept, probes on several, and what they are judged by. Does not: concepts and methods
themselves (``evals``).
"""
