"""Argument checks that every public entry shares.

Each names what it received, what it allows and what to do about it.
"""

import difflib
import inspect
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints, no_type_check

import torch

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
Text = TypeVar("Text", bound=str)


def finite(x: torch.Tensor, name: str) -> torch.Tensor:
    """Return ``x``; raise ValueError if any entry is NaN or infinite."""
    # A sum is finite only if all its terms are, and takes a fraction of the time and memory of looking at each.
    if bool(x.detach().sum().isfinite()):
        return x
    ok = torch.isfinite(x)
    if not bool(ok.all()):
        rows = (~ok).reshape(x.shape[0], -1).any(dim=1) if x.ndim > 1 else ~ok
        first = int(rows.nonzero()[0]) if rows.ndim and rows.numel() else 0
        raise ValueError(
            f"{name} has {int((~ok).sum())} non-finite entries (NaN or infinity), the first in row {first}; "
            "every activation must be finite. Half-precision overflow is the usual cause: run the model in bfloat16 or "
            "float32."
        )
    return x


def width(x: torch.Tensor, d: int, name: str) -> torch.Tensor:
    """Return ``x``; raise ValueError unless its last dimension is ``d``."""
    if x.ndim == 0 or x.shape[-1] != d:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; its last dimension must be {d}, the width of the activations this was "
            "built from. Is it attached at the hook it was built at?"
        )
    return x


def between(
    value: float | int, low: float | int, high: float | int, name: str, *, closed_high: bool = False
) -> float | int:
    """Return ``value``; raise ValueError unless it lies in ``(low, high)``, or ``(low, high]`` with ``closed_high``."""
    if not (low < value < high or (closed_high and value == high)):
        raise ValueError(f"{name} must lie in ({low:g}, {high:g}{']' if closed_high else ')'}, got {value!r}.")
    return value


def choice(value: str, allowed: Collection[Text], name: str) -> Text:
    """Return ``value``; raise ValueError unless it is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.{near_matches(value, allowed)}"
        )
    return cast("Text", value)


def text(value: Any, name: str) -> str:
    """Return ``value`` as a plain str; raise ValueError unless it is a text that can be tokenised."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {_short(value)} of type {type(value).__name__}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has half a character (the lone surrogate {value[error.start]!r}) at place {error.start}, which no "
            f"tokenizer takes: {_short(value)}. Read it again with the right encoding, or leave that character out."
        ) from error
    return str(value)


def listed(values: Any, name: str, what: str = "entry") -> list[Any]:
    """Return the entries of a list, array, column or iterator; raise ValueError for what else can be iterated."""
    is_table = hasattr(values, "columns")
    is_other = is_table or isinstance(values, (str, bytes, Mapping, Set)) or not isinstance(values, Iterable)
    if is_other:
        given = type(values).__name__ if is_table else _short(values)
        remedy = " Give the column that holds it." if is_table else ""
        raise ValueError(f"{name} must be a list of at least one {what}, got {given}.{remedy}")
    found = list(values)
    if not found:
        raise ValueError(f"{name} is empty; give a list of at least one {what}.")
    return found


def texts(values: Any, name: str, what: str = "string") -> list[str]:
    """Return the entries of a list of texts; raise ValueError unless there is one and all can be tokenised."""
    return [text(value, f"{name}[{number}]") for number, value in enumerate(listed(values, name, what))]


def positive(value: float | int, name: str) -> int:
    """Return ``value`` as an int; raise ValueError unless it is a whole number of at least 1."""
    if value != int(value) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
    return int(value)


def known_keys(given: Iterable[str], allowed: Sequence[str], what: str) -> None:
    """Raise ValueError naming every key of ``given`` that is not in ``allowed``, with its nearest spelling."""
    unknown = [key for key in given if key not in allowed]
    if unknown:
        hints = "".join(near_matches(key, allowed) for key in unknown)
        named = ", ".join(map(repr, unknown))
        raise ValueError(f"{what} does not know {named}.{hints} It knows: {', '.join(allowed)}.")


def from_options(kind: type[T], options: Mapping[str, Any], what: str) -> T:
    """A config from its fields by name; one that it does not have is a ValueError with near matches."""
    known_keys(options, [field.name for field in fields(cast(Any, kind))], what)
    return kind(**options)


def names_options(defaults: Callable[..., Any] | None = None) -> Callable[[F], F]:
    """Decorate a function of ``**options: Unpack[SomeTypedDict]`` so that help and notebooks list the options too.

    Their default values are those of the parameters of these names that ``defaults`` has.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        *others, options = signature.parameters.values()
        (kind,) = get_args(options.annotation)
        known = {} if defaults is None else inspect.signature(defaults).parameters
        named = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=hint, default=known[name].default)
            if name in known
            else inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=hint, default=...)
            for name, hint in get_type_hints(kind).items()
        ]
        cast(Any, function).__signature__ = signature.replace(parameters=[*others, *named])
        return function

    return decorate


def near_matches(name: str, names: Iterable[str], n: int = 5) -> str:
    """A sentence `` Did you mean …?`` with the nearest of ``names``; empty when nothing is near."""
    matches = difflib.get_close_matches(str(name), list(names), n=n, cutoff=0.5)
    return f" Did you mean {', '.join(map(repr, matches))}?" if matches else ""


# --- fields of configs ---

_NONE_WORDS = ("none", "null")
_IN_WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text", NoneType: "None"}


def is_none(value: Any) -> bool:
    """Whether a value is None, or the text that a sweep agent or a shell writes for it."""
    return value is None or (isinstance(value, str) and value.strip().lower() in _NONE_WORDS)


def normalising(kind: type[T]) -> type[T]:
    """Mark a dataclass that normalises its fields: run-time type checkers leave what it is given to it."""
    no_type_check(kind.__init__)
    return kind


def normalise_fields(config: Any, prefix: str = "") -> None:
    """Put the fields of a dataclass, in place, into the form that their annotations name and JSON can hold.

    Numbers and arrays of numpy and torch become Python's, paths and devices texts, dtypes their names, and the texts
    "None" and "null" None in a field that may be None, or the empty text where that is the default.

    Raises:
        ValueError: a field cannot hold its value; it is named, behind ``prefix``.
    """
    hints = _hints(type(config))
    for field in fields(config):
        value = getattr(config, field.name)
        empty = field.default == "" and is_none(value)
        name = f"{prefix}{field.name}"
        object.__setattr__(config, field.name, "" if empty else _fitting(value, hints[field.name], name))


def plain(value: Any, name: str) -> Any:
    """A value in the form that JSON can hold; ValueError names where in ``name`` one stands that has none."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, (os.PathLike, torch.device)):
        return str(value)
    if hasattr(value, "tolist"):  # a number or an array of numpy, torch or pandas
        return plain(value.tolist(), name)
    if isinstance(value, Enum):
        return plain(value.value, name)
    if isinstance(value, Mapping):
        return {_key(key, name): plain(entry, f"{name}[{key!r}]") for key, entry in value.items()}
    if isinstance(value, (list, tuple, range)):
        entries = [plain(entry, f"{name}[{number}]") for number, entry in enumerate(value)]
        return tuple(entries) if isinstance(value, tuple) else entries
    if isinstance(value, (set, frozenset)):
        return sorted(plain(entry, name) for entry in value)
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    shown = repr(value) if isinstance(value, float) else f"{_short(value)} of type {type(value).__name__}"
    raise ValueError(
        f"{name} is {shown}, which cannot be written into a JSON file: give texts, finite numbers, true, false, None, "
        "or lists and dictionaries of them."
    )


def _key(key: Any, name: str) -> str:
    if not isinstance(key, (str, int)) or isinstance(key, bool):
        raise ValueError(f"{name} has the key {key!r}; keys must be texts, or whole numbers, which become texts.")
    return str(key)


_hints = cache(get_type_hints)


def _fitting(value: Any, hint: Any, name: str) -> Any:
    """The value as one of the kinds that a hint names."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if NoneType in kinds and is_none(value):
        return None
    given = value if is_dataclass(value) or type(value) in kinds else _plain_but_dataclasses(value, name)
    # A kind that the value is of already goes before those that it could be turned into.
    for kind in sorted(kinds, key=lambda kind: type(given) is not kind):
        try:
            return _as(given, kind, name)
        except TypeError:
            continue
    allowed = " or ".join(dict.fromkeys(_described(kind) for kind in kinds))
    raise ValueError(f"{name} must be {allowed}, got {_short(value)}.")


def _plain_but_dataclasses(value: Any, name: str) -> Any:
    """As :func:`plain`; a list of configs stays one."""
    listed = isinstance(value, (list, tuple)) and any(map(is_dataclass, value))
    return value if listed else plain(value, name)


def _as(value: Any, kind: Any, name: str) -> Any:
    """The value as a kind; TypeError if it is none."""
    origin = get_origin(kind) or kind
    if origin is Any:
        return value
    if origin is Literal:
        origin = type(get_args(kind)[0])
    if origin is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise TypeError
        return value
    if origin is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if origin in (Sequence, list, tuple) and isinstance(value, (list, tuple)):
        return _entries(value, origin, get_args(kind), name)
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return plain(value, name)
    if isinstance(value, origin) and not (origin is int and isinstance(value, bool)) and origin is not Sequence:
        return value
    raise TypeError


def _entries(value: Sequence[Any], origin: Any, inner: tuple[Any, ...], name: str) -> Any:
    fixed = origin is tuple and inner and inner[-1] is not Ellipsis
    if fixed and len(inner) != len(value):
        raise TypeError
    hints = inner if fixed else (inner[:1] or (Any,)) * len(value)
    found = [_fitting(entry, hint, f"{name}[{number}]") for number, (entry, hint) in enumerate(zip(value, hints))]
    return tuple(found) if origin is tuple or isinstance(value, tuple) else found


def _described(kind: Any) -> str:
    origin = get_origin(kind) or kind
    if origin in (Sequence, list, tuple):
        inner = get_args(kind)
        return f"a list of {len(inner)}" if origin is tuple and inner and inner[-1] is not Ellipsis else "a list"
    if origin in (dict, Mapping):
        return "a dictionary"
    if origin is Literal:
        return "a text"
    return _IN_WORDS.get(origin, getattr(origin, "__name__", str(origin)))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
