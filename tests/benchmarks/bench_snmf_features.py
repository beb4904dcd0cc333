"""What features of neurons are good for, beside those of other methods, on mixed text; prints one JSON line.

Run as ``python tests/benchmarks/bench_snmf_features.py``; ``--methods`` names some, ``--layer 8`` another layer. Each
method is fitted to seven eighths of the bank's documents, and judged on the others and on labelled sentences:

``own`` and ``nnls``: squared error over the activations' sum of squares, with the method's own codes and with plain
    non-negative least squares on its directions.
``active``: fraction of the codes that exceed a twentieth of the feature's largest on the bank; ``l0``: codes above zero
    per token.
``code``, ``cosine``: AUROC of the sentences that show a concept by the largest code or cosine of one feature in the
    sentence, chosen on half of the sentences and judged on the other half, five splits both ways; mean over 15 concepts
    and its standard error over concepts. ``weekdays``: by code, of one of them.
``fires``: balanced accuracy of "the code exceeds a twentieth of the feature's largest somewhere in the sentence", of
    the feature for which that was highest on the other half.
``first``: of each feature's ten largest codes on the bank, those at position 1.
``agreement``: mean correlation of the codes of features fitted to disjoint halves of the bank, matched one to one.
``code_difference``, ``fires_difference``: the default's figure minus the method's, over the same concepts: mean, 95%
    limits, and a two-sided p by flipping signs, corrected (Holm) over all methods and both figures.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from _mixed_text import Activations, mixed_text
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata
from torch.nn.functional import normalize

from saelens_ext.ops.nnls.solve import nnls
from saelens_ext.ops.resampling import paired_units
from saelens_ext.ops.semi_nmf.fit import semi_nmf
from saelens_ext.ops.semi_nmf.rows import center_of
from saelens_ext.ops.statistics import holm

SPLITS = 5
DEFAULT = "l1 0.1"


@dataclass
class Method:
    """Features, and how they are read."""

    directions: torch.Tensor
    center: torch.Tensor
    encode: Callable[[torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None


def neuron_groups(x: torch.Tensor, k: int, origin: torch.Tensor | None = None, **options) -> Method:
    """A semi-nonnegative factorisation, encoded as a SNMFDictionary does; from its own origin or another."""
    l1 = options.get("l1", 0.0)
    fit = semi_nmf(x if origin is None else x - origin, k, center=l1 > 0 and origin is None, **options)
    center, features = fit.center.to(x) if origin is None else origin, normalize(fit.features, dim=1)
    return Method(features, center, lambda rows: nnls(rows - center, features, l1=l1), lambda g: g @ features + center)


def sae(x: torch.Tensor, k: int, active: int) -> Method:
    """SAELens' TopK SAE."""
    from saelens_ext.dictionaries.fit_sae import fit_sae

    made = fit_sae(x, k, k=active, training_samples=400_000, hook_name="blocks.15.mlp.out.hook_in")
    directions, center = normalize(made.W_dec.detach(), dim=1), made.b_dec.detach()
    return Method(directions, center, lambda rows: made.encode(rows).detach(), lambda g: made.decode(g).detach())


def projections(directions: torch.Tensor, center: torch.Tensor) -> Method:
    """Directions read by their positive products."""
    unit = normalize(directions, dim=1)
    return Method(unit, center, lambda rows: ((rows - center) @ unit.T).clamp(min=0))


def k_means(x: torch.Tensor, k: int) -> Method:
    """Centroids of scikit-learn's k-means about the mean."""
    from sklearn.cluster import KMeans

    center = x.mean(dim=0)
    made = KMeans(n_clusters=k, n_init=1, random_state=0).fit((x - center).numpy())
    return projections(torch.from_numpy(made.cluster_centers_).float(), center)


def regions(x: torch.Tensor, k: int) -> Method:
    """Exemplars of about k regions."""
    from saelens_ext.ops.leader_clustering import LeaderClustering

    center = x.mean(dim=0)
    low, high = 0.05, 1.2
    for _ in range(8):
        clustering = LeaderClustering(center, (low + high) / 2)
        clustering.partial_fit(x)
        low, high = ((low + high) / 2, high) if len(clustering.exemplars) > k else (low, (low + high) / 2)
    return projections(clustering.exemplars, center)


def methods(k: int) -> dict[str, Callable[[torch.Tensor], Method]]:
    """By name; each fits itself to activations."""

    def gaussian(x: torch.Tensor) -> Method:
        return projections(torch.randn(k, x.shape[1], generator=torch.Generator().manual_seed(0)), x.mean(dim=0))

    def neurons(x: torch.Tensor) -> Method:
        eye = torch.eye(x.shape[1])
        return projections(torch.cat((eye, -eye)), x.mean(dim=0))

    return {
        "published rule": lambda x: neuron_groups(x, k, method="paper", max_iter=300),
        "l1 0": lambda x: neuron_groups(x, k),
        **{f"l1 {l1:g}": lambda x, l1=l1: neuron_groups(x, k, l1=l1) for l1 in (0.05, 0.1, 0.15)},
        "l1 0.1, from the mean": lambda x: neuron_groups(x, k, x.mean(dim=0), l1=0.1),
        "l1 0.1, from the median": lambda x: neuron_groups(x, k, x.median(dim=0).values, l1=0.1),
        "l1 0.1, kmeans": lambda x: neuron_groups(x, k, l1=0.1, init="kmeans"),
        "l1 0.1, 5%": lambda x: neuron_groups(x, k, l1=0.1, sparsity=0.05),
        "SAE, k=8": lambda x: sae(x, k, 8),
        "SAE, k=16": lambda x: sae(x, k, 16),
        "regions": lambda x: regions(x, k),
        "k-means": lambda x: k_means(x, k),
        "single neurons": neurons,
        "random directions": gaussian,
    }


def largest_in(sentences: Activations, scores: torch.Tensor) -> torch.Tensor:
    """``(sentences, k)`` the largest score in each."""
    n = int(sentences.documents.max()) + 1
    index = sentences.documents[:, None].expand_as(scores)
    return torch.full((n, scores.shape[1]), -torch.inf).scatter_reduce_(0, index, scores, "amax")


def auroc(shown: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of each column."""
    ranks = rankdata(np.concatenate((shown, other)), axis=0)[: len(shown)].sum(axis=0)
    return (ranks / len(shown) - (len(shown) + 1) / 2) / len(other)


def balanced(shown: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Balanced accuracy of each column of truth values."""
    return (shown.mean(axis=0) + 1 - other.mean(axis=0)) / 2


def judged(score: Callable, values: np.ndarray, shown: range, other: range) -> float:
    """The score on one half of the column that has the highest on the other, over splits both ways."""
    rng, found = np.random.default_rng(0), []
    for _ in range(SPLITS):
        halves = [np.array_split(rng.permutation(part), 2) for part in (shown, other)]
        for choosing in (0, 1):
            best = np.argmax(score(*(values[half[choosing]] for half in halves)))
            found.append(float(score(*(values[half[1 - choosing]][:, [best]] for half in halves))[0]))
    return float(np.mean(found))


def figures(method: Method, held_out: torch.Tensor, bank: Activations, sentences: Activations, concepts: list) -> dict:
    """All but the agreement."""
    total = held_out.double().square().sum()
    codes = method.encode(bank.rows.float())
    largest = codes.amax(dim=0)
    out = {"features": codes.shape[1], "dead": int((largest <= 0).sum())}
    own = method.encode(held_out)
    out["active"] = float((own > largest / 20).float().mean())
    out["l0"] = float((own > 0).float().sum(dim=1).mean())
    if method.decode is not None:
        again = nnls(held_out - method.center, method.directions) @ method.directions + method.center
        for name, rows in (("own", method.decode(own)), ("nnls", again)):
            out[name] = float((held_out - rows).double().square().sum() / total)
    out["first"] = float((bank.positions[codes.topk(10, dim=0).indices] == 1).float().mean())
    rows = sentences.rows.float()
    by_code = largest_in(sentences, method.encode(rows)).numpy()
    by_cosine = largest_in(sentences, normalize(rows - method.center, dim=1) @ method.directions.T).numpy()
    firing = by_code > largest.numpy() / 20
    for name, score, values in (("code", auroc, by_code), ("cosine", auroc, by_cosine), ("fires", balanced, firing)):
        each = np.array([judged(score, values, *sets) for _, *sets in concepts])
        out[f"{name}_by_concept"] = each
        out[name], out[f"{name}_se"] = float(each.mean()), float(each.std(ddof=1) / len(each) ** 0.5)
        if name == "code":
            out["weekdays"] = float(each[-1])
    return out


def agreement(halves: list[Method], held_out: torch.Tensor) -> float:
    """Mean correlation of matched codes."""
    first, second = (half.encode(held_out) for half in halves)
    correlations = torch.corrcoef(torch.cat((first.T, second.T)))[: first.shape[1], first.shape[1] :].nan_to_num()
    rows, columns = linear_sum_assignment(-correlations.numpy())
    return float(correlations[rows, columns].mean())


def add_differences(cases: list[dict]) -> None:
    """The default minus each other method, in place; figures by concept are taken out."""
    each = [{name: case.pop(f"{name}_by_concept") for name in ("code", "cosine", "fires")} for case in cases]
    default = [values for values, case in zip(each, cases) if case["method"] == DEFAULT]
    if not default:
        return
    generator = np.random.default_rng(0)
    compared = [
        (case, name, paired_units(default[0][name], values[name], generator=generator))
        for values, case in zip(each, cases)
        if case["method"] != DEFAULT
        for name in ("code", "fires")
    ]
    for (case, name, pair), p in zip(compared, holm(np.array([pair.p for _, _, pair in compared]))):
        figures = (pair.difference, pair.low, pair.high, float(p))
        case[f"{name}_difference"] = [round(figure, 3) for figure in figures]


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--components", type=int, default=100)
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--rows", type=int, help="activations to fit to, and half as many to each half")
    parser.add_argument("--no-agreement", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    bank, sentences, concepts = mixed_text(args.layer)
    x, out = bank.rows.float(), bank.documents % 8 == 7
    available = methods(args.components)
    cases = []
    for name in args.methods or available:
        begin = time.perf_counter()
        made = available[name](x[~out][: args.rows])
        case = {"method": name, "seconds": round(time.perf_counter() - begin, 1)}
        case |= figures(made, x[out], bank, sentences, concepts)
        if not args.no_agreement:
            parts = [x[~out & (bank.documents % 2 == half)] for half in (0, 1)]
            halves = [available[name](part[: args.rows and args.rows // 2]) for part in parts]
            case["agreement"] = agreement(halves, x[out])
        cases.append({key: round(value, 3) if isinstance(value, float) else value for key, value in case.items()})
        print(name, "done", file=sys.stderr, flush=True)
    add_differences(cases)
    norms = torch.linalg.vector_norm(x - center_of(x).float(), dim=1)
    print(
        json.dumps(
            {
                "benchmark": "snmf_features",
                "layer": args.layer,
                "components": args.components,
                "rows": len(x[~out][: args.rows]),
                "largest_norm_over_median": round(float(norms.max() / norms.median()), 1),
                "cases": cases,
            }
        )
    )


if __name__ == "__main__":
    main()
