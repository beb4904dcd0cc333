"""Nothing in a foreign pickle runs, allocates without bound or is accepted, and every refusal is one sentence."""

import json
import random
import re
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import pytest

from saelens_ext.published.convert import read_published_dictionary
from saelens_ext.published.restricted_pickle import Limits, load
from saelens_ext.published.stand_ins import NAMES, UnsafePickleError
from tests.published import foreign, hostile


def refusal_of(path: Path, content: bytes) -> str | None:
    path.write_bytes(content)
    try:
        read_published_dictionary(path, reservoir=True, metadata={})
    except UnsafePickleError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def corpus_results(tmp_path_factory):
    """What becomes of each hostile file in a process that may not grow by more than 64 MB: refusal, mark, bytes, calls.

    Work within one call of Python's own is bounded by the processor's time for all of them.
    """
    script = textwrap.dedent(
        """
        import json, resource, sys
        from pathlib import Path
        from tests.published import hostile
        from tests.published.test_hostile import refusal_of
        folder = Path(sys.argv[1])
        corpus = hostile.corpus(folder / "mark")
        path = folder / "x.pkl"
        refusal_of(path, b"N")
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**26, size + 2**26))
        seconds = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime) + 100
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        found, calls = {}, 0
        def count(frame, event, argument):
            global calls
            calls += event != "return" and event != "c_return"
        for name, content in corpus.items():
            calls = 0
            sys.setprofile(count)
            refusal = refusal_of(path, content)
            sys.setprofile(None)
            found[name] = [refusal, (folder / "mark").exists(), len(content), calls]
        (folder / "found.json").write_text(json.dumps(found))
        """
    )
    folder = tmp_path_factory.mktemp("hostile")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], cwd=root, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits a process through Linux's /proc")
def test_nothing_hostile_runs_or_is_accepted_or_takes_memory_or_work(corpus_results):
    assert len(corpus_results) > 350
    for name, (refusal, ran, n_bytes, n_calls) in corpus_results.items():
        assert refusal is not None, f"{name} was accepted"
        assert not ran, f"{name} ran"
        assert n_calls < 1000 + 20 * n_bytes, f"{name} took {n_calls} calls for {n_bytes} bytes"
        assert " is refused: " in refusal and refusal.endswith(".") and "\n" not in refusal, f"{name}: {refusal}"
        assert len(refusal.split(" is refused: ")[1]) < 220, f"{name}: {refusal}"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("os.system-0", "names 'posix' 'system'"),
        ("label-5", "names 'posix' 'system'"),
        ("eval-4", "names 'builtins' 'eval'"),
        ("name cas.os system", "names 'cas.os' 'system'"),
        ("INST", "opcode INST"),
        ("OBJ", "opcode OBJ"),
        ("EXT1", "opcode EXT1"),
        ("BINPERSID", "opcode BINPERSID"),
        ("NEXT_BUFFER", "opcode NEXT_BUFFER"),
        ("DUP", "opcode DUP"),
        ("LONG4 bomb", "opcode LONG4"),
        ("array of objects-4", "dtype 'O8'"),
        ("array of structure-5", "dtype 'V8'"),
        ("huge shape", "needs 4398046511104 bytes, with 4"),
        ("huge frombuffer", "needs 4398046511104 bytes"),
        ("negative shape", r"\(-1,\)"),
        ("memo far", "number 4294967295 where 0 is next"),
        ("huge BINBYTES8", "1099511627776 bytes are announced"),
        ("huge FRAME", "frame of 1099511627776 bytes"),
        ("FLOAT exponent", r"is damaged.*\(OverflowError\)"),
        ("many values", "piles up"),
        ("many marks", "nests deeper than 64"),
        ("many lists", "more than"),
        ("deep tuples", "nests tuples"),
        ("laughing tuples", "nests tuples"),
        ("laughing lists", "a list into a list"),
        ("hashed tuple", "set of something else"),
        ("list of itself", "a list into a list"),
        ("repeated exemplars", "repeats its content"),
        ("repeated members", "repeats its content"),
        ("repeated reservoir", "repeats its content"),
        ("repeated prompts", "repeats its content"),
        ("repeated text", "content is a list"),
        ("repeated set", "content is a list"),
        ("state of a class", "object is needed"),
        ("state of bytes", "which has none"),
        ("set of places that collide", "set of something else"),
        ("followed by 1 bytes-4", "1 bytes follow"),
    ],
)
@pytest.mark.slow
def test_refusals_say_why(corpus_results, name, why):
    assert re.search(why, corpus_results[name][0]), corpus_results[name][0]


@pytest.mark.parametrize("protocol", range(6))
def test_changed_bytes_are_read_or_refused_but_never_break_out(tmp_path, protocol):
    content = foreign.pickled(*foreign.make_state(k=2, d=4), protocol)
    draw = random.Random(protocol)
    refused = 0
    for _ in range(60):
        changed = bytearray(content)
        for _ in range(draw.choice([1, 1, 2, 5])):
            changed[draw.randrange(len(changed))] = draw.choice(
                [draw.randrange(256), ord(draw.choice("(.R)}]uebast\x93\x94q"))]
            )
        refused += refusal_of(tmp_path / "x.pkl", bytes(changed)) is not None
    assert 30 < refused < 60


def test_the_whitelist_is_what_it_should_be():
    author = {
        (m, n)
        for m in ("ep.discovery.dictionary", "cas.discovery.dictionary")
        for n in ("Dictionary", "Partition", "ConceptLibrary", "Concept")
    }
    numpy = {("numpy", "ndarray"), ("numpy", "dtype")}
    numpy |= {(f"{m}.multiarray", n) for m in ("numpy.core", "numpy._core") for n in ("_reconstruct", "scalar")}
    numpy |= {(f"{m}.numeric", "_frombuffer") for m in ("numpy.core", "numpy._core")}
    python = {(m, n) for m in ("builtins", "__builtin__") for n in ("set", "object")}
    python |= {("copyreg", "_reconstructor"), ("copy_reg", "_reconstructor"), ("_codecs", "encode")}
    assert set(NAMES) == author | numpy | python


@pytest.mark.parametrize("limit", ["opcodes", "objects", "items", "stack", "marks"])
def test_every_limit_holds(limit):
    content = foreign.pickled(*foreign.make_state(k=40, d=64))
    generous = {"opcodes": 10**6, "objects": 10**5, "items": 10**5, "stack": 10**4, "marks": 10}
    load(content, Limits(**generous))
    with pytest.raises(UnsafePickleError):
        load(content, Limits(**(generous | {limit: 1})))


WASTEFUL = {
    "whole numbers": b"M\xff\x7f",
    "floats": b"F1\n",
    "recalled": b"h\x01",
    "tuples": b"h\x01\x85" + b"M\xff\x7f" * 2,
    "texts": b"\x8c\x01x" + b"M\xff\x7f" * 2,
    "wide texts": b"\x8c\x40" + "\U0001f600".encode() + b"a" * 60,
    "dictionaries": b"(}\x8c\x01xNs" + b"M\xff\x7f" * 15 + b"t" + b"M\xff\x7f" * 15,
    "objects": b"(h\x02)\x81" + b"M\xff\x7f" * 8 + b"t",
}


@pytest.mark.parametrize("item", WASTEFUL.values(), ids=WASTEFUL)
@pytest.mark.slow
def test_memory_is_a_small_multiple_of_the_file(item):
    """What takes most memory for its bytes, as much of it as is accepted."""
    start = hostile.PROTO + b"]((N\x94" + hostile.text("a") + b"\x94" + hostile.REGION + b"\x94te"
    content = start + (b"(" + item * 300 + b"e") * (5 * 10**4 // (300 * len(item))) + b"."
    tracemalloc.start()
    load(content, Limits(opcodes=len(content), objects=len(content) // 8, items=len(content)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 1 < peak / len(content) < 20
