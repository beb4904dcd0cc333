"""What the names in a foreign pickle lead to: stand-ins that check and record what they are given, and do nothing.

Their size never exceeds a few words beyond what the file holds: what they are given is referred to, not copied. Only
the author's classes are classes here, since Python's unpickler makes an object of any class without calling it.
"""

from math import prod
from struct import unpack
from typing import Any

# Names of numpy's plain dtypes, and the letters that struct has for them.
_FORMATS = dict(zip(("b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"), "?bBhHiIqQefd"))


class UnsafePickleError(ValueError):
    """A foreign pickle was refused: it is damaged, too large, or does what a published dictionary has no need of."""


class StandIn:
    """Nothing but slots, and no state: a pickle cannot set an attribute of its choice."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise UnsafePickleError(f"it gives a state to {short(self)}, which has none")


class Instance(StandIn):
    """An object of one of the author's classes: its attributes."""

    __slots__ = ("state",)

    def __setstate__(self, state: Any) -> None:
        if hasattr(self, "state") or type(state) is not dict:
            raise UnsafePickleError("it gives an object a second state, or one that is no dictionary of attributes")
        self.state = state


class Dictionary(Instance):
    """A published dictionary."""

    __slots__ = ()


class Region(Instance):
    """A region of one."""

    __slots__ = ()


class Encoded(StandIn):
    """Text in the place of bytes (protocols 0 to 2)."""

    __slots__ = ("text",)


class Numbers(StandIn):
    """A set made of a list (protocols 0 to 3), still a list."""

    __slots__ = ("items",)


class Dtype(StandIn):
    """A number's type: kind and bytes as in "f4", and its byte order once known."""

    __slots__ = ("code", "itemsize", "order")

    def __setstate__(self, state: Any) -> None:
        # Version, byte order, sub-array, names, fields, size, alignment, flags: only the byte order may say anything.
        plain = [(3, order, None, None, None, -1, -1, 0) for order in ("|" if self.itemsize == 1 else "<>")]
        if self.order or type(state) is not tuple or state not in plain:
            raise UnsafePickleError(f"it describes numbers {self.code!r} by {short(state)}: only plain ones are read")
        self.order = state[1]


class Array(StandIn):
    """An array: its shape, dtype and bytes."""

    __slots__ = ("content", "dtype", "shape")

    def __setstate__(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 5 or state[0] != 1 or type(state[3]) not in (bool, int):
            raise UnsafePickleError(f"it gives an array a state that numpy does not write, {short(state)}")
        self.fill(state[4], state[2], state[1])

    def fill(self, content: Any, dtype: Any, shape: Any) -> "Array":
        """Set bytes, dtype and shape, which must fit each other."""
        whole = type(shape) is tuple and all(type(n) is int and n >= 0 for n in shape)
        if not whole or not 0 < len(shape) <= 4 or hasattr(self, "shape"):
            raise UnsafePickleError(f"it fills an array twice, or its shape is no 1 to 4 whole numbers: {short(shape)}")
        if type(dtype) is not Dtype or not dtype.order:
            raise UnsafePickleError("it holds an array without a whole dtype")
        size, needed = _size(content), prod(shape) * dtype.itemsize
        if size != needed:
            raise UnsafePickleError(f"it holds an array of shape {shape} that needs {needed} bytes, with {size}")
        self.content, self.dtype, self.shape = content, dtype, shape
        return self


def _size(content: Any) -> int:
    if type(content) not in (bytes, bytearray, Encoded):
        raise UnsafePickleError(f"it holds {short(content)} instead of bytes")
    return len(content.text if type(content) is Encoded else content)


def bytes_of(content: Any) -> bytes | bytearray:
    """Bytes, or the text that stands for them as bytes."""
    try:
        return content.text.encode("latin-1") if type(content) is Encoded else content
    except UnicodeError:
        raise UnsafePickleError("it holds text in the place of bytes that is no Latin-1") from None


# --- what the names lead to ---

_NDARRAY, _OBJECT = StandIn(), StandIn()  # named, but never called


def _encode(text: Any, coding: Any) -> Encoded:
    if type(text) is not str or coding not in ("latin1", "latin-1"):
        raise UnsafePickleError(f"it encodes {short(text)} as {short(coding)}")
    made = Encoded()
    made.text = text  # to encode it here would copy it as often as it is recalled
    return made


def _set(items: Any) -> Numbers:
    if type(items) is not list:
        raise UnsafePickleError(f"it makes a set of {short(items)}")
    made = Numbers()
    made.items = items
    return made


def _dtype(code: Any, align: Any, copy: Any) -> Dtype:
    if type(code) is not str or code not in _FORMATS or (align, copy) != (False, True):
        raise UnsafePickleError(f"it holds an array of dtype {short(code)}: only plain numbers are read")
    made = Dtype()
    made.code, made.itemsize, made.order = code, int(code[1:]), ""
    return made


def _reconstruct(kind: Any, shape: Any, letter: Any) -> Array:
    if kind is not _NDARRAY or shape != (0,) or _size(letter) != 1:
        raise UnsafePickleError(f"it makes an array as numpy does not, of shape {short(shape)}")
    return Array()


def _frombuffer(content: Any, dtype: Any, shape: Any, order: Any) -> Array:
    if order not in ("C", "F"):
        raise UnsafePickleError(f"it holds an array in the order {short(order)}")
    return Array().fill(content, dtype, shape)


def _scalar(dtype: Any, content: Any) -> Any:
    if type(dtype) is not Dtype or not dtype.order or _size(content) != dtype.itemsize:
        raise UnsafePickleError("it holds a number of numpy whose dtype and bytes do not fit")
    return unpack(dtype.order.replace("|", "<") + _FORMATS[dtype.code], bytes_of(content))[0]


def _reconstructor(cls: Any, base: Any, state: Any) -> Instance:
    if cls not in (Dictionary, Region) or base is not _OBJECT or state is not None:
        raise UnsafePickleError("it makes an object as Python does not")
    return cls()


_AUTHOR = {"Dictionary": Dictionary, "ConceptLibrary": Dictionary, "Partition": Region, "Concept": Region}
NAMES: dict[tuple[str, str], Any] = {
    **{(f"{m}.discovery.dictionary", name): cls for m in ("ep", "cas") for name, cls in _AUTHOR.items()},
    **{("numpy", "ndarray"): _NDARRAY, ("numpy", "dtype"): _dtype, ("_codecs", "encode"): _encode},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
    **{(module, "set"): _set for module in ("builtins", "__builtin__")},
    **{(module, "object"): _OBJECT for module in ("builtins", "__builtin__")},
    # Protocols 0 and 1 make an instance by copyreg._reconstructor(class, object, None).
    **{(module, "_reconstructor"): _reconstructor for module in ("copyreg", "copy_reg")},
}
"""Every name that a pickle may say, of today's and earlier versions of Python, numpy and the author's code."""


def short(value: Any) -> str:
    """A value for an error, never longer than a line."""
    entries = value if type(value) is tuple else (value,)
    if not all(isinstance(entry, (str, int, float, type(None))) for entry in entries):
        return f"a {type(value).__name__.lower()}"
    text = repr(tuple(entry[:60] if isinstance(entry, str) else entry for entry in entries))
    text = text if type(value) is tuple else text[1:-2]
    return text if len(text) <= 60 else text[:57] + "..."
