"""Another name of `saelens_ext.host.models`."""

from saelens_ext.host.models import (
    describe_model,
    hook_layer,
    load_model,
    resolve_hook,
    retarget,
    stop_layer,
    tokenizer_of,
)

__all__ = ["describe_model", "hook_layer", "load_model", "resolve_hook", "retarget", "stop_layer", "tokenizer_of"]
