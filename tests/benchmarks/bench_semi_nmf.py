"""Cost of semi-NMF beside the published rule, on activations of the demo model; prints one JSON line.

Run as ``python tests/benchmarks/bench_semi_nmf.py``; ``--rows 2000 --components 50`` is a quick run. Times are CPU
seconds on one thread, and all figures but the losses are ratios within the run. Both methods have features of 1% of the
neurons and start from the same singular components.

``iteration``: an iteration of the fit over the two products X F' and Y'X. ``fit``: a whole fit over those.
``speedup``: the time at which the published rule reached its best loss over that of a whole fit. The rule runs until it
    stops by itself, for ``--paper-iterations``, or for ``--paper-seconds``, and ``paper_stopped`` says which; if it did
    not stop by itself, its best is still to come and the figure is too low.
``loss``: squared error over the sum of squares with plain non-negative least squares on the features, for the default
    (``l1=0.1``, from the mean, to which 1 is the loss of the mean alone) and the plain fit (``l1=0``) alike.
``reached``: the time at which the published rule reached its best loss over that at which the plain fit did.

``--iterations 6`` times so many iterations of the default fit alone, without its search, from k-means, and gives the
    median of the last half.
``--peer-iterations 200`` compares with overcomplete's SemiNMF, where it is installed, from its own start.
"""

import argparse
import functools
import importlib.util
import json
import sys
import time
import types
from pathlib import Path
from statistics import median

import torch
from _mlp_activations import mlp_activations

from saelens_ext.ops.nnls.solve import nnls
from saelens_ext.ops.semi_nmf.coordinate import CoordinateFit
from saelens_ext.ops.semi_nmf.fit import SemiNMFResult, semi_nmf
from saelens_ext.ops.semi_nmf.init import initialise
from saelens_ext.ops.semi_nmf.rows import Rows
from saelens_ext.ops.semi_nmf.updates import support_size


class OutOfTime(Exception):
    """The time of a fit is over."""


def trace(
    x: torch.Tensor, start: tuple, limit: float = torch.inf, **options
) -> tuple[list[tuple[float, float]], SemiNMFResult | None]:
    """(seconds, loss) after each iteration, with the final codes last, and the fit; None if its time ran out."""
    seen: list[tuple[float, float]] = []
    begin = time.process_time()

    def on_metrics(figures: dict[str, float]) -> None:
        seen.append((time.process_time() - begin, figures["loss"]))
        if seen[-1][0] > limit:
            raise OutOfTime

    try:
        fit = semi_nmf(x, start[1].shape[0], start=start, on_metrics=on_metrics, **options)
    except OutOfTime:
        return seen, None
    return [*seen, (time.process_time() - begin, fit.loss)], fit


def two_products(x: torch.Tensor, k: int) -> float:
    """Seconds of X F' and Y'X."""
    features, seconds = torch.randn(k, x.shape[1]), []
    for _ in range(5):
        begin = time.process_time()
        (x @ features.T).T @ x
        seconds.append(time.process_time() - begin)
    return median(seconds)


def iteration(x: torch.Tensor, k: int, iterations: int) -> float:
    """An iteration of the default fit, without its search, over the two products."""
    rows = Rows.of(x, center=True, equal=True).values
    start = initialise(rows, k, "kmeans", torch.Generator().manual_seed(0))
    seconds = []
    with torch.no_grad():
        fit = CoordinateFit(rows, *start, support_size(0.01, x.shape[1]), 0.1)
        for _ in range(iterations):
            begin = time.process_time()
            fit.step()
            seconds.append(time.process_time() - begin)
    return round(median(seconds[iterations // 2 :]) / two_products(rows, k), 2)


def plain_loss(x: torch.Tensor, fit: SemiNMFResult) -> float:
    """Of the features with codes by plain non-negative least squares."""
    rows = x - fit.center.to(x)
    left = rows - nnls(rows, fit.features) @ fit.features
    return float(left.double().square().sum() / x.double().square().sum())


def against_paper(x: torch.Tensor, k: int, iterations: int, seconds: float) -> dict:
    """The default and the plain fit beside the published rule."""
    unit = two_products(x, k)
    start = initialise(x, k, "svd", torch.Generator().manual_seed(0))
    paper, ended = trace(x, start, seconds, method="paper", max_iter=iterations)
    paper_seconds, best = min(paper, key=lambda entry: entry[1])
    stopped = "time" if ended is None else "by itself" if ended.converged else "iterations"
    found = {"paper_loss": best, "paper_stopped": stopped, "paper_iterations": len(paper) - (ended is not None)}
    found["paper_fit"] = paper_seconds / unit
    for name, options in (("default", {"l1": 0.1, "center": True}), ("plain", {})):
        centered = initialise(x - x.mean(dim=0), k, "svd", torch.Generator().manual_seed(0)) if options else start
        ours, fit = trace(x, centered, **options)
        seconds_of = [after[0] - before[0] for before, after in zip(ours[:-2], ours[1:-1], strict=True)]
        found |= {
            f"{name}_iteration": median(seconds_of) / unit if seconds_of else None,
            f"{name}_fit": ours[-1][0] / unit,
            f"{name}_loss": plain_loss(x, fit),
            f"{name}_speedup": paper_seconds / ours[-1][0],
        }
    reached = next((seconds for seconds, loss in ours if loss <= best), None)
    found["plain_reached"] = None if reached is None else paper_seconds / reached
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}


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
        begin = time.process_time()
        codes, features = update(x, codes, features, max_iter=stride, tol=0)
        seconds += time.process_time() - begin
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=6_000)
    parser.add_argument("--components", type=int, nargs="+", default=[100, 400])
    parser.add_argument("--paper-iterations", type=int, default=2_000)
    parser.add_argument("--paper-seconds", type=float, default=150.0)
    parser.add_argument("--peer-iterations", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)

    x, cases = mlp_activations(args.rows), []
    for k in args.components:
        if args.iterations:
            cases.append({"components": k, "default_iteration": iteration(x, k, args.iterations)})
            continue
        cases.append({"components": k} | against_paper(x, k, args.paper_iterations, args.paper_seconds))
        print(json.dumps(cases[-1]), flush=True)
        if args.peer_iterations:
            cases.append({"components": k} | against_peer(x, k, args.peer_iterations))
    print(json.dumps({"benchmark": "semi_nmf", "rows": len(x), "cases": cases}))


def against_peer(x: torch.Tensor, k: int, iterations: int) -> dict:
    """The comparison at sparsity 1.0; says so where the peer is not installed."""
    start = peer_start(x, k)
    try:
        peer = peer_trace(x, start, iterations)
    except ImportError:
        return {"other": "overcomplete is not installed"}
    return {"sparsity": 1.0, "other": "overcomplete"} | compared(trace(x, start, sparsity=1.0)[0], peer)


if __name__ == "__main__":
    main()
