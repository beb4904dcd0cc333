"""Whether a text is unfamiliar to a dictionary.

Belongs here: scores of novelty, the sets that they are judged on, and the page. Does not: detection of a concept
(``detection``).
"""
