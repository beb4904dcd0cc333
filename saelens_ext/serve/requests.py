"""What the page asks for, from JSON to arguments; whatever is wrong with it is a ValueError in plain words."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from saelens_ext import _checks
from saelens_ext.host.chat_template import Prompt, checked_messages
from saelens_ext.serve.live import LatentChange
from saelens_ext.steering.sampling import SamplingOptions

_SAMPLING = {"max_new_tokens": int, "temperature": float, "seed": int}
_CHANGE = {"dictionary": str, "latent": int, "nats": float, "ablate": bool}
_IN_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
_LARGEST_SEED = 2**31 - 1


class SteerRequest(NamedTuple):
    """What :meth:`~saelens_ext.serve.live.LiveModel.steer` is asked for."""

    prompt: Prompt
    changes: list[LatentChange]
    options: SamplingOptions
    chat_template_options: dict[str, Any] | None


def steer_request(asked: Mapping[str, Any]) -> SteerRequest:
    """The arguments of a request to steer."""
    changes = asked.get("changes", [])
    if not isinstance(changes, list) or not all(isinstance(change, dict) for change in changes):
        raise ValueError(f"changes must be a list of objects, got {changes!r:.60}.")
    options = _typed(asked.get("options", {}), _SAMPLING, "an option")
    if abs(options.get("seed", 0)) > _LARGEST_SEED:
        raise ValueError(f"The seed must be between -{_LARGEST_SEED} and {_LARGEST_SEED}, got {options['seed']}.")
    made = [LatentChange(**_typed(change, _CHANGE, "a change")) for change in changes]
    return SteerRequest(prompt_of(asked), made, SamplingOptions(**options), template_options(asked))


def prompt_of(asked: Mapping[str, Any]) -> Prompt:
    """The text or the conversation; ValueError for what is neither."""
    if "messages" in asked:
        return checked_messages(asked["messages"], "The conversation")
    return _checks.text(asked.get("text"), "The text")


def template_options(asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is passed to the chat template."""
    options = asked.get("chat_template_options")
    if options is not None and not isinstance(options, dict):
        raise ValueError(f"The template options must be a JSON object, got {options!r:.60}.")
    return options


def _typed(values: Any, kinds: Mapping[str, type], what: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{what[:1].upper()}{what[1:]} must be an object, got {values!r:.60}.")
    _checks.known_keys(values, list(kinds), what[:1].upper() + what[1:])
    if what == "a change" and not {"dictionary", "latent"} <= values.keys():
        raise ValueError(f"A change must name a dictionary and a latent, got {values!r:.60}.")
    for name, value in values.items():
        accepted = (int, float) if kinds[name] is float else kinds[name]
        if not isinstance(value, accepted) or (isinstance(value, bool) and kinds[name] is not bool):
            raise ValueError(f"{name} must be {_IN_WORDS[kinds[name]]}, got {value!r:.60}.")
    return values
