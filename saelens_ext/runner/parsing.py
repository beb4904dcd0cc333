"""Fields of configs that take one value or several, on the command line too.

A field made by one of these functions takes a string there: one value, several with commas between (``1,2,4``), or a
JSON list (``[1, 2, 4]``), which is how ``wandb agent`` writes a list.
"""

import json
from collections.abc import Callable
from typing import Any

import simple_parsing

from saelens_ext._checks import is_none

_SWITCHES = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def items(text: str) -> list[Any]:
    """The items of ``a,b``, ``(a, b)`` or a JSON list."""
    text = text.strip()
    if text.startswith("["):
        try:
            return list(json.loads(text))
        except json.JSONDecodeError:
            pass  # a list without quotes: [a, b]
    return [item.strip().strip("'\"") for item in text.strip("()[]").split(",") if item.strip()]


def one_or_several(convert: Callable[[Any], Any]) -> Callable[[str], Any]:
    """A parser of one value or a list of them."""

    def value_or_list(text: str) -> Any:
        values = [convert(item) for item in items(text)]
        return values[0] if len(values) == 1 and not text.strip().startswith("[") else values

    return value_or_list


def tuple_of(convert: Callable[[Any], Any]) -> Callable[[str], tuple[Any, ...]]:
    """A parser of a list of values."""
    return lambda text: tuple(convert(item) for item in items(text))


texts = tuple_of(str)
"""A parser of a list of texts."""


def number(item: Any) -> float | int:
    """A whole number where it is written as one, otherwise a float."""
    value = float(item)
    return int(value) if value.is_integer() and "." not in str(item) and "e" not in str(item) else value


def whole_number(item: Any) -> int:
    """An int; 2.5 is a ValueError."""
    value = float(item)
    if not value.is_integer():
        raise ValueError(f"{item!r} is not a whole number")
    return int(value)


def positions(text: str) -> tuple[int | None, ...]:
    """The parts of a slice: ``5,-5`` or ``(None, 8, 2)``."""
    return tuple(None if is_none(item) else whole_number(item) for item in items(text))


def switch_or_ids(text: str) -> bool | list[int]:
    """``true``, ``false``, or token ids."""
    switch = _SWITCHES.get(text.strip().lower())
    return [whole_number(item) for item in items(text)] if switch is None else switch


def switch_or_none(text: str) -> bool | None:
    """``true``, ``false`` or ``none``."""
    word = text.strip().lower()
    if not is_none(text) and word not in _SWITCHES:
        raise ValueError(f"expected true, false or none, got {text!r}")
    return _SWITCHES.get(word)


def mapping_or_none(text: str) -> dict[str, Any] | None:
    """A JSON object, or ``none``."""
    if is_none(text):
        return None
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, got {text!r}")
    return found


def text_or_none(text: str) -> str | None:
    """Text; ``none`` is None."""
    return None if is_none(text) else text


def parsed(default: Any, parse: Callable[[str], Any], metavar: str) -> Any:
    """A dataclass field that ``parse`` reads on the command line; ``metavar`` stands for its value in the help."""
    return simple_parsing.field(default=default, type=parse, metavar=metavar)
