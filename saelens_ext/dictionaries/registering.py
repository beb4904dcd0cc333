"""Making architectures known to SAELens, so that importing the package again, or anew, is no surprise."""

from collections.abc import Mapping
from typing import Any

from sae_lens import SAE, SAEConfig, register_sae_class
from sae_lens.registry import SAE_CLASS_REGISTRY

from saelens_ext.dictionaries.architecture_names import written_name

Classes = tuple[type[SAE[Any]], type[SAEConfig]]


def register(architectures: Mapping[str, Classes]) -> None:
    """Register architectures with SAELens, each with its SAE and config class; where one is taken, none.

    A class of the same module and name is the same one, imported again or reloaded: the new takes its place, so that
    loads give the class which the reloaded module holds.

    Raises:
        ValueError: another package has registered a class of another module or name.
    """
    wanted = {name: classes for plain, classes in architectures.items() for name in (plain, written_name(plain))}
    for name, (sae_class, _) in wanted.items():
        if name in SAE_CLASS_REGISTRY and _full_name(SAE_CLASS_REGISTRY[name][0]) != _full_name(sae_class):
            raise ValueError(_taken(name, SAE_CLASS_REGISTRY[name][0], sae_class))
    for name, classes in wanted.items():
        if name in SAE_CLASS_REGISTRY:
            SAE_CLASS_REGISTRY[name] = classes
        else:
            register_sae_class(name, *classes)


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _taken(name: str, other: type, own: type) -> str:
    package = other.__module__.split(".")[0]
    return (
        f"The architecture {name!r} is registered with SAELens already, as {_full_name(other)}, registered by another "
        f"package, {package!r}, so {_full_name(own)} cannot have that name: nothing was registered. SAELens holds one "
        f"class per name and process. Use the two packages in separate processes; or, if SAEs of {package!r} are not "
        "to be loaded in this one, make room first with `from sae_lens.registry import SAE_CLASS_REGISTRY; del "
        f"SAE_CLASS_REGISTRY[{name!r}]`."
    )
