"""Planted groups of groups and the trees that hierarchies make of them; prints one JSON line.

Run as ``python tests/benchmarks/bench_trees.py``. Three groups of four features each, whose neurons are their own but
for one that the four share; a group is in 40% of 600 activations. ``pure``: groups that a root of the tree gathers at
least two features of and no other's (links above 0.3 of the largest), of three in each of ``--seeds`` draws.
``levels``: mean loss of each level. With as many features as were planted, and with one more at each level.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parents[2]))

from saelens_ext import HierarchicalSNMF, fit_hierarchical_snmf
from saelens_ext.dictionaries.hierarchy import ConceptNode
from tests.dictionaries.test_hierarchy import planted


def leaves(node: ConceptNode) -> set[int]:
    """The finest features below a node."""
    return {node.feature} if node.level == 0 else set().union(*map(leaves, node.children))


def pure(tree: HierarchicalSNMF) -> int:
    """Groups that a root has to itself."""
    group = tree.dictionaries[0].features[:, 36:].abs().argmax(dim=1).tolist()
    gathered = [leaves(root) for root in tree.trees(min_weight=0.3, max_children=12)]
    return len({group[min(one)] for one in gathered if len(one) > 1 and len({group[i] for i in one}) == 1})


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args()
    cases = []
    for ranks in ((12, 6, 3), (13, 7, 4)):
        for name, options in (("default", {}), ("l1=0", {"l1": 0})):
            trees = [
                fit_hierarchical_snmf(planted(seed), ranks, sparsity=4 / 39, max_iter=40, **options)
                for seed in range(args.seeds)
            ]
            levels = [round(mean(losses), 3) for losses in zip(*(tree.losses for tree in trees))]
            cases.append({"ranks": ranks, "model": name, "pure": sum(map(pure, trees)), "levels": levels})
    print(json.dumps({"benchmark": "trees", "seeds": args.seeds, "groups": 3 * args.seeds, "cases": cases}))


if __name__ == "__main__":
    main()
