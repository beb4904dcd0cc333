"""What a model does with a prompt, and which direction or region it hangs on.

Belongs here: verdicts on answers, ablations, localisation and pathways. Does not: how a model is steered
(``steering``).
"""
