"""Trees of neuron groups: planted ones found again, or with ``--real`` those of a model's activations; one JSON line.

Run as ``python tests/benchmarks/bench_trees.py``. For each kind of planted tree, over ``--seeds`` draws, by the
default, ``l1=0`` and the published rule at each level:

``leaves``: mean fraction of the planted leaves that a feature of the finest level has a cosine above 0.9 with.
``tree``: adjusted Rand index of the leaves grouped by their parents, planted against found: 0 by chance, 1 at best.
``levels``: mean loss of each level.

``--real`` fits trees to two halves of the documents of mixed text (layer 15 of the demo model, ``--rows`` activations
each), and gives for each level, of documents that are in neither:

``loss`` and ``active``: by the level's own ``encode``; codes above a twentieth of the feature's largest. Mean of both.
``matched``: mean correlation of the finest features' codes, matched one to one between the two trees.
``tree``: adjusted Rand index of the matched features grouped by their ancestors at that level, tree against tree, and
    what 95% of trees with exchanged features stay below.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from _mixed_text import mixed_text
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

sys.path.insert(0, str(Path(__file__).parents[2]))

from saelens_ext import HierarchicalSNMF, fit_hierarchical_snmf
from saelens_ext.dictionaries.fit_snmf import reconstruction_loss
from tests.dictionaries.planted_trees import SHAPES, agreement, ancestors
from tests.ops.planted_groups import recovered

MODELS = {"default": {}, "l1=0": {"l1": 0}, "published": {"method": "paper"}}
EXCHANGES = 500


def on_planted(seeds: int, shapes: list[str]) -> list[dict]:
    """Planted trees found again."""
    cases = []
    for shape_name, (name, options) in ((shape, model) for shape in shapes for model in MODELS.items()):
        shape = SHAPES[shape_name]
        leaves, trees, losses = [], [], []
        for seed in range(seeds):
            x, planted = shape.make(seed)
            tree = fit_hierarchical_snmf(x, (shape.leaves, shape.parents), sparsity=shape.sparsity, **options)
            leaves.append(recovered(planted, tree.dictionaries[0].features.detach()))
            trees.append(agreement(shape, planted, tree))
            losses.append(tree.losses)
        levels = [round(mean(each), 3) for each in zip(*losses)]
        found = {"leaves": round(mean(leaves), 2), "tree": round(mean(trees), 2)}
        cases.append({"data": shape_name, "model": name} | found | {"levels": levels})
        print(cases[-1], file=sys.stderr, flush=True)
    return cases


@torch.no_grad()
def on_activations(rows: int, ranks: list[int]) -> list[dict]:
    """Trees of two halves of a model's documents."""
    bank, _, _ = mixed_text(15)
    x, out = bank.rows.float(), bank.documents % 8 == 7
    halves, held_out = [x[~out & (bank.documents % 2 == half)][:rows] for half in (0, 1)], x[out]
    cases = []
    for name in ("default", "l1=0"):
        trees = [fit_hierarchical_snmf(half, ranks, hook_name="mlp.hook_post", **MODELS[name]) for half in halves]
        codes = [tree.dictionaries[0].encode(held_out) for tree in trees]
        correlations = (
            torch.corrcoef(torch.cat([part.T for part in codes]))[: ranks[0], ranks[0] :].nan_to_num().numpy()
        )
        matched = linear_sum_assignment(-correlations)
        case = {"model": name, "matched": round(float(correlations[matched].mean()), 2)}
        cases.append(case | {"levels": [level(level_, trees, matched, held_out) for level_ in range(len(ranks))]})
        print(cases[-1], file=sys.stderr, flush=True)
    return cases


def level(number: int, trees: list[HierarchicalSNMF], matched: tuple, held_out: torch.Tensor) -> dict:
    """The figures of one level."""
    dictionaries = [tree.dictionaries[number] for tree in trees]
    active = []
    for dictionary in dictionaries:
        codes = dictionary.encode(held_out)
        active.append(float((codes > codes.amax(dim=0) / 20).float().mean()))
    losses = [reconstruction_loss(dictionary, [held_out])[0] or 0.0 for dictionary in dictionaries]
    out = {"features": dictionaries[0].cfg.d_sae, "loss": round(mean(losses), 3), "active": round(mean(active), 3)}
    if number:
        first, second = (ancestors(tree, number)[places] for tree, places in zip(trees, matched, strict=True))
        rng = np.random.default_rng(0)
        null = [adjusted_rand_score(first, rng.permutation(second)) for _ in range(EXCHANGES)]
        out["tree"] = [
            round(float(value), 2) for value in (adjusted_rand_score(first, second), np.quantile(null, 0.95))
        ]
    return out


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 16, 4])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.real:
        printed = {"rows": args.rows, "ranks": args.ranks, "cases": on_activations(args.rows, args.ranks)}
    else:
        printed = {"seeds": args.seeds, "cases": on_planted(args.seeds, args.shapes)}
    print(json.dumps({"benchmark": "trees", "real": args.real} | printed))


if __name__ == "__main__":
    main()
