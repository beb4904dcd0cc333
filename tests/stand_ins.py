"""Stand-ins for functions that cannot have another shape than what they stand in for.

A stub that takes or gives something else than the function it replaces hides that the caller and the function do not
fit together, so the suite's ``monkeypatch`` checks every call and every result of a stub against the signature of the
original.
"""

import functools
import inspect
import pkgutil
import warnings
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest
from beartype.door import is_bearable
from beartype.roar import (
    BeartypeCallHintForwardRefException,
    BeartypeDecorHintException,
    BeartypeDecorHintPep585DeprecationWarning,
)

_MISSING = object()


class CheckedMonkeyPatch(pytest.MonkeyPatch):
    """pytest's, which holds a function put in place of another to that one's parameters and result."""

    def setattr(self, target: Any, name: Any, value: Any = _MISSING, raising: bool = True) -> None:
        """Replace an attribute, given as object and name or as one dotted path."""
        if value is _MISSING:
            super().setattr(target, alike(pkgutil.resolve_name(target), name), raising=raising)
            return
        super().setattr(target, name, alike(getattr(target, name, None), value), raising=raising)


def alike(original: Any, stub: Any) -> Any:
    """``stub``, which fails where it is called or answers as ``original`` would not; what is no function stays."""
    if not (inspect.isroutine(original) and inspect.isroutine(stub)):
        return stub
    try:
        signature, hint = inspect.signature(original), _result_of(original)
    except ValueError:  # written in C, without a signature
        return stub

    @functools.wraps(stub)
    def checked(*args: Any, **kwargs: Any) -> Any:
        signature.bind(*args, **kwargs)
        result = stub(*args, **kwargs)
        if not _fits(result, hint):
            raise AssertionError(f"The stub of {original.__qualname__} gave {result!r}, which gives {hint}.")
        return result

    return checked


def _result_of(function: Callable[..., Any]) -> Any:
    try:
        return get_type_hints(function).get("return", Any)
    except (NameError, TypeError):  # of names that are imported for type checkers only
        return Any


def _fits(result: Any, hint: Any) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BeartypeDecorHintPep585DeprecationWarning)
            return is_bearable(result, hint)
    except (BeartypeDecorHintException, BeartypeCallHintForwardRefException):  # a hint that only type checkers read
        return True
