"""Dictionaries on the Hugging Face Hub: pushing, pulling and loading them, with a model card.

Belongs here: repositories, cards and their errors. Does not: the files of a dictionary themselves (``dictionaries``).
"""

from saelens_ext.hub.listing import list_on_hub
from saelens_ext.hub.share import HubDictionary, load_from_hub, pull_from_hub, push_to_hub

__all__ = ["HubDictionary", "list_on_hub", "load_from_hub", "pull_from_hub", "push_to_hub"]
