"""All that the package knows of its hosts: SAELens, TransformerLens and the models that packages carry.

Belongs here: loading models, naming and editing hooks, tokens and prompts. Does not: activations, dictionaries,
steering.
"""
