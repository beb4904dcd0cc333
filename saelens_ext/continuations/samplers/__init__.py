"""Where continuations come from when the model that is examined does not sample them itself.

Belongs here: samplers, and what scores their texts with the model. Does not: the model's own sampling
(``steering.sampling``), continuations that are there already (``audit_stages.questions``).
"""
