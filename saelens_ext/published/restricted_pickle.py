"""A reader of foreign pickles that cannot run them: checked opcode by opcode, then unpickled into inert stand-ins.

A pickle is a program. It is read twice:

    check     ``pickletools.genops`` walks over the opcodes without executing any. Those that plain data does not need
              are refused (persistent ids, extension codes, out-of-band buffers, …), and so is whatever could take
              memory or time: lengths beyond the file, memo gaps, numbers above 64 bits, deep nesting, lists in lists,
              sets of anything but small whole numbers, and more opcodes, objects, items, stack or marks than
              :class:`Limits` allows. The kind of every value on the stack and in the memo is followed, so that
              nothing is called but what was named, and nothing is given a state but what such a call made.
    unpickle  ``pickle.Unpickler`` whose ``find_class`` is the table of exact names in
              :mod:`saelens_ext.published.stand_ins`. None leads to the real thing: each leads to a stand-in that
              checks and records what it is given. Arrays stay bytes.

Memory: that of the bytes in the file, and at most some 20 bytes per byte of everything else.
"""

import io
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pickletools import genops, markobject, opcodes
from typing import IO, Any, cast

from saelens_ext.published.stand_ins import NAMES, UnsafePickleError, short

_MAX_TUPLE = 16
_MAX_LINE = 64  # characters of a number or a name in protocol 0
_PROGRESS_EVERY = 4096


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much a pickle may make."""

    opcodes: int
    """Steps of its program."""
    objects: int
    """Objects and texts, not counting plain numbers; a dictionary or set counts as 8."""
    items: int
    """Items of all lists, sets and dictionaries together."""
    stack: int = 20_000
    """Values put down and not yet used, within one mark; Python's pickler needs about two thousand."""
    marks: int = 64
    """Nesting."""

    @classmethod
    def of_size(cls, size: int) -> "Limits":
        """Limits for a file of ``size`` bytes: what it can honestly hold, and never more than 10 million objects."""
        objects, items = min(10_000 + size // 8, 10_000_000), min(10_000 + size, 50_000_000)
        return cls(opcodes=min(size, 300_000_000), objects=objects, items=items)


def load(data: Any, limits: Limits, on_progress: Callable[[int], Any] | None = None) -> tuple[Any, int]:
    """The value that a pickle describes, and the number of items in its lists, sets and dictionaries.

    ``on_progress`` is called with the number of bytes checked, every so often.

    Raises:
        UnsafePickleError: it is refused, with where and why.
    """
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    check = _Check(data, file, limits)
    check.run(on_progress)
    file.seek(0)
    try:
        return _Unpickler(file).load(), check.items
    except UnsafePickleError:
        raise
    except _DAMAGED as error:
        reason = f"it is damaged, or calls a name as neither Python nor numpy does ({type(error).__name__})"
        raise UnsafePickleError(reason) from None


_DAMAGED = (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError, OverflowError)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a name, exactly as it is written."""
        try:
            return NAMES[module, name]
        except KeyError:
            reason = f"it names {short(module)} {short(name)}, which no published dictionary needs"
            raise UnsafePickleError(reason) from None


# Kinds are those of pickletools, with "name" for a class or function that was looked up, "object" for what calling one
# made, "nested tuple" for one with tuples in it, and "large int" for a number of more than 31 bits.
_PUTS, _GETS = ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")
_ALLOWED = {*_PUTS, *_GETS, "PROTO", "FRAME", "MARK", "STOP"} | set(
    re.findall(
        r"\w+",
        "NONE NEWTRUE NEWFALSE INT LONG LONG1 BININT BININT1 BININT2 FLOAT BINFLOAT UNICODE SHORT_BINUNICODE BINUNICODE"
        " BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8 GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD EMPTY_TUPLE"
        " TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_SET ADDITEMS EMPTY_DICT DICT SETITEM"
        " SETITEMS",
    )
)
_NAMED = {opcode.code.encode("latin-1"): opcode.name for opcode in opcodes}
_TAKES = {opcode.name: [kind.name for kind in opcode.stack_before] for opcode in opcodes}
_TAKES |= {"REDUCE": ["name", "tuple"], "NEWOBJ": ["name", "tuple"], "BUILD": ["object", "any"]}
_GIVES = {opcode.name: opcode.stack_after[0].name for opcode in opcodes if opcode.stack_after}
_GIVES |= {"GLOBAL": "name", "STACK_GLOBAL": "name", "REDUCE": "object", "NEWOBJ": "object", "BUILD": "object"}
_MARK = markobject.name
_CHANGES = ("BUILD", "APPEND", "APPENDS", "ADDITEMS", "SETITEM", "SETITEMS")
_COSTS = {"str": 1, "bytes": 1, "bytearray": 1, "object": 1, "tuple": 1, "list": 1, "set": 8, "dict": 8}
_NOT_IN_LISTS = {"list", "set", "dict", "bytes", "bytearray", "name"}


class _Check:
    """The first pass: the kinds of all values, without the values."""

    def __init__(self, data: Any, file: Any, limits: Limits):
        self.read, self.tell = file.read, file.tell
        self.items = self._objects = 0
        self._data, self._file, self._limits = data, file, limits
        self._stack: list[str] = []
        self._below: list[list[str]] = []
        self._memo: list[str] = []

    def readline(self) -> bytes:
        """A line for ``genops``; Python's time for a number grows with the square of its digits."""
        start, line = self.tell(), self._file.readline()
        if len(line) > _MAX_LINE and self._data[start - 1 : start] != b"V":
            raise UnsafePickleError("it holds a longer line than a number or a name needs")
        return line

    def run(self, on_progress: Callable[[int], Any] | None) -> None:
        """Walk over the opcodes, up to the end of the file."""
        at = 0
        try:
            for steps, (opcode, argument, _) in enumerate(genops(cast(IO[bytes], self))):
                if opcode.name not in _ALLOWED:
                    raise UnsafePickleError(f"it uses the opcode {opcode.name}, which no published dictionary needs")
                if steps >= self._limits.opcodes:
                    raise UnsafePickleError(f"it takes more than {steps} steps, too many for its size")
                self._step(opcode.name, argument, at)
                at = self.tell()
                if on_progress is not None and steps % _PROGRESS_EVERY == 0:
                    on_progress(at)
        except UnsafePickleError as error:
            raise UnsafePickleError(f"{error} (at byte {at})") from None
        except (ValueError, IndexError) as error:
            # genops reads what follows an opcode before it says which it is.
            name = _NAMED.get(self._data[at : at + 1])
            if name is not None and name not in _ALLOWED:
                raise UnsafePickleError(f"it uses the opcode {name}, which no published dictionary needs") from None
            cut = re.match(r"expected (\d+) bytes in .* only (\d+) remain", str(error))
            detail = f": {cut[1]} bytes are announced, {cut[2]} are left" if cut else ""
            raise UnsafePickleError(f"it breaks off or is damaged at byte {at}{detail}") from None
        if at != len(self._data):
            raise UnsafePickleError(f"{len(self._data) - at} bytes follow its end")

    def _step(self, name: str, argument: Any, at: int) -> None:
        limits = self._limits
        if name in _PUTS:
            place = len(self._memo)
            if argument not in (None, place):
                raise UnsafePickleError(f"it remembers a value as number {argument} where {place} is next")
            if place >= limits.objects:
                raise UnsafePickleError(f"it remembers more than {limits.objects} values, too many for its size")
            self._memo.append(self._stack[-1])
        elif name in _GETS:
            if not 0 <= argument < len(self._memo):
                raise UnsafePickleError(f"it recalls value number {argument} of {len(self._memo)}")
            self._stack.append(self._memo[argument])
        elif name == "MARK":
            if len(self._below) >= limits.marks:
                raise UnsafePickleError(f"it nests deeper than {limits.marks} levels")
            self._below.append(self._stack)
            self._stack = []
        elif name == "PROTO":
            if at or argument > 5:
                raise UnsafePickleError(f"it says that it is of pickle protocol {argument}; 0 to 5 are read")
        elif name == "FRAME":
            if argument > len(self._data) - self.tell():
                raise UnsafePickleError(f"it announces a frame of {argument} bytes that does not fit")
        elif name == "STOP":
            if self._below or len(self._stack) != 1:
                raise UnsafePickleError("it ends with something else than one value")
        else:
            made = self._made(name, argument)  # which replaces the stack
            self._stack.append(made)
        if len(self._stack) > limits.stack:
            raise UnsafePickleError(f"it piles up more than {limits.stack} values")

    def _made(self, name: str, argument: Any) -> str:
        """The kind of what an opcode makes of what it takes from the stack; both are checked and counted."""
        made, takes = _GIVES[name], _TAKES[name]
        if name not in _CHANGES:
            self._objects += _COSTS.get(made, 0)
            if self._objects > self._limits.objects:
                raise UnsafePickleError(f"it makes more than {self._limits.objects} objects, too many for its size")
        if made.startswith("int"):
            if not -(2**63) <= argument < 2**63:
                raise UnsafePickleError("it holds a whole number of more than 64 bits")
            return "bool" if isinstance(argument, bool) else "int" if abs(argument) < 2**31 else "large int"
        items: list[str] = []
        if _MARK in takes:
            items, self._stack = self._stack, self._below.pop()
            takes = takes[: takes.index(_MARK)]
        if len(self._stack) < len(takes):
            raise IndexError
        taken = [self._stack.pop() for _ in takes][::-1]
        for kind, needed in zip(taken, takes):
            if needed != "any" and not kind.endswith(needed):
                raise UnsafePickleError(f"it gives {name} the kind {kind} where a {needed} is needed")
        items = taken[name in _CHANGES :] + items
        if made in ("list", "set", "dict"):
            self.items += len(items)
            if self.items > self._limits.items:
                raise UnsafePickleError(f"it holds more than {self._limits.items} items, too many for its size")
        return _container(made, items) if items else made


def _container(kind: str, items: list[str]) -> str:
    """The kind of a container with items of these kinds, or of what is made otherwise."""
    if kind == "tuple":
        # Hashing or comparing tuples takes time exponential in their depth where they share their entries.
        if len(items) > _MAX_TUPLE or "nested tuple" in items:
            raise UnsafePickleError(f"it nests tuples deeper than 2 levels, or one has more than {_MAX_TUPLE} entries")
        return "nested tuple" if "tuple" in items else "tuple"
    if kind == "list" and (wrong := _NOT_IN_LISTS.intersection(items)):
        raise UnsafePickleError(f"it puts a {' and a '.join(sorted(wrong))} into a list")
    # Of 64 bits one could choose numbers whose places in a hash table collide.
    if kind == "set" and set(items) != {"int"}:
        raise UnsafePickleError("it holds a set of something else than whole numbers of 31 bits")
    if kind == "dict" and (len(items) % 2 or set(items[::2]) != {"str"}):
        raise UnsafePickleError("it holds attributes whose names are no texts")
    return kind
