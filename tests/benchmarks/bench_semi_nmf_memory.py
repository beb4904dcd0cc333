"""Memory of semi-NMF, and a fit to a stream that is never held; prints one JSON line.

Run as ``python tests/benchmarks/bench_semi_nmf_memory.py``; each measurement runs in a process of its own.
``--stream-rows 100000`` is a quick run.

``copies``: by how much the resident memory rose at most during a fit in memory, in sizes of the activations; the bound
    is 2. With ``default`` or ``l1=0``.
``stream``: a fit to 1,000,000 activations of 1,536 neurons, made from the demo model's block by block, each a random
    one scaled and mixed with a tenth of another: seconds, CPU seconds (on one thread), passes, those over a pass's two
    products X F' and Y'X alone, and ``stream_mib`` of memory beyond what is held before.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from _mlp_activations import mlp_activations

from saelens_ext.ops.semi_nmf.fit import semi_nmf
from saelens_ext.ops.semi_nmf.streaming import semi_nmf_streaming

MIB = 2**20
MODELS = {"default": {"l1": 0.1, "center": True}, "l1=0": {}, "paper": {"method": "paper"}}


class Peak:
    """By how much the resident memory rises, in MiB, since its making. Linux only."""

    def __init__(self) -> None:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not be used in silence
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        self._before = self._read("VmRSS")

    def mib(self) -> float:
        """So far."""
        return self._read("VmHWM") - self._before

    @staticmethod
    def _read(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


class Mixed:
    """Blocks of activations, the same each time; none is held."""

    def __init__(self, base: torch.Tensor, rows: int) -> None:
        self._base, self._rows = base, rows

    def __iter__(self) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        for start in range(0, self._rows, 4096):
            size = min(4096, self._rows - start)
            first, second = (torch.randint(len(self._base), (size,), generator=generator) for _ in range(2))
            scale = 0.5 + torch.rand(size, 1, generator=generator)
            yield scale * self._base[first] + 0.1 * self._base[second]


def in_memory(rows: int, k: int, model: str) -> dict:
    """The peak of one fit."""
    x = mlp_activations(rows)
    semi_nmf(x[:500], 5, max_iter=2, **MODELS[model])  # loads what torch loads on first use
    peak = Peak()
    semi_nmf(x, k, max_iter=3, **MODELS[model])
    size = x.numel() * x.element_size() / MIB
    return {"model": model, "rows": rows, "components": k, "copies": round(peak.mib() / size, 2)}


def streamed(rows: int, k: int) -> dict:
    """One fit to a stream."""
    base = mlp_activations(4_000)
    blocks = Mixed(base, rows)
    features = torch.randn(k, base.shape[1])
    begin = time.process_time()
    (base @ features.T).T @ base
    products = (time.process_time() - begin) * rows / len(base)
    peak, begin, wall = Peak(), time.process_time(), time.perf_counter()
    fit = semi_nmf_streaming(blocks, k, **MODELS["default"])
    seconds = time.process_time() - begin
    return {
        "stream_rows": rows,
        "components": k,
        "seconds": round(time.perf_counter() - wall),
        "cpu_seconds": round(seconds),
        "passes": fit.n_passes,
        "over_products": round(seconds / fit.n_passes / products, 1),
        "stream_mib": round(peak.mib()),
        "stream_gib": round(rows * base.shape[1] * 4 / 2**30, 1),
        "loss": round(fit.loss, 4),
    }


def main() -> None:
    """Run each measurement in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16_000)
    parser.add_argument("--components", type=int, nargs="+", default=[100, 400])
    parser.add_argument("--stream-rows", type=int, default=1_000_000, help="0 leaves the stream out")
    parser.add_argument("--here", nargs="+", help="measure one thing in this process")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.here:
        what, rows, k = args.here[0], int(args.here[1]), int(args.here[2])
        print(json.dumps(streamed(rows, k) if what == "stream" else in_memory(rows, k, what)))
        return
    cases = []
    wanted = [(model, args.rows, k) for k in args.components for model in MODELS]
    for case in [*wanted, *([("stream", args.stream_rows, 100)] if args.stream_rows else [])]:
        command = [sys.executable, __file__, "--here", *map(str, case)]
        cases.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(json.dumps(cases[-1]), flush=True)
    print(json.dumps({"benchmark": "semi_nmf_memory", "cases": cases}))


if __name__ == "__main__":
    main()
