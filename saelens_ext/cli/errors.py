"""Failures of the command, each in one line."""

import difflib
from collections.abc import Iterable

_LONGEST = 900


class UsageError(Exception):
    """The command line cannot be meant like this; exit status 2."""


def one_line(error: BaseException) -> str:
    """What an error says, in one line; an error that says nothing gives its kind."""
    # A KeyError's text is the repr of its key, and says nothing without its kind.
    known = isinstance(error, (ValueError, OSError, RuntimeError, ImportError, MemoryError, UsageError))
    text = " ".join(_text(error).split())
    if not (known and text):
        text = f"{type(error).__name__}: {text}".removesuffix(": ") + " (--debug shows where)"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… (--debug shows all)"


def near(name: str, names: Iterable[str]) -> str:
    """A sentence `` Did you mean …?`` with the nearest names; those that end in ``name`` behind a dot come first."""
    names = list(names)
    last = name.rpartition(".")[2].lstrip("-")
    found = [other for other in names if other.rpartition(".")[2].lstrip("-") == last]
    found += [other for other in difflib.get_close_matches(name, names, n=3, cutoff=0.6) if other not in found]
    return f" Did you mean {' or '.join(found)}?" if found else ""


def _text(error: BaseException) -> str:
    """``str(error)`` without the number that Python puts before the text of an OSError."""
    if isinstance(error, OSError) and error.strerror and not isinstance(error, UnicodeError):
        where = f": {error.filename!r}" if error.filename is not None else ""
        return f"{error.strerror}{where}"
    return str(error)
