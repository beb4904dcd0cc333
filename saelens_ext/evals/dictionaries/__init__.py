"""What holds of a dictionary itself: whether another draw, threshold, grain or planted truth gives it again.

Belongs here: stability, saturation, sensitivity, nesting, decomposition, synthetic models. Does not: fits
(``saelens_ext.dictionaries``).
"""
