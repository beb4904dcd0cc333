"""Peak memory and time of assigning many activations to many exemplars; prints one JSON line.

Run as ``python tests/benchmarks/bench_assign.py`` for 1,000,000 x 576 to 20,000 exemplars (2.3 GB of input, minutes of
time); ``--rows 20000 --exemplars 2000`` is a quick run. The measurement runs in a process of its own. ``extra_mib`` is
by how much its resident memory rose at most above inputs and outputs; the bound is 1,024 MiB. On another ``--device``
it is the host's memory.
"""

import argparse
import json
import resource
import subprocess
import sys

import torch
from _timing import add_device, place, timed

from saelens_ext.ops.spherical import assign_nearest, unit_directions

MIB = 2**20


def resident_bytes() -> int:
    """Memory the process holds now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def measure(rows: int, width: int, exemplars: int, device: str) -> dict:
    """Assign once; time and memory, with the time of bare products on a part of the rows to compare."""
    generator = torch.Generator().manual_seed(0)
    center = torch.randn(width, generator=generator)
    directions = unit_directions(torch.randn(exemplars, width, generator=generator), torch.zeros(width))[0]
    # Filled in place: temporaries of the set-up would hide the peak of what is measured.
    x = torch.empty(rows, width)
    for block in x.split(4096):
        block.normal_(generator=generator).add_(center)
    x, center, directions = x.to(device), center.to(device), directions.to(device)
    assign_nearest(x[:1], center, directions)  # loads what torch loads on first use
    before = max(resident_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    seconds, (index, distances) = timed(lambda: assign_nearest(x, center, directions), device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    outputs = sum(part.numel() * part.element_size() for part in (index, distances))
    part = x[:4096]
    buffer = torch.empty(len(part), exemplars, device=device)
    torch.mm(part, directions.T, out=buffer)
    products = timed(lambda: torch.mm(part, directions.T, out=buffer), device)[0] * rows / len(part)
    return {
        "benchmark": "assign_nearest",
        "rows": rows,
        "width": width,
        "exemplars": exemplars,
        "input_mib": round((x.numel() + directions.numel()) * 4 / MIB),
        "output_mib": round(outputs / MIB),
        "extra_mib": round((peak - before - outputs) / MIB, 1),
        "bound_mib": 1024,
        "seconds": round(seconds, 2),
        "bare_products_seconds": round(products, 2),
    } | place(device)


def main() -> None:
    """Run the measurement in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--exemplars", type=int, default=20_000)
    add_device(parser)
    parser.add_argument("--here", action="store_true", help="measure in this process")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.rows, args.width, args.exemplars, args.device)))
        return
    sizes = ["--rows", str(args.rows), "--width", str(args.width), "--exemplars", str(args.exemplars)]
    sizes += ["--device", args.device]
    subprocess.run([sys.executable, __file__, "--here", *sizes], check=True)


if __name__ == "__main__":
    main()
