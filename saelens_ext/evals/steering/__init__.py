"""Which methods steer towards a concept, by texts that judges rate.

Belongs here: directions at matched divergence, their texts, and ratings by people. Does not: interventions and judges
(``saelens_ext.steering``).
"""
