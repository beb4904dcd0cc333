"""Novelty of five kinds of text at layer 15 of the demo model, by exemplars and by what they must beat; one JSON line.

Run as ``python tests/benchmarks/bench_novelty.py``: partitions of 5,000 activations of Python's documentation, 1,500
activations of each set, at most 60 of a document. Each cell is the AUROC against other pages of that documentation and
the fraction found at 1 % false positives. ``departures`` are differences of AUROC from an earlier run on other
documents of the same kinds; more than 0.05 says that something else than the draw of documents has changed.
"""

import argparse
import json
import time
import warnings

import torch

from saelens_ext.activations.kept_stream import KeptStream
from saelens_ext.activations.stream import ActivationStream
from saelens_ext.cli.tour.evidence import CONTEXT_SIZE, HOOK, OUTSIDE, excerpts
from saelens_ext.demo.packaged import load_demo_corpus, load_demo_model, split_corpus
from saelens_ext.dictionaries.fit_exemplars import fit_exemplar_partitions
from saelens_ext.evals.concepts_data import packaged_texts
from saelens_ext.evals.novelty.novelty import evaluate_novelty

SCORES = ("EP p1", "coreset of EP p1", "knn", "mahalanobis", "EP p4")
EARLIER = {
    "news": (0.87, 0.85, 0.85, 0.89, 0.76),
    "code": (0.88, 0.87, 0.87, 0.88, 0.78),
    "tweets": (0.86, 0.86, 0.86, 0.85, 0.74),
    "random_tokens": (0.92, 0.90, 0.91, 0.81, 0.84),
    "sums in RPN": (0.58, 0.58, 0.58, 0.46, 0.43),
}


def about(texts, tokenizer, n_tokens, per_document):
    """The first texts that hold so many tokens, so that the budget of a set is not that of the reference."""
    found, total = [], 0
    for text in texts:
        if total < n_tokens:
            found.append(text)
            total += min(per_document, len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--activations", type=int, default=5000)
    parser.add_argument("--per-set", type=int, default=1500)
    parser.add_argument("--per-document", type=int, default=60)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    begin = time.process_time()
    model = load_demo_model()
    build, held_out = split_corpus(load_demo_corpus())
    # Spread over all documents: the first 5,000 activations are of three or four, about which all others would be new.
    options = {"context_size": CONTEXT_SIZE, "max_tokens": arguments.activations, "shuffle_seed": 0}
    kept = KeptStream(ActivationStream(model, excerpts(build), HOOK, **options))
    fits = fit_exemplar_partitions(kept, (1, 4))
    partitions = {f"EP p{percentile}": fit.dictionary for (_, percentile), fit in fits.items()}
    sets = {"inside": excerpts(held_out)} | {name: packaged_texts(source, n=400) for name, source in OUTSIDE.items()}
    sets = {n: about(texts, model.tokenizer, arguments.per_set, arguments.per_document) for n, texts in sets.items()}
    found = evaluate_novelty(
        model,
        partitions,
        kept,
        sets.pop("inside"),
        sets,
        built_in=("random_tokens",),
        baselines=("coreset", "knn", "mahalanobis"),
        rates=(0.01,),
        n_activations=arguments.activations,
        max_per_document=arguments.per_document,
    )
    values = found.summary().set_index(["set", "metric", "method"])["estimate"].round(3)
    cells = {
        name: {score: [values[name, metric, score] for metric in ("auroc", "tpr_at_0.01")] for score in SCORES}
        for name in EARLIER
    }
    departures = {
        name: [round(cells[name][score][0] - value, 3) for score, value in zip(SCORES, earlier)]
        for name, earlier in EARLIER.items()
    }
    content = {
        "bench": "novelty",
        "regions": {name: partition.cfg.d_sae for name, partition in partitions.items()},
        "auroc_and_tpr": cells,
        "departures": departures,
        "verdict": found.verdict(),
        "cpu_s": round(time.process_time() - begin, 1),
    }
    print(json.dumps(content))


if __name__ == "__main__":
    main()
