"""Time LeaderClustering against the bare matrix products it cannot do without; prints one JSON line.

Run as ``python tests/benchmarks/bench_clustering.py``; ``--rows 10000`` is a quick run. ``ratio`` is the median over
``--repeats`` of (clustering time) / (time of the bare products of all rows with all final exemplars, same process,
taken right after it); the bare products run in cache-sized blocks into a buffer that is reused, their fastest form
here.
"""

import argparse
import json
import statistics
import time

import torch

from saelens_ext.ops.leader_clustering import LeaderClustering
from saelens_ext.ops.spherical import spherical_center, unit_directions


def heavy_tailed_mixture(n: int, d: int, n_clusters: int, seed: int = 0) -> torch.Tensor:
    """Activations in clusters whose sizes follow Zipf's law, with norms that vary, off the origin, in random order."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 1 / torch.arange(1, n_clusters + 1).float() ** 0.8
    cluster = torch.multinomial(sizes, n, replacement=True, generator=generator)
    # Cluster means of low rank make some clusters close neighbours, as tokens of one kind are.
    means = torch.randn(n_clusters, 64, generator=generator) @ torch.randn(64, d, generator=generator) / 8
    spread = 0.3 + 0.7 * torch.rand(n_clusters, 1, generator=generator)
    x = means[cluster] + spread[cluster] * torch.randn(n, d, generator=generator)
    return x * torch.exp(0.3 * torch.randn(n, 1, generator=generator)) + 2 * torch.randn(d, generator=generator)


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def bare_products(u: torch.Tensor, exemplars: torch.Tensor, rows: int = 1024, columns: int = 2048) -> None:
    """All products, nothing kept."""
    buffer = torch.empty(rows, columns)
    for block in u.split(rows):
        for tile in exemplars.split(columns):
            torch.mm(block, tile.T, out=buffer.view(-1)[: len(block) * len(tile)].view(len(block), len(tile)))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--clusters", type=int, default=2_400)
    parser.add_argument("--threshold", type=float, default=0.585)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    x = heavy_tailed_mixture(args.rows, args.width, args.clusters)
    center = spherical_center(x[: min(args.rows, 20_000)])
    u, _ = unit_directions(x, center)
    clusterings, products = [], []
    for _ in range(args.repeats):
        clustering = LeaderClustering(center, args.threshold)
        clusterings.append(timed(lambda: clustering.partial_fit(x)))
        exemplars = clustering.exemplars
        products.append(timed(lambda: bare_products(u, exemplars)))
    ratios = [a / b for a, b in zip(clusterings, products)]
    result = {
        "benchmark": "leader_clustering",
        "rows": args.rows,
        "width": args.width,
        "regions": clustering.n_regions,
        "unseen_mass": round(clustering.unseen_mass, 4),
        "clustering_s": round(statistics.median(clusterings), 3),
        "bare_products_s": round(statistics.median(products), 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "bound": 1.5,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
