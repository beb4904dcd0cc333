"""How this package's architectures are named in ``cfg.json``.

SAELens looks an architecture up by that name, and searches no other package for it: a load without ``import
saelens_ext`` ends in a bare ``KeyError``, whose only text is the name. So the name in the file says what to do, and the
package registers its classes under both that and the plain name, by which a config calls itself.
"""

OWN = ("exemplar_partition", "snmf")
"""The architectures of this package."""

_HINT = " (pip install saelens-ext, import saelens_ext)"


def written_name(architecture: str) -> str:
    """The name for a file; that of an architecture of another package is left as it is."""
    return architecture + _HINT if architecture in OWN else architecture


def plain_name(found: object) -> object:
    """The architecture that a name in a file stands for; what is not text is left as it is."""
    return found.removesuffix(_HINT) if isinstance(found, str) else found
