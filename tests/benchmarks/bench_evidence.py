"""Time of evidence over many concepts, against one stream pass over the sentences; prints one JSON line.

Run as ``python tests/benchmarks/bench_evidence.py`` for 24 concepts of 200 sentences and 6 methods at layer 15 of the
demo model. Concept by concept, a plain stream reads the sentences, and then the evaluation does. Times are those of the
processor on one thread, so that the load of the machine does not count. The bound is a ratio of 1.3 without the
difference of means and the probe, which no method costs; ``--references`` gives the ratio with them beside it. The
statistics are 10,000 permutations over 24 concepts and 10 pairs, whose bound is 5 s.
"""

import argparse
import json
import time
import warnings

import numpy as np
import torch

from saelens_ext.activations.stream import ActivationStream
from saelens_ext.concepts.token_activations import token_activations
from saelens_ext.demo.packaged import load_demo_corpus, load_demo_model
from saelens_ext.dictionaries.fit_exemplars import fit_exemplar_partition
from saelens_ext.evals.baselines import gaussian_directions, principal_directions, random_activations, trained_sae
from saelens_ext.evals.concepts_data import packaged_concepts
from saelens_ext.evals.detection.detection import evaluate_detection
from saelens_ext.evals.methods import Method
from saelens_ext.ops.resampling import paired_units


def methods_at(model, hook_name, n_activations):
    """Six methods made from the same activations."""
    stream = ActivationStream(model, load_demo_corpus(), hook_name, max_tokens=n_activations)
    x = torch.cat([batch.activations[hook_name] for batch in stream])
    regions = fit_exemplar_partition(stream, percentile=4).dictionary
    k, center = regions.cfg.d_sae, regions.b_dec.detach()
    return [
        Method.from_dictionary("EP exemplars", regions, basis="exemplar"),
        Method.from_dictionary("EP means", regions, basis="mean"),
        trained_sae(x, k, hook_name, training_samples=50_000),
        random_activations(x, k, hook_name, center=center),
        gaussian_directions(x, k, hook_name, center=center),
        principal_directions(x, min(k, x.shape[1]), hook_name, center=center),
    ]


def seconds_of_statistics(n_units=24, n_pairs=10):
    """Ten comparisons of 24 concepts with 10,000 permutations each."""
    values = np.random.default_rng(0).normal(size=(n_pairs + 1, n_units))
    start = time.process_time()
    for other in values[1:]:
        paired_units(values[0], other, n_permutations=10_000, generator=np.random.default_rng(0))
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--concepts", type=int, default=24)
    parser.add_argument("--per-side", type=int, default=100)
    parser.add_argument("--activations", type=int, default=5000)
    parser.add_argument("--references", action="store_true")
    parser.add_argument("--hook", default="blocks.15.hook_out")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    model = load_demo_model()
    methods = methods_at(model, arguments.hook, arguments.activations)
    seconds = dict.fromkeys(("stream", "methods", "all"), 0.0)
    for concept in packaged_concepts(n_per_side=arguments.per_side)[: arguments.concepts]:
        sentences = [*concept.positives, *concept.negatives]
        runs = {
            "stream": lambda s=sentences: list(token_activations(model, arguments.hook, s)),
            "methods": lambda c=concept: evaluate_detection(
                model, methods, [c], diff_means=False, probe=False, length=False
            ),
        }
        if arguments.references:
            runs["all"] = lambda c=concept: evaluate_detection(model, methods, [c])
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name] += time.process_time() - start
    print(
        json.dumps(
            {
                "bench": "evidence",
                "concepts": arguments.concepts,
                "sentences": 2 * arguments.per_side,
                "columns": [len(method.detector.names) for method in methods],
                "stream_s": round(seconds["stream"], 1),
                "ratio_methods": round(seconds["methods"] / seconds["stream"], 3),
                "ratio_with_references": round(seconds["all"] / seconds["stream"], 3) if arguments.references else None,
                "bound_ratio": 1.3,
                "statistics_s": round(seconds_of_statistics(), 3),
                "bound_statistics_s": 5,
            }
        )
    )


if __name__ == "__main__":
    main()
