"""What a foreign pickle may hold: plain values, and stand-ins that can do nothing for the few classes it may name.

A pickle is a program: it names callables and calls them. Here a name is looked up in ``NAMES``, pair by pair; what it
gives is a label, never the thing itself, and "calling" a label runs one of the functions below on checked arguments.
Arrays stay where they are in the file: an :class:`Array` knows its shape, its dtype and where its bytes lie.
"""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from math import prod
from struct import unpack
from typing import Any

MAX_TUPLE = 16
"""Entries of a tuple."""
MAX_DIMENSIONS = 4
"""Dimensions of an array."""

_FORMATS = {
    "b1": "?",
    "i1": "b",
    "u1": "B",
    "i2": "h",
    "u2": "H",
    "i4": "i",
    "u4": "I",
    "i8": "q",
    "u8": "Q",
    "f2": "e",
    "f4": "f",
    "f8": "d",
}


class UnsafePickleError(ValueError):
    """A foreign pickle was refused: it is damaged, too large, or does what a published dictionary has no need of."""


@dataclass(frozen=True, slots=True)
class Name:
    """An allowed name of a module: a label, not the thing it names."""

    kind: str


def _names() -> dict[tuple[str, str], Name]:
    """The whole whitelist, by module and name, of today's and earlier versions of Python, numpy and the author's
    code.
    """
    kinds = {"Dictionary": "dictionary", "ConceptLibrary": "dictionary", "Partition": "region", "Concept": "region"}
    found = {
        (module, name): kind
        for module in ("ep.discovery.dictionary", "cas.discovery.dictionary")
        for name, kind in kinds.items()
    }
    found |= {("numpy", "ndarray"): "ndarray", ("numpy", "dtype"): "dtype", ("_codecs", "encode"): "encode"}
    for core in ("numpy.core", "numpy._core"):
        found |= {
            (f"{core}.multiarray", "_reconstruct"): "_reconstruct",
            (f"{core}.multiarray", "scalar"): "scalar",
            (f"{core}.numeric", "_frombuffer"): "_frombuffer",
        }
    for builtins in ("builtins", "__builtin__"):
        found |= {(builtins, "set"): "set", (builtins, "object"): "object"}
    # Protocols 0 and 1 make an instance by copyreg._reconstructor(class, object, None).
    found |= {(module, "_reconstructor"): "_reconstructor" for module in ("copyreg", "copy_reg")}
    return {pair: Name(kind) for pair, kind in found.items()}


NAMES = _names()
CLASSES = ("dictionary", "region")


class Text:
    """A long text that was left in the file."""

    __slots__ = ("coding", "length", "start")

    def __init__(self, start: int, length: int, coding: str):
        self.start, self.length, self.coding = start, length, coding

    def read(self, data: Any) -> str:
        """Decode it; invalid text is refused."""
        return decoded(data[self.start : self.start + self.length], self.coding)


def decoded(raw: bytes, coding: str) -> str:
    """Text of a pickle, which may hold lone surrogates."""
    try:
        return raw.decode(coding, "surrogatepass" if coding == "utf-8" else "strict")
    except UnicodeError:
        raise UnsafePickleError(f"it holds text that is not valid {coding}") from None


class Blob:
    """Bytes that were left in the file, or text that stands for them (protocols 0 to 2)."""

    __slots__ = ("length", "source", "start")

    def __init__(self, start: int = 0, length: int | None = None, source: "str | Text | None" = None):
        self.start, self.length, self.source = start, length, source

    def read(self, data: Any) -> bytes:
        """The bytes themselves, copied."""
        if self.source is None:
            return bytes(data[self.start : self.start + self.length])
        text = self.source if isinstance(self.source, str) else self.source.read(data)
        try:
            return text.encode("latin-1")
        except UnicodeError:
            raise UnsafePickleError("it holds text in the place of bytes that is no Latin-1") from None


class Instance:
    """An object of one of the author's classes: its kind and its attributes."""

    __slots__ = ("kind", "state")

    def __init__(self, kind: str):
        self.kind = kind
        self.state: dict[str, Any] | None = None


class Dtype:
    """A number's type: kind and bytes as in "f4", and its byte order once known."""

    __slots__ = ("code", "order")

    def __init__(self, code: str):
        self.code, self.order = code, ""

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return int(self.code[1:])


class Array:
    """An array whose bytes are still in the file."""

    __slots__ = ("blob", "dtype", "shape")

    def __init__(self) -> None:
        self.shape: tuple[int, ...] | None = None
        self.dtype: Dtype | None = None
        self.blob: Blob | None = None

    def fill(self, shape: Any, dtype: Any, blob: Any) -> "Array":
        """Set shape, dtype and bytes, which must fit each other; nothing is allocated."""
        if self.shape is not None:
            raise UnsafePickleError("it fills an array twice")
        if (
            not isinstance(shape, tuple)
            or not 0 < len(shape) <= MAX_DIMENSIONS
            or any(type(n) is not int or n < 0 for n in shape)
        ):
            raise UnsafePickleError(
                f"it holds an array whose shape is not 1 to {MAX_DIMENSIONS} whole numbers of at least 0: "
                f"{short(shape)}"
            )
        if not isinstance(dtype, Dtype) or not dtype.order:
            raise UnsafePickleError("it holds an array without a whole dtype")
        if not isinstance(blob, Blob):
            raise UnsafePickleError(f"it holds an array whose content is {short(blob)} instead of bytes")
        self.shape, self.dtype, self.blob = shape, dtype, blob
        if blob.length is not None:
            self.check_length(blob.length)
        return self

    def check_length(self, length: int) -> None:
        """Refuse bytes that are more or fewer than shape and dtype say."""
        if self.shape is None or self.dtype is None:
            raise UnsafePickleError("it holds an array without content")
        wanted = prod(self.shape) * self.dtype.itemsize
        if length != wanted:
            raise UnsafePickleError(f"it holds an array of shape {self.shape} that needs {wanted} bytes, with {length}")


class Items:
    """A list; whole numbers in it take 8 bytes each."""

    __slots__ = ("count", "parts")

    def __init__(self) -> None:
        self.parts: list[array[int] | list[Any]] = []
        self.count = 0

    def extend(self, items: list[Any]) -> None:
        """Add values; a list directly within a list is refused, so that nothing nests."""
        kinds = set(map(type, items))
        if not kinds <= _IN_LISTS:
            raise UnsafePickleError(
                f"it puts {' and '.join(sorted(_WHAT.get(kind, kind.__name__) for kind in kinds - _IN_LISTS))} into a "
                "list"
            )
        numbers = kinds == {int}
        if not self.parts or isinstance(self.parts[-1], array) != numbers:
            self.parts.append(array("q") if numbers else [])
        self.parts[-1].extend(items)
        self.count += len(items)

    def __iter__(self) -> Iterator[Any]:
        return chain(*self.parts)

    def numbers(self) -> "array[int] | None":
        """The list as an array if it holds whole numbers only."""
        if not self.parts:
            return array("q")
        return self.parts[0] if len(self.parts) == 1 and isinstance(self.parts[0], array) else None


class Numbers(Items):
    """A set, of whole numbers only."""

    __slots__ = ()

    def extend(self, items: Iterable[Any]) -> None:
        """Add whole numbers."""
        items = list(items)
        if any(type(item) is not int for item in items):
            raise UnsafePickleError("it holds a set of something else than whole numbers")
        super().extend(items)


_WHAT = {
    Items: "a list",
    Numbers: "a set",
    Array: "an array",
    Blob: "bytes",
    Text: "a long text",
    Instance: "an object",
    Name: "a class or function",
    Dtype: "a dtype",
    tuple: "a tuple",
    dict: "a dictionary of attributes",
}
_IN_LISTS = {int, float, bool, type(None), str, Text, tuple, Array, Instance}


def short(value: Any) -> str:
    """A value for an error, never longer than a line."""
    plain = (str, int, float, type(None))
    entries = value if isinstance(value, tuple) and len(value) <= 8 else (value,)
    text = (
        repr(value)
        if all(isinstance(entry, plain) for entry in entries)
        else _WHAT.get(type(value), type(value).__name__)
    )
    return text if len(text) <= 60 else text[:57] + "..."


# --- what calling an allowed name does ---


def call(name: Any, args: Any) -> Any:
    """What a pickle gets for ``name(*args)``.

    Raises:
        UnsafePickleError: the name may not be called, or not with these arguments.
    """
    function = _CALLS.get(name.kind) if isinstance(name, Name) else None
    if function is None or not isinstance(args, tuple):
        raise UnsafePickleError(
            f"it calls {name.kind if isinstance(name, Name) else short(name)}, which is never called in such a file"
        )
    made = function(args)
    if made is None:
        raise UnsafePickleError(f"it calls {name.kind} with other arguments than numpy or Python write, {short(args)}")
    return made


def new_instance(cls: Any, args: Any) -> Instance:
    """What a pickle gets for an object of a class, made without arguments."""
    if not isinstance(cls, Name) or cls.kind not in CLASSES or args != ():
        raise UnsafePickleError(
            f"it makes an object of {cls.kind if isinstance(cls, Name) else short(cls)} with {short(args)}"
        )
    return Instance(cls.kind)


def build(made: Any, state: Any) -> None:
    """Give an object its state, once."""
    if isinstance(made, Instance):
        if made.state is not None or type(state) is not dict:
            raise UnsafePickleError(
                f"it gives a {made.kind} a second state, or one that is not a dictionary of attributes"
            )
        made.state = state
    elif isinstance(made, Array):
        if not isinstance(state, tuple) or len(state) != 5 or state[0] != 1 or type(state[3]) not in (bool, int):
            raise UnsafePickleError(f"it gives an array a state that numpy does not write, {short(state)}")
        made.fill(state[1], state[2], state[4])
    elif isinstance(made, Dtype):
        _order(made, state)
    else:
        raise UnsafePickleError(f"it gives a state to {short(made)}, which has none")


def _order(dtype: Dtype, state: Any) -> None:
    """Version, byte order, sub-array, names, fields, size, alignment, flags: only the byte order may say anything."""
    wanted = "|" if dtype.itemsize == 1 else "<>"
    plain = isinstance(state, tuple) and len(state) == 8 and type(state[1]) is str
    if (
        dtype.order
        or not plain
        or state[0] != 3
        or state[2:] != (None, None, None, -1, -1, 0)
        or state[1] not in tuple(wanted)
    ):
        raise UnsafePickleError(
            f"it describes numbers {dtype.code!r} by {short(state)}: only plain numbers are read, no structures or "
            "objects"
        )
    dtype.order = state[1]


def _make_dtype(args: tuple[Any, ...]) -> Dtype | None:
    if len(args) != 3 or type(args[0]) is not str or args[1:] != (False, True):
        return None
    if args[0] not in _FORMATS:
        raise UnsafePickleError(
            f"it holds an array of dtype {short(args[0])}: only plain numbers are read, no structures or objects"
        )
    return Dtype(args[0])


def _make_array(args: tuple[Any, ...]) -> Array | None:
    empty = len(args) == 3 and args[0] == NAMES["numpy", "ndarray"] and args[1] == (0,)
    one_letter = empty and isinstance(args[2], Blob) and (args[2].length == 1 or args[2].source == "b")
    return Array() if one_letter else None


def _from_buffer(args: tuple[Any, ...]) -> Array | None:
    if len(args) != 4 or type(args[3]) is not str or args[3] not in ("C", "F"):
        return None
    return Array().fill(args[2], args[1], args[0])


def _make_instance(args: tuple[Any, ...]) -> Instance | None:
    plain = len(args) == 3 and args[1] == NAMES["builtins", "object"] and args[2] is None
    return new_instance(args[0], ()) if plain else None


def _encode(args: tuple[Any, ...]) -> Blob | None:
    if len(args) != 2 or not isinstance(args[0], (str, Text)) or args[1] not in ("latin1", "latin-1"):
        return None
    return Blob(source=args[0])


def _make_set(args: tuple[Any, ...]) -> Numbers | None:
    if len(args) != 1 or type(args[0]) is not Items:
        return None
    made = Numbers()
    made.extend(args[0])
    return made


class Scalar:
    """A number of numpy: its bytes are read when the machine has the file at hand."""

    __slots__ = ("blob", "dtype")

    def __init__(self, dtype: Dtype, blob: Blob):
        self.dtype, self.blob = dtype, blob

    def read(self, data: Any) -> float | int | bool:
        """The number as Python's own."""
        raw = self.blob.read(data)
        if len(raw) != self.dtype.itemsize:
            raise UnsafePickleError(f"it holds a number of {len(raw)} bytes as {self.dtype.code!r}")
        return unpack((self.dtype.order.replace("|", "<")) + _FORMATS[self.dtype.code], raw)[0]


def _make_scalar(args: tuple[Any, ...]) -> Scalar | None:
    plain = len(args) == 2 and isinstance(args[0], Dtype) and args[0].order and isinstance(args[1], Blob)
    return Scalar(args[0], args[1]) if plain else None


_CALLS = {
    "_reconstruct": _make_array,
    "_frombuffer": _from_buffer,
    "dtype": _make_dtype,
    "scalar": _make_scalar,
    "_reconstructor": _make_instance,
    "encode": _encode,
    "set": _make_set,
}
