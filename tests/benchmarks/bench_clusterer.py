"""Time the published 20-cell grid of the joint clusterer against one k-means; prints one JSON line.

Run as ``python tests/benchmarks/bench_clusterer.py`` for 500 continuations with 4,096 sparse heavy-tailed sources in
eight modes; ``--dense`` makes every source non-zero, ``--paper`` uses the published scaling, ``--rows`` and
``--sources`` change the size. ``ratio`` is the time of the grid over that of ``KMeans(n_clusters=16, n_init=10)`` on
the concatenated views, the medians of ``--repeats`` taken in turn in one process with one thread; times are of the
processor, so that other work on the machine does not count. ``above`` counts cells whose objective exceeds that of the
planted partition or of one cluster.

``--growth 500 1000 2000 5000`` times the grid at each of these numbers of rows; ``per_row`` is the time of a row, over
that at the first of them: 1 throughout is linear growth.
"""

import argparse
import json
import time
import tracemalloc
from collections.abc import Callable
from statistics import median

import numpy as np
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from saelens_ext.continuations.clustering.joint_clusterer import rate_distortion_path
from saelens_ext.continuations.clustering.path import RateDistortionPath


def planted(n: int, d: int, *, noise: float, dense: bool, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Views, weights and modes."""
    rng = np.random.default_rng(seed)
    mode = rng.permutation(np.arange(n) % 8)
    semantic = rng.normal(size=(8, 384))[mode] + noise * rng.normal(size=(n, 384))
    pattern = ((rng.random((8, d)) < 0.03) * rng.standard_t(2, size=(8, d)))[mode]
    if dense:
        sources = 3 * pattern + 0.3 * noise * rng.standard_t(2, size=(n, d))
    else:
        sources = pattern * np.exp(0.5 * rng.normal(size=(n, d))) * (rng.random((n, d)) < 0.8)
        sources += noise * (rng.random((n, d)) < 0.03) * rng.standard_t(1.5, size=(n, d))
    return semantic / np.linalg.norm(semantic, axis=1, keepdims=True), sources, np.exp(rng.normal(size=n)), mode


def count_above(path: RateDistortionPath, mode: np.ndarray) -> int:
    """Cells above the planted partition or one cluster."""
    partitions = [path.problem.views.clusters(labels) for labels in (mode, np.zeros_like(mode))]
    return sum(
        point.objective > min(path.problem.place(part, point.beta, point.gamma).objective for part in partitions) + 1e-9
        for point in path.points
    )


def timed(make: Callable[[], object]) -> tuple[float, object]:
    """Seconds of the processor, and what was made."""
    start = time.process_time()
    made = make()
    return time.process_time() - start, made


def grown(rows: list[int], sources: int, *, noise: float, dense: bool, scaling: str) -> list[dict]:
    """The grid at several numbers of rows."""
    cases = []
    for n in rows:
        semantic, view, weights, _ = planted(n, sources, noise=noise, dense=dense)
        seconds, _ = timed(
            lambda: rate_distortion_path(semantic, view, sample_weight=weights, scaling=scaling, random_state=0)
        )
        cases.append({"rows": n, "grid_seconds": round(seconds, 2)})
        cases[-1]["per_row"] = round(seconds / n / (cases[0]["grid_seconds"] / rows[0]), 2)
    return cases


def main() -> None:
    """Time both in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--sources", type=int, default=4096)
    parser.add_argument("--noise", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--growth", type=int, nargs="+")
    parser.add_argument("--memory", action="store_true", help="trace allocations of one more run")
    args = parser.parse_args()
    semantic, sources, weights, mode = planted(args.rows, args.sources, noise=args.noise, dense=args.dense)
    scaling = "paper" if args.paper else "balanced"
    if args.growth:
        with threadpool_limits(1):
            cases = grown(args.growth, args.sources, noise=args.noise, dense=args.dense, scaling=scaling)
        line = {"benchmark": "rate_distortion_path_growth", "sources": args.sources, "dense": args.dense}
        print(json.dumps(line | {"scaling": scaling, "cases": cases}))
        return

    def grid() -> RateDistortionPath:
        return rate_distortion_path(semantic, sources, sample_weight=weights, scaling=scaling, random_state=0)

    both, k_means, path = np.hstack([semantic, sources]), [], []
    with threadpool_limits(1):
        for _ in range(args.repeats):
            k_means.append(timed(lambda: KMeans(n_clusters=16, n_init=10, random_state=0).fit(both))[0])
            seconds, found = timed(grid)
            path.append(seconds)
        peak = None
        if args.memory:
            tracemalloc.start()
            grid()
            peak = round(tracemalloc.get_traced_memory()[1] / 2**20)
    line = {
        "benchmark": "rate_distortion_path",
        "rows": args.rows,
        "sources": args.sources,
        "dense": args.dense,
        "scaling": scaling,
        "grid_seconds": round(median(path), 2),
        "k_means_seconds": round(median(k_means), 2),
        "ratio": round(median(path) / median(k_means), 2),
        "bound": 3,
        "above": int(count_above(found, mode)),
        "clusters": [point.n_clusters for point in found.points],
        "peak_mib": peak,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
