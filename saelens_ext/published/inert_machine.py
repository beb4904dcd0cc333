"""A reader of pickles that cannot run them: its own small machine for the opcodes that Python's pickler writes.

Python's unpickler is not used, not even with a restricted ``find_class``: it allocates what a file tells it to (a memo
of any index, bytes of any stated length, numpy arrays of any shape), and calls methods of what it has made. This
machine
keeps to these rules:

    names       only those of ``inert_values.NAMES``, and they give labels
    bytes       stay in the file, as long as it is; longer than the file is refused
    memo        is filled in order, so that its size is the number of objects
    nesting     64 marks; tuples to a depth of 2; no list in a list; nothing is walked recursively
    amount      opcodes, objects, list items and stack are counted against :class:`Limits`
    all else    is refused: persistent ids, extension codes, INST and OBJ, duplication, out-of-band buffers, frozen
                sets, class calls with keywords, numbers above 64 bits, anything behind the end

Its memory is that of the objects it has made, at most some 200 bytes each, and 8 bytes per list item.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pickle import decode_long
from pickletools import opcodes
from struct import Struct
from typing import Any

from saelens_ext.published import inert_values as values
from saelens_ext.published.inert_values import Blob, Instance, Items, Numbers, Scalar, Text, UnsafePickleError

_SHORT_TEXT = 64  # bytes; longer text stays in the file
_LINE = 64  # characters of a number in protocol 0
_BATCH = 4096  # opcodes between two looks at the limits
_TUPLE_DEPTH = 2


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much a pickle may make."""

    opcodes: int
    """Steps of its program."""
    objects: int
    """Objects and texts, not counting plain numbers."""
    items: int
    """Items of all lists and sets together."""
    stack: int = 20_000
    """Values put down and not yet used, within one mark; Python's pickler needs about two thousand."""
    marks: int = 64
    """Nesting."""

    @classmethod
    def of_size(cls, size: int) -> "Limits":
        """Limits for a file of ``size`` bytes: what it can honestly hold, and never more than 10 million objects."""
        return cls(
            opcodes=min(size, 300_000_000),
            objects=min(10_000 + size // 8, 10_000_000),
            items=min(10_000 + size, 50_000_000),
        )


class Machine:
    """Runs one pickle over a buffer, an open memory map or bytes."""

    def __init__(self, data: Any, limits: Limits, on_progress: Callable[[int], Any] | None = None):
        self.data, self.limits = data, limits
        self.items = 0
        """Items of all lists so far."""
        self._on_progress = on_progress
        self._size = len(data)
        self._pos = self._objects = self._frame_end = 0
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: list[Any] = []

    def run(self) -> Any:
        """The value that the pickle describes.

        Raises:
            UnsafePickleError: it is refused, with where and why.
        """
        try:
            for _ in range(0, self.limits.opcodes, _BATCH):
                if self._run_batch():
                    return self._finished()
                if len(self._stack) > self.limits.stack:
                    raise UnsafePickleError(f"it piles up more than {self.limits.stack} values")
                if self._on_progress is not None:
                    self._on_progress(self._pos)
            raise UnsafePickleError(f"it takes more than {self.limits.opcodes} steps, too many for its size")
        except IndexError:
            raise UnsafePickleError(f"it breaks off or is damaged at byte {self._pos}") from None
        except UnsafePickleError as error:
            raise UnsafePickleError(f"{error} (at byte {self._pos})") from None

    def _run_batch(self) -> bool:
        data, steps = self.data, _STEPS
        for _ in range(_BATCH):
            code = data[self._pos]
            self._pos += 1
            if code == _STOP:
                return True
            steps[code](self)
        return False

    def _finished(self) -> Any:
        if self._below or len(self._stack) != 1:
            raise UnsafePickleError("it ends with something else than one value")
        if self._pos != self._size:
            raise UnsafePickleError(f"{self._size - self._pos} bytes follow its end")
        return self._stack.pop()

    # --- reading from the file ---

    def _take(self, length: int) -> int:
        start = self._pos
        if length > self._size - start:
            raise UnsafePickleError(f"it breaks off: {length} bytes are announced, {self._size - start} are left")
        self._pos = start + length
        return start

    def _number(self, layout: Struct) -> int:
        return layout.unpack_from(self.data, self._take(layout.size))[0]

    def _line(self, longest: int | None = _LINE) -> tuple[int, int]:
        start = self._pos
        end = self.data.find(b"\n", start, self._size if longest is None else min(self._size, start + longest + 1))
        if end < 0:
            raise UnsafePickleError("it holds a line without an end, or a longer one than a number or a name needs")
        self._pos = end + 1
        return start, end - start

    def _short_line(self, longest: int = _LINE) -> str:
        start, length = self._line(longest)
        return values.decoded(self.data[start : start + length], "ascii")

    def _made(self, value: Any) -> None:
        self._objects += 1
        if self._objects > self.limits.objects:
            raise UnsafePickleError(f"it makes more than {self.limits.objects} objects, too many for its size")
        self._stack.append(value)

    def _since_mark(self) -> list[Any]:
        found, self._stack = self._stack, self._below.pop()
        return found

    def _target(self, kind: type) -> Any:
        target = self._stack[-1]
        if type(target) is not kind:
            raise UnsafePickleError(f"it adds items to {values.short(target)}")
        return target

    def _count(self, n: int) -> None:
        self.items += n
        if self.items > self.limits.items:
            raise UnsafePickleError(f"its lists hold more than {self.limits.items} items, too many for its size")

    # --- opcodes ---

    def proto(self) -> None:
        version = self.data[self._take(1)]
        if self._pos != 2 or version > 5:
            raise UnsafePickleError(
                f"it says at byte {self._pos} that it is of pickle protocol {version}; 0 to 5 are read"
            )

    def frame(self) -> None:
        length = self._number(_U8)
        if self._pos - 9 < self._frame_end or length > self._size - self._pos:
            raise UnsafePickleError(f"it announces a frame of {length} bytes that does not fit")
        self._frame_end = self._pos + length

    def mark(self) -> None:
        if len(self._below) >= self.limits.marks:
            raise UnsafePickleError(f"it nests deeper than {self.limits.marks} levels")
        if len(self._stack) > self.limits.stack:
            raise UnsafePickleError(f"it piles up more than {self.limits.stack} values")
        self._below.append(self._stack)
        self._stack = []

    def make_text(self, start: int, length: int, coding: str) -> None:
        if length > _SHORT_TEXT:
            self._made(Text(start, length, coding))
        else:
            self._made(values.decoded(self.data[start : start + length], coding))

    def sized_text(self, layout: Struct) -> None:
        length = self._number(layout)
        self.make_text(self._take(length), length, "utf-8")

    def line_text(self) -> None:
        self.make_text(*self._line(None), "raw-unicode-escape")

    def sized_bytes(self, layout: Struct) -> None:
        length = self._number(layout)
        self._made(Blob(self._take(length), length))

    def line_int(self) -> None:
        line = self._short_line()
        self._stack.append({"00": False, "01": True}[line] if line in ("00", "01") else self._whole(line))

    def line_long(self) -> None:
        self._stack.append(self._whole(self._short_line().removesuffix("L")))

    def _whole(self, line: str) -> int:
        digits = line.removeprefix("-")
        if not (digits.isascii() and digits.isdecimal() and len(digits) <= 19) or abs(int(line)) >= 2**63:
            raise UnsafePickleError(f"it holds {values.short(line)} where a whole number of 64 bits is expected")
        return int(line)

    def long(self) -> None:
        length = self.data[self._take(1)]
        if length > 8:
            raise UnsafePickleError(f"it holds a whole number of {length} bytes; up to 8 are read")
        start = self._take(length)
        self._stack.append(decode_long(self.data[start : start + length]))

    def line_float(self) -> None:
        line = self._short_line()
        try:
            self._stack.append(float(line))
        except ValueError:
            raise UnsafePickleError(f"it holds {values.short(line)} where a number is expected") from None

    def binary_float(self) -> None:
        self._stack.append(_FLOAT.unpack_from(self.data, self._take(8))[0])

    def memoize(self, place: int | None = None) -> None:
        if place is not None and place != len(self._memo):
            raise UnsafePickleError(f"it remembers a value as number {place} where {len(self._memo)} is next")
        if len(self._memo) >= self.limits.objects:
            raise UnsafePickleError(f"it remembers more than {self.limits.objects} objects, too many for its size")
        self._memo.append(self._stack[-1])

    def get(self, place: int) -> None:
        if not 0 <= place < len(self._memo):
            raise UnsafePickleError(f"it recalls value number {place} of {len(self._memo)}")
        self._stack.append(self._memo[place])

    def make_tuple(self, items: list[Any]) -> None:
        if len(items) > values.MAX_TUPLE:
            raise UnsafePickleError(f"it holds a tuple of {len(items)} entries; up to {values.MAX_TUPLE} are read")
        for item in items:
            if type(item) is tuple and any(type(inner) is tuple for inner in item):
                raise UnsafePickleError(f"it nests tuples deeper than {_TUPLE_DEPTH} levels")
        self._made(tuple(items))

    def short_tuple(self, length: int) -> None:
        if len(self._stack) < length:
            raise IndexError
        items = self._stack[-length:]
        del self._stack[-length:]
        self.make_tuple(items)

    def make_list(self) -> None:
        made = Items()
        found = self._since_mark()
        self._count(len(found))
        if found:
            made.extend(found)
        self._made(made)

    def add_items(self, kind: type) -> None:
        found = self._since_mark()
        self._count(len(found))
        if found:
            self._target(kind).extend(found)

    def append(self) -> None:
        item = self._stack.pop()
        self._count(1)
        self._target(Items).extend([item])

    def _set(self, pairs: list[Any]) -> None:
        target = self._target(dict)
        self._count(len(pairs))
        if len(pairs) % 2:
            raise IndexError
        for key, value in zip(pairs[::2], pairs[1::2]):
            if type(key) is not str or key in target:
                raise UnsafePickleError(f"it holds {values.short(key)} as the name of an attribute, or holds one twice")
            target[key] = value

    def set_items(self) -> None:
        self._set(self._since_mark())

    def set_item(self) -> None:
        if len(self._stack) < 3:
            raise IndexError
        pair = self._stack[-2:]
        del self._stack[-2:]
        self._set(pair)

    def make_dict(self) -> None:
        found = self._since_mark()
        self._made({})
        self._set(found)

    def _name(self, module: Any, name: Any) -> None:
        found = values.NAMES.get((module, name)) if type(module) is type(name) is str else None
        if found is None:
            raise UnsafePickleError(
                f"it names {values.short(module)} {values.short(name)}, which no published dictionary needs"
            )
        self._stack.append(found)

    def named(self) -> None:
        module = self._short_line()
        self._name(module, self._short_line())

    def stack_named(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._name(module, name)

    def reduce(self) -> None:
        args, name = self._stack.pop(), self._stack.pop()
        made = values.call(name, args)
        self._made(made.read(self.data) if type(made) is Scalar else made)

    def new_object(self) -> None:
        args, cls = self._stack.pop(), self._stack.pop()
        self._made(values.new_instance(cls, args))

    def build(self) -> None:
        state = self._stack.pop()
        values.build(self._stack[-1], state)

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def refuse(self, what: str) -> None:
        raise UnsafePickleError(f"it uses {what}, which no published dictionary needs")


_U1, _U2, _U4, _U8, _I4, _FLOAT = (Struct(layout) for layout in ("<B", "<H", "<I", "<Q", "<i", ">d"))
_STOP = ord(".")
_Step = Callable[[Machine], Any]
_ALLOWED: dict[str, _Step] = {
    "PROTO": Machine.proto,
    "FRAME": Machine.frame,
    "MARK": Machine.mark,
    "NONE": lambda m: m.push(None),
    "NEWTRUE": lambda m: m.push(True),
    "NEWFALSE": lambda m: m.push(False),
    "INT": Machine.line_int,
    "LONG": Machine.line_long,
    "LONG1": Machine.long,
    "FLOAT": Machine.line_float,
    "BINFLOAT": Machine.binary_float,
    "BININT": lambda m: m._stack.append(m._number(_I4)),
    "BININT1": lambda m: m._stack.append(m.data[m._take(1)]),
    "BININT2": lambda m: m._stack.append(m._number(_U2)),
    "UNICODE": Machine.line_text,
    "SHORT_BINUNICODE": lambda m: m.sized_text(_U1),
    "BINUNICODE": lambda m: m.sized_text(_U4),
    "BINUNICODE8": lambda m: m.sized_text(_U8),
    "SHORT_BINBYTES": lambda m: m.sized_bytes(_U1),
    "BINBYTES": lambda m: m.sized_bytes(_U4),
    "BINBYTES8": lambda m: m.sized_bytes(_U8),
    "BYTEARRAY8": lambda m: m.sized_bytes(_U8),
    "MEMOIZE": Machine.memoize,
    "PUT": lambda m: m.memoize(m._whole(m._short_line())),
    "BINPUT": lambda m: m.memoize(m.data[m._take(1)]),
    "LONG_BINPUT": lambda m: m.memoize(m._number(_U4)),
    "GET": lambda m: m.get(m._whole(m._short_line())),
    "BINGET": lambda m: m.get(m.data[m._take(1)]),
    "LONG_BINGET": lambda m: m.get(m._number(_U4)),
    "EMPTY_TUPLE": lambda m: m.push(()),
    "TUPLE": lambda m: m.make_tuple(m._since_mark()),
    "TUPLE1": lambda m: m.short_tuple(1),
    "TUPLE2": lambda m: m.short_tuple(2),
    "TUPLE3": lambda m: m.short_tuple(3),
    "EMPTY_LIST": lambda m: m._made(Items()),
    "LIST": Machine.make_list,
    "APPEND": Machine.append,
    "APPENDS": lambda m: m.add_items(Items),
    "EMPTY_SET": lambda m: m._made(Numbers()),
    "ADDITEMS": lambda m: m.add_items(Numbers),
    "EMPTY_DICT": lambda m: m._made({}),
    "DICT": Machine.make_dict,
    "SETITEM": Machine.set_item,
    "SETITEMS": Machine.set_items,
    "GLOBAL": Machine.named,
    "STACK_GLOBAL": Machine.stack_named,
    "REDUCE": Machine.reduce,
    "NEWOBJ": Machine.new_object,
    "BUILD": Machine.build,
}


def _steps() -> list[_Step]:
    """What each of the 256 codes does; all that are not allowed are refused by name."""
    steps: list[_Step] = [lambda m, code=code: m.refuse(f"the unknown opcode {code}") for code in range(256)]
    for opcode in opcodes:
        refused: _Step = lambda m, name=opcode.name: m.refuse(f"the opcode {name}")  # noqa: E731
        steps[ord(opcode.code)] = _ALLOWED.get(opcode.name, refused)
    return steps


_STEPS = _steps()

__all__ = ["Instance", "Limits", "Machine"]
