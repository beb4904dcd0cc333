"""Time semi-NMF to the best loss of the published rule, and of overcomplete's SemiNMF where installed; one JSON line.

Run as ``python tests/benchmarks/bench_semi_nmf.py``; ``--rows 3000 --components 50`` is a quick run. At sparsity 0.01
both methods start from the same singular components; the published rule runs ``--paper-iterations`` iterations. At
sparsity 1.0 both our fit and the peer's start from the peer's own random codes and features; the peer runs
``--peer-iterations``. ``speedup`` is (time at which the other reached its best loss) / (time at which ours was at or
below it).
"""

import argparse
import functools
import importlib.util
import json
import sys
import time
import types
from pathlib import Path

import torch
from _mlp_activations import mlp_activations

from saelens_ext.ops.semi_nmf import semi_nmf
from saelens_ext.ops.semi_nmf_init import initialise


def trace(x: torch.Tensor, start: tuple, **options) -> list[tuple[float, float]]:
    """(seconds, loss) after each iteration."""
    seen: list[tuple[float, float]] = []
    begin = time.perf_counter()
    semi_nmf(
        x,
        start[1].shape[0],
        start=start,
        on_metrics=lambda m: seen.append((time.perf_counter() - begin, m["loss"])),
        **options,
    )
    return seen


@functools.cache
def peer_update():
    """The peer's update, without the rest of the peer: its package imports vision libraries that are not needed
    here.
    """
    spec = importlib.util.find_spec("overcomplete")
    if spec is None:
        raise ImportError("overcomplete")
    for name in ("", ".optimization"):
        package = types.ModuleType(f"overcomplete{name}")
        package.__path__ = [str(Path(spec.origin).parent / name.lstrip("."))]
        sys.modules[package.__name__] = package
    data = types.ModuleType("overcomplete.data")
    data.to_npf32 = data.unwrap_dataloader = None
    sys.modules[data.__name__] = data
    return importlib.import_module("overcomplete.optimization.semi_nmf").snmf_multiplicative_update


def peer_trace(x: torch.Tensor, start: tuple, iterations: int, stride: int = 20) -> list[tuple[float, float]]:
    """The same of the peer's multiplicative updates; its loss is taken every ``stride`` iterations, off the clock."""
    update = peer_update()
    codes, features = start
    seen, seconds = [], 0.0
    total = x.double().square().sum()
    for _ in range(0, iterations, stride):
        begin = time.perf_counter()
        codes, features = update(x, codes, features, max_iter=stride, tol=0)
        seconds += time.perf_counter() - begin
        gram, product = codes.double().T @ codes.double(), codes.double().T @ x.double()
        wide = features.double()
        seen.append((seconds, float(1 + (wide * (gram @ wide - 2 * product)).sum() / total)))
    return seen


def compared(ours: list[tuple[float, float]], other: list[tuple[float, float]]) -> dict:
    """When each was at the other's best loss, and where they ended."""
    seconds, best = min(other, key=lambda entry: entry[1])
    reached = next((s for s, loss in ours if loss <= best), None)
    return {
        "other_best": round(best, 4),
        "other_s": round(seconds, 2),
        "ours_best": round(ours[-1][1], 4),
        "ours_s_to_other_best": None if reached is None else round(reached, 2),
        "ours_s": round(ours[-1][0], 2),
        "speedup": None if reached is None else round(seconds / reached, 1),
        "lower_by": round(1 - ours[-1][1] / best, 4),
    }


def peer_start(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The peer's own start, from a generator: absolute normal codes of its scale, least-squares features."""
    codes = torch.randn(len(x), k, generator=torch.Generator().manual_seed(0)).abs() * (x.abs().mean() / k).sqrt()
    return codes, torch.linalg.lstsq(codes, x).solution


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[3_000, 30_000])
    parser.add_argument("--components", type=int, nargs="+", default=[50, 100, 400])
    parser.add_argument("--paper-iterations", type=int, default=200)
    parser.add_argument("--peer-iterations", type=int, default=200)
    parser.add_argument("--max-iter", type=int, default=100)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    cases = []
    for n in args.rows:
        x = mlp_activations(n)
        for k in args.components:
            start = initialise(x, k, "svd", torch.Generator().manual_seed(0))
            paper = trace(x, start, method="paper", max_iter=args.paper_iterations)
            ours = trace(x, start, max_iter=args.max_iter)
            cases.append(
                {"rows": n, "components": k, "sparsity": 0.01, "other": "published rule"} | compared(ours, paper)
            )
            if args.peer_iterations:
                cases.append(against_peer(x, k, args) | {"rows": n, "components": k})
    print(json.dumps({"benchmark": "semi_nmf", "bound": 5, "threads": torch.get_num_threads(), "cases": cases}))


def against_peer(x: torch.Tensor, k: int, args: argparse.Namespace) -> dict:
    """The comparison at sparsity 1.0; says so where the peer is not installed."""
    start = peer_start(x, k)
    try:
        peer = peer_trace(x, start, args.peer_iterations)
    except ImportError:
        return {"sparsity": 1.0, "other": "overcomplete is not installed"}
    return {"sparsity": 1.0, "other": "overcomplete"} | compared(
        trace(x, start, sparsity=1.0, max_iter=args.max_iter), peer
    )


if __name__ == "__main__":
    main()
