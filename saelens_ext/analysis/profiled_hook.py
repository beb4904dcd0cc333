"""Which of a stream's hooks a dictionary is profiled on."""

from typing import Any

from sae_lens import SAE

from saelens_ext.activations.stream import ActivationStream
from saelens_ext.host.hook_names import resolve_hook


def profiled_hook(sae: SAE[Any], stream: ActivationStream, hook_name: str | None) -> tuple[str, tuple[str, ...]]:
    """The stream's key for the hook to profile, and every name under which that hook is known here."""
    resolved = dict(zip(stream.requested_hook_names, stream.hook_names, strict=True))
    own = sae.cfg.metadata.hook_name
    hook = hook_name or own or (stream.hook_names[0] if len(resolved) == 1 else None)
    if hook is None:
        raise ValueError(f"The dictionary names no hook; pass hook_name= as one of {', '.join(resolved)}.")
    place = hook if hook in stream.hook_names else resolved.get(hook) or resolve_hook(stream.model, hook)
    keys = [key for key, name in resolved.items() if name == place]
    if not keys:
        whose = "hook_name is" if hook_name else "The dictionary is of"
        raise ValueError(
            f"{whose} {hook!r}, which the stream does not read; it reads {', '.join(resolved)}. Make a stream over "
            "that hook, or pass hook_name= to profile the dictionary on another one."
        )
    names = [keys[0], place] if hook_name or own is None else [keys[0], place, own]
    return keys[0], tuple(dict.fromkeys(names))
