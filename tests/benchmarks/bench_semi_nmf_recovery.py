"""Planted groups found again, and the loss, beside the published rule from the same start; a table and one JSON line.

Run as ``python tests/benchmarks/bench_semi_nmf_recovery.py``. For each kind of data and start, over ``--seeds`` draws,
``found`` is the mean fraction of groups that a feature has a cosine above 0.9 with, and ``loss`` the mean loss.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from saelens_ext.ops.semi_nmf.fit import INITS, semi_nmf
from tests.ops.planted_groups import SHAPES, recovered


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    cases = []
    for name in args.shapes:
        shape = SHAPES[name]
        for init in INITS:
            case: dict[str, object] = {"data": name, "init": init}
            for label, options in (("default", {}), ("l1 0.05", {"l1": 0.05}), ("published", {"method": "paper"})):
                found, losses = [], []
                for seed in range(args.seeds):
                    x, features, codes = shape.make(seed)
                    generator = torch.Generator().manual_seed(seed)
                    fit = semi_nmf(x, shape.k, sparsity=shape.sparsity, init=init, generator=generator, **options)
                    found.append(recovered(features, fit.features))
                    losses.append(fit.loss)
                case |= {f"{label}: found": round(mean(found), 3), f"{label}: loss": round(mean(losses), 5)}
            cases.append(case)
            print("  ".join(f"{key} {value}" for key, value in case.items()), flush=True)
    print(json.dumps({"benchmark": "semi_nmf_recovery", "seeds": args.seeds, "cases": cases}))


if __name__ == "__main__":
    main()
