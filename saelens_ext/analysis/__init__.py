"""What reads a finished dictionary: profiles, examples, matches, logit lens, neuron overlaps and effects.

Belongs here: functions of a dictionary (and a model or stream) that change neither. Does not: fitting, steering, pages.
"""
