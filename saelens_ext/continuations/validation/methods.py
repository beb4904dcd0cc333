"""The ways to choose steering directions that an intervention test compares, and what they are called.

All methods read directions off the same signatures by the same rule, and from the same half of the members; they
differ in nothing but the partition, or in what is done with the direction.
"""

from collections.abc import Mapping
from typing import NamedTuple

NOTHING = "nothing"
"""The control that does not steer: every statistic of it is 0."""


class Method(NamedTuple):
    """A way to choose directions, in words."""

    name: str
    meaning: str


_PARTITIONS = {
    "joint": Method("own mode", "the direction of the mode that the continuation is in"),
    "semantic": Method("modes by meaning alone", "directions of as many k-means clusters of the embeddings alone"),
    "attribution": Method("modes by mechanism alone", "directions of as many k-means clusters of the signatures alone"),
    "random_partition": Method(
        "shuffled members", "directions of groups of the modes’ sizes with members drawn at random"
    ),
    "global": Method("one direction for all", "the direction of all continuations taken as one cluster"),
}
_SUBSTITUTES = {
    "single_member": Method(
        "one random member",
        "the signature of a random member of the mode, other than its medoid where there is another",
    ),
    "wrong_cluster": Method("another mode", "the direction of a different mode, each used once"),
    "random_features": Method(
        "random features",
        "as many random latents at the same hooks and positions, about as active, scaled up and down alike",
    ),
}
_EXTRA = {
    "coherent_semantic": Method(
        "tight groups by meaning",
        "directions of groups of the embeddings alone: of twice as many k-means clusters, those that are tight and of "
        "the modes’ sizes",
    ),
    "coherent_attribution": Method("tight groups by mechanism", "the same of the signatures alone"),
    "length": Method("groups by length", "directions of as many groups of continuations of like numbers of tokens"),
    "top_activation": Method(
        "most active features", "the most active latents, each scaled up or down as the mode’s own direction has it"
    ),
}
PARTITIONS, SUBSTITUTES, EXTRA = tuple(_PARTITIONS), tuple(_SUBSTITUTES), tuple(_EXTRA)
METHODS = (*PARTITIONS, *SUBSTITUTES)
"""In every test; those of `EXTRA` where they are asked for."""

DESCRIPTIONS: Mapping[str, Method] = {
    **_PARTITIONS,
    **_SUBSTITUTES,
    **_EXTRA,
    NOTHING: Method("no steering", "the model left alone, so that every change is 0"),
}


def method_name(key: str) -> str:
    """What a method is called in sentences and tables; a partition of the user's keeps its own name."""
    return DESCRIPTIONS[key].name if key in DESCRIPTIONS else key.replace("_", " ")


def method_meaning(key: str) -> str:
    """What a method's directions are."""
    return DESCRIPTIONS[key].meaning if key in DESCRIPTIONS else "directions of a partition that was given"
