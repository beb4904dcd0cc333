"""The page about an audit: its modes, the tests of each, the path of clusterings, and the settings.

Belongs here: one module per section of that page. Does not: what pages share (``report``).
"""
