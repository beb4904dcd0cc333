"""The audit of one prefix: what is asked, with which settings, its stages in order, and what each leaves in a folder.

Belongs here: what a whole audit and the evaluations of audits both run. Does not: what a stage computes (the rooms
beside), many prefixes and their pages (``audit``).
"""
