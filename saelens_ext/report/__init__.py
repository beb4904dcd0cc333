"""Self-contained HTML pages about dictionaries and audits.

Belongs here: turning results into pages, by their public fields alone. Does not: computing results.
"""
