"""Pickles that no reader should run, hold or accept: name -> bytes. Each would leave a mark file if it could run."""

import copyreg
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.published import foreign

PROTO = b"\x80\x04"
HUGE = 2**40


class Calls:
    """Pickles as a call of whatever it is given."""

    def __init__(self, function, *args):
        self._reduced = (function, args)

    def __reduce__(self):
        return self._reduced


class TextSubclass(str):
    pass


def text(value: str) -> bytes:
    raw = value.encode()
    return b"\x8c" + bytes([len(raw)]) + raw


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def sized(code: bytes, length: int, layout: str = "<Q") -> bytes:
    return code + struct.pack(layout, length)


DTYPE = (
    named("numpy", "dtype")
    + text("f4")
    + b"\x89\x88\x87R(K\x03"
    + text("<")
    + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
)
EMPTY_ARRAY = named("numpy.core.multiarray", "_reconstruct") + named("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R"
ENCODED = named("_codecs", "encode") + text("a") + text("latin1") + b"\x86R"
DICTIONARY = named("ep.discovery.dictionary", "Dictionary")
REGION = named("ep.discovery.dictionary", "Partition")


def array_of(shape: bytes, dtype: bytes = DTYPE, content: bytes = b"C\x04\x00\x00\x80?") -> bytes:
    return EMPTY_ARRAY + b"(K\x01" + shape + dtype + b"\x89" + content + b"tb"


def big(number: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", number)


def calls(mark: Path) -> dict[str, bytes]:
    """What would run code, under every protocol."""
    command = f"touch {mark}"
    reduced = {
        "os.system": (os.system, command),
        "eval": (eval, f"open({str(mark)!r}, 'w')"),
        "exec": (exec, f"open({str(mark)!r}, 'w')"),
        "getattr": (getattr, "x", "upper"),
        "open": (open, str(mark), "w"),
        "np.load": (np.load, str(mark)),
        "np.fromfile": (np.fromfile, str(mark)),
        "bytearray": (bytearray, HUGE),
        "range": (range, 10),
        "np.zeros": (np.zeros, (HUGE,)),
    }
    found = {f"{name}-{p}": pickle.dumps(Calls(*call), protocol=p) for name, call in reduced.items() for p in range(6)}
    state, regions = foreign.make_state()
    for p in range(6):
        regions[2]["label"] = Calls(os.system, command)
        found[f"label-{p}"] = foreign.pickled(state, regions, p)
        regions[2]["label"] = TextSubclass("a label")
        found[f"str subclass-{p}"] = foreign.pickled(state, regions, p)
    return found


def names(mark: Path) -> dict[str, bytes]:
    """Names that look allowed and are not."""
    wrong = [
        ("cas.os", "system"),
        ("cas.discovery.dictionary", "os"),
        ("cas.discovery.pipeline", "Dictionary"),
        ("ep.os", "system"),
        ("ep.discovery.dictionary", "pickle.loads"),
        ("ep.discovery.dictionary", "Dictionary.from_hub"),
        ("ep.discovery", "dictionary"),
        ("numpy", "load"),
        ("numpy", "ndarray.tofile"),
        ("numpy.core.multiarray", "fromfile"),
        ("numpy._core.multiarray", "_frombuffer"),
        ("numpy.core.numeric", "load"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("builtins", "bytearray"),
        ("_codecs", "decode"),
        ("posix", "system"),
        ("copyreg", "__newobj__"),
        ("copyreg", "add_extension"),
        ("functools", "partial"),
        ("", ""),
        ("pickle", "loads"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_tensor_v2"),
    ]
    found = {
        f"name {module} {name}": PROTO + named(module, name) + text(f"touch {mark}") + b"\x85R."
        for module, name in wrong
    }
    found |= {f"GLOBAL {module} {name}": f"c{module}\n{name}\n(S'touch {mark}'\ntR.".encode() for module, name in wrong}
    return found | {
        "name from bytes": PROTO + b"C\x05numpy" + b"C\x05dtype" + b"\x93.",
        "name from a list": PROTO + b"]" + text("dtype") + b"\x93.",
        "newline in a name": b"cos\nsystem\n(S'x'\ntR.",
    }


def opcodes(mark: Path) -> dict[str, bytes]:
    """Opcodes that Python's pickler does not write for plain data."""
    command = f"touch {mark}".encode()
    copyreg.add_extension("posix", "system", 0x7F)
    try:
        extension = pickle.dumps(Calls(os.system, command.decode()), protocol=4)
    finally:
        copyreg.remove_extension("posix", "system", 0x7F)
    return {
        "INST": b"(V" + command + b"\nios\nsystem\n.",
        "OBJ": PROTO + b"(" + DICTIONARY + text(command.decode()[:60]) + b"o.",
        "EXT1": extension,
        "EXT2": PROTO + b"\x83\x01\x01.",
        "EXT4": PROTO + b"\x84\x01\x00\x00\x01.",
        "PERSID": b"P42\n.",
        "BINPERSID": PROTO + text("id") + b"Q.",
        "NEXT_BUFFER": b"\x80\x05\x97.",
        "READONLY_BUFFER": b"\x80\x05\x98.",
        "out of band": pickle.dumps(np.arange(4.0), protocol=5, buffer_callback=lambda buffer: None),
        "STRING": b"S'abc'\n.",
        "BINSTRING": b"T\x03\x00\x00\x00abc.",
        "SHORT_BINSTRING": b"U\x03abc.",
        "DUP": PROTO + b"N2.",
        "NEWOBJ_EX": PROTO + DICTIONARY + b")}\x92.",
        "FROZENSET": PROTO + b"(K\x01\x91.",
        "LONG4": PROTO + b"\x8b\x01\x00\x00\x00\x01.",
        "POP": PROTO + b"NN0.",
        "POP_MARK": PROTO + b"N(N1.",
        "unknown": PROTO + b"\xff.",
        "protocol 6": b"\x80\x06N.",
        "protocol late": PROTO + b"N\x80\x04.",
    }


def arrays() -> dict[str, bytes]:
    """Arrays that are not what they say, or too large to be true."""
    objects = np.empty(2, dtype=object)
    state, regions = foreign.make_state()
    found = {}
    kinds = {
        "objects": objects,
        "structure": np.zeros(16, dtype=[("a", "O")]),
        "record": np.zeros(16, dtype=[("a", "f4")]),
        "dates": np.zeros(16, "M8[s]"),
        "text": np.zeros(16, "U3"),
        "void": np.zeros(16, "V8"),
        "complex": np.zeros(16, "c8"),
        "chars": np.char.array(["a"] * 16),
        "masked": np.ma.zeros(16),
    }
    for name, value in kinds.items():
        for p in range(6):
            found[f"array of {name}-{p}"] = foreign.pickled(state | {"center": value}, regions, p)
    huge = big(HUGE)
    other = named("numpy", "dtype") + text("f4") + b"\x89\x88\x87R"
    return found | {
        "huge shape": PROTO + array_of(huge + b"\x85") + b".",
        "huge product": PROTO + array_of(huge + huge + huge + b"\x87") + b".",
        "negative shape": PROTO + array_of(big(-1) + b"\x85") + b".",
        "float shape": PROTO + array_of(b"G?\xf0\x00\x00\x00\x00\x00\x00\x85") + b".",
        "bool shape": PROTO + array_of(b"\x88\x85") + b".",
        "no shape": PROTO + array_of(b")") + b".",
        "many dimensions": PROTO + array_of(b"(" + b"K\x01" * 12 + b"t") + b".",
        "list content": PROTO + array_of(b"K\x01\x85", content=b"]") + b".",
        "unordered dtype": PROTO + array_of(b"K\x01\x85", dtype=other) + b".",
        "filled twice": PROTO + array_of(b"K\x01\x85") + b"(K\x01K\x01\x85" + DTYPE + b"\x89C\x04\x00\x00\x80?tb.",
        "huge reconstruct": PROTO + EMPTY_ARRAY.replace(b"K\x00\x85", huge + b"\x85") + b".",
        "ndarray called": PROTO + named("numpy", "ndarray") + huge + b"\x85\x85R.",
        "sub-array dtype": PROTO + DTYPE.replace(b"NNN", b"K\x01NN") + b".",
        "dtype with a count": PROTO + DTYPE.replace(b"f4", b"99") + b".",
        "dtype aligned": PROTO + DTYPE.replace(b"\x89\x88", b"\x88\x89") + b".",
        "huge frombuffer": PROTO
        + named("numpy.core.numeric", "_frombuffer")
        + b"(C\x04abcd"
        + DTYPE
        + huge
        + b"\x85"
        + text("C")
        + b"tR.",
        "scalar of objects": PROTO
        + named("numpy.core.multiarray", "scalar")
        + DTYPE.replace(b"f4", b"O8")
        + b"N\x86R.",
        "scalar too short": PROTO + named("numpy.core.multiarray", "scalar") + DTYPE + b"C\x01a\x86R.",
    }


def amounts() -> dict[str, bytes]:
    """What would fill memory or time: lengths without content, bombs, and nesting."""
    lengths = {"BINBYTES8": b"\x8e", "BYTEARRAY8": b"\x96", "BINUNICODE8": b"\x8d", "FRAME": b"\x95"}
    found = {f"huge {name}": PROTO + sized(code, HUGE) + b"." for name, code in lengths.items()}
    found |= {f"endless {name}": PROTO + sized(code, 2**64 - 1) + b"." for name, code in lengths.items()}
    twice = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(200))
    lists = b"".join(b"]\x94(" + b"h" + bytes([i]) + b"h" + bytes([i]) + b"e" for i in range(200))
    deep = b"N" + b"\x85" * 10**5
    return found | {
        "BINBYTES": PROTO + sized(b"B", 2**31, "<I") + b".",
        "BINUNICODE": PROTO + sized(b"X", 2**32 - 1, "<I") + b".",
        "LONG4 bomb": PROTO + sized(b"\x8b", 2**31 - 1, "<i") + b".",
        "LONG1 bomb": PROTO + b"\x8a\xff" + b"\x7f" * 255 + b".",
        "LONG digits": b"L" + b"9" * 10**6 + b"L\n.",
        "INT digits": b"I" + b"9" * 10**6 + b"\n.",
        "INT base": b"I0x10\n.",
        "INT spaces": b"I 1_0 \n.",
        "FLOAT word": b"Fhello\n.",
        "FLOAT digits": b"F" + b"1" * 10**6 + b"\n.",
        "FLOAT exponent": b"(lF1e999\na.",
        "unended line": b"I1",
        "memo far": PROTO + b"N" + sized(b"r", 2**32 - 1, "<I") + b".",
        "memo gap": PROTO + b"Nq\x05.",
        "memo PUT": b"Np4000000000\n.",
        "memo again": PROTO + b"Nq\x00q\x00.",
        "recall": PROTO + b"h\x00.",
        "recall far": PROTO + sized(b"j", 2**32 - 1, "<I") + b".",
        "recall negative": b"g-1\n.",
        "many memos": PROTO + b"N" + b"\x94" * 10**6 + b".",
        "many lists": PROTO + b"](" + b"N)" * 10**5 + b"]" * 10**6 + b".",
        "many values": PROTO + b"N" * 10**6 + b".",
        "many marks": PROTO + b"(" * 10**6 + b".",
        "deep tuples": PROTO + deep + b".",
        "deep lists": PROTO + b"]" * 5000 + b"a" * 4999 + b".",
        "laughing tuples": PROTO + b"N\x94" + twice + b".",
        "laughing lists": PROTO + b"N\x94" + lists + b".",
        "hashed tuple": PROTO + b"N\x94" + b"h\x00h\x00\x86\x85\x94" + b"\x8f(h\x01\x90.",
        "tuple of a thousand": PROTO + b"(" + b"N" * 1000 + b"t.",
        "list of itself": PROTO + b"]\x94h\x00a.",
        "attribute of itself": PROTO + b"}\x94" + text("a") + b"h\x00s.",
        "object of itself": PROTO + DICTIONARY + b")\x81\x94}" + text("partitions") + b"]h\x00asb.",
        "key of a tuple": PROTO + b"}))s.",
        "key twice": PROTO + b"}(" + (text("a") + b"N") * 2 + b"u.",
        "odd pairs": PROTO + b"}(" + text("a") + b"u.",
        "appended to a tuple": PROTO + b")(Ne.",
        "appended to an object": PROTO + DICTIONARY + b")\x81Na.",
        "items of an object": PROTO + DICTIONARY + b")\x81" + text("a") + b"Ns.",
        "state of a list": PROTO + b"]}b.",
        "state twice": PROTO + DICTIONARY + b")\x81}b}b.",
        "state with slots": PROTO + DICTIONARY + b")\x81N}\x86b.",
        "state of a class": PROTO + DICTIONARY + b"}b.",
        "state of a function": PROTO + named("numpy", "dtype") + b"N}(" + text("order") + b"Nu\x86b.",
        "state of bytes": PROTO + ENCODED + b"N}(" + text("text") + b"Nu\x86b.",
        "a dtype never called": PROTO + named("numpy", "dtype") + text("f4") + b"\x89\x88\x87\x81.",
        "bytes never encoded": PROTO + named("_codecs", "encode") + b")\x81.",
        "object with arguments": PROTO + DICTIONARY + b"K\x01\x85\x81.",
        "class called": PROTO + DICTIONARY + b")R.",
        "number called": PROTO + b"K\x01)R.",
        "set of texts": PROTO + b"\x8f(" + text("a") + b"\x90.",
        "empty stack": PROTO + b".",
        "nothing to pop": PROTO + b"a.",
        "only a mark": PROTO + b"(.",
        "bad text": PROTO + b"\x8c\x02\xff\xfe.",
        "bad escape": b"V\\u12\n.",
        "wrong encoding": b"c_codecs\nencode\n(Vabc\nVrot13\ntR.",
        "plain number": PROTO + b"K\x01.",
        "plain list": PROTO + b"].",
        "a region alone": PROTO + REGION + b")\x81}b.",
        "no state": PROTO + DICTIONARY + b")\x81.",
        "frame in a frame": PROTO + sized(b"\x95", 12) + sized(b"\x95", 1) + b"NN.",
    }


def repeats() -> dict[str, bytes]:
    """Small files whose objects share their content through the memo, so that copies of it would fill memory."""
    found = {}
    for name, key in (
        ("exemplars", None),
        ("members", "constituent_sample_indices"),
        ("prompts", "sample_prompts"),
        ("reservoir", "sample_members"),
    ):
        state, regions = foreign.make_state(k=2)
        region = regions[0]
        if key == "constituent_sample_indices":
            region[key] = list(range(20_000))
        elif key == "sample_prompts":
            region[key] = [
                (0.0, "a prompt that is long enough to stay in the file, and is of no interest" * 2, 1)
            ] * 5000
        elif key == "sample_members":
            region[key] = region[key][:1] * 5000
        else:
            state["center"] = np.ones(20_000, dtype=np.float32)
            region["exemplar_direction"] = region["mean_member_direction"] = foreign.unit(np.ones(20_000))
        found[f"repeated {name}"] = foreign.pickled_shared(state, region, 3000)
    # A text, a list and a set that are recalled in every call.
    long = b"X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"\x94" + text("latin1") + b"\x94"
    numbers = b"](" + b"K\x01" * 15_000 + b"e\x94"
    first_text = b"](" + b"(" + named("_codecs", "encode") + b"\x94" + long + b"t"
    first_set = b"](" + b"(" + named("builtins", "set") + b"\x94" + numbers + b"t"
    return found | {
        "repeated text": PROTO + first_text + b"h\x00h\x01h\x02\x86R" * 10**4 + b"e.",
        "repeated set": PROTO + first_set + b"h\x00h\x01\x85R" * 10**4 + b"e.",
        "set of places that collide": PROTO + b"\x8f(" + b"".join(map(big, range(0, 2**62, 2**50))) + b"\x90.",
    }


def damaged() -> dict[str, bytes]:
    """A valid file cut short, or followed by something."""
    found = {}
    for p in range(6):
        whole = foreign.pickled(*foreign.make_state(k=3), p)
        found |= {f"cut to {n}-{p}": whole[:n] for n in range(0, len(whole), max(1, len(whole) // 12)) if n}
        found |= {f"followed by {len(tail)} bytes-{p}": whole + tail for tail in (b"\x00", b".", whole)}
    return found


def corpus(mark: Path) -> dict[str, bytes]:
    """All of them."""
    parts: list[Callable[[], dict[str, bytes]]] = [
        lambda: calls(mark),
        lambda: names(mark),
        lambda: opcodes(mark),
        arrays,
        amounts,
        repeats,
        damaged,
    ]
    return {name: content for part in parts for name, content in part().items()}
