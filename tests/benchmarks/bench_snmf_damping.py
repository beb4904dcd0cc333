"""What damping costs and what it buys, on real MLP activations; prints one JSON line.

Run as ``python tests/benchmarks/bench_snmf_damping.py``. Two fits to disjoint halves of the activations, judged on a
third part: ``held_out_loss``; ``active``, the share of codes above a twentieth of their feature's largest;
``cancelling``, the sum of squares of the features' own contributions over that of what they add up to; ``agreement``,
the mean correlation of the codes of one half's features with those of the other's, matched one to one. ``published
rule`` is ``method="paper"``.
"""

import argparse
import json

import torch
from _mlp_activations import mlp_activations
from scipy.optimize import linear_sum_assignment

from saelens_ext.ops.nnls import nnls
from saelens_ext.ops.semi_nmf import semi_nmf


def figures(x: torch.Tensor, features: torch.Tensor) -> dict[str, float]:
    """Of the features on activations that they were not fitted to."""
    codes = nnls(x, features).double()
    wide = features.double()
    own = codes.square() * wide.square().sum(dim=1)
    sums = codes @ wide
    return {
        "held_out_loss": float((x.double() - sums).square().sum() / x.double().square().sum()),
        "active": float((codes > codes.amax(dim=0) / 20).double().mean()),
        "cancelling": float(own.sum() / sums.square().sum()),
    }


def agreement(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean correlation of matched codes."""
    k = len(first)
    correlations = torch.corrcoef(torch.cat((nnls(x, first).T, nnls(x, second).T)))[:k, k:].nan_to_num()
    rows, columns = linear_sum_assignment(-correlations.numpy())
    return float(correlations[rows, columns].mean())


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--components", type=int, default=100)
    parser.add_argument("--init", default="svd")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    first, second, judged = mlp_activations(2 * args.rows + 4_000).split([args.rows, args.rows, 4_000])
    cases = []
    for name, options in [
        ("published rule", {"method": "paper"}),
        *((f"damping {d}", {"damping": d}) for d in (0, 0.1, 0.2, 0.5)),
    ]:
        fits = [semi_nmf(x, args.components, init=args.init, **options).features for x in (first, second)]
        case = figures(judged, fits[0]) | {"agreement": agreement(judged, *fits)}
        cases.append({"fit": name} | {key: round(value, 3) for key, value in case.items()})
    print(
        json.dumps(
            {
                "benchmark": "snmf_damping",
                "rows": args.rows,
                "components": args.components,
                "init": args.init,
                "cases": cases,
            }
        )
    )


if __name__ == "__main__":
    main()
