"""Feature dictionaries made from observed activations, as SAELens SAEs."""
