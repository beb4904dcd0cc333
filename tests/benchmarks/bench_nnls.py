"""Time non-negative least squares against the bare product ``x @ features.T``; prints one JSON line.

Run as ``python tests/benchmarks/bench_nnls.py``; ``--rows 20000`` is a quick run. The features are fitted to the same
kind of activations. ``ratio`` is the median over ``--repeats`` of (time of nnls) / (time of the product, taken right
before). Where the activations are fewer than the rows asked for, they are repeated with one part in a hundred of noise.
"""

import argparse
import json
import statistics

import torch
from _mlp_activations import mlp_activations
from _timing import add_device, place, timed

from saelens_ext.ops.nnls.solve import nnls
from saelens_ext.ops.precision import wide
from saelens_ext.ops.semi_nmf.fit import semi_nmf


def repeated(x: torch.Tensor, rows: int) -> torch.Tensor:
    """As many rows, no two equal."""
    x = x[torch.arange(rows) % len(x)]
    return x + 0.01 * x.std() * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def largest_kkt(x: torch.Tensor, features: torch.Tensor, codes: torch.Tensor) -> float:
    """The largest relative violation of the optimality conditions, in float64."""
    x, features, codes = wide(x), wide(features), wide(codes)
    features = features / features.norm(dim=1, keepdim=True)
    codes = codes * 1.0
    left = (x - codes @ features) @ features.T
    violation = torch.where(codes > 0, left.abs(), left.clamp(min=0)).amax(dim=1)
    return float((violation / (x @ features.T).abs().amax(dim=1)).max())


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--features", type=int, default=400)
    parser.add_argument("--fit-rows", type=int, default=10_000)
    parser.add_argument("--fit-iterations", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_device(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    x = mlp_activations(30_000)
    features = semi_nmf(x[: args.fit_rows], args.features, max_iter=args.fit_iterations).features
    x, features = repeated(x, args.rows).to(args.device), features.to(args.device)
    x[:4096] @ features.T, nnls(x[:4096], features)
    products, solutions = [], []
    for _ in range(args.repeats):
        products.append(timed(lambda: x @ features.T, args.device)[0])
        seconds, codes = timed(lambda: nnls(x, features), args.device)
        solutions.append(seconds)
    ratios = [a / b for a, b in zip(solutions, products)]
    print(
        json.dumps(
            {
                "benchmark": "nnls",
                "rows": args.rows,
                "features": args.features,
                "positive_codes": round(float((codes > 0).float().mean()), 3),
                "largest_relative_kkt": largest_kkt(x[:2000], features, codes[:2000] * features.norm(dim=1)),
                "nnls_s": round(statistics.median(solutions), 3),
                "product_s": round(statistics.median(products), 3),
                "ratio": round(statistics.median(ratios), 2),
                "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
                "bound": 10,
            }
            | place(args.device)
        )
    )


if __name__ == "__main__":
    main()
