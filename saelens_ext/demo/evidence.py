"""All evaluations on the packaged model and data: one page and one JSON file, without a hub.

Run it with ``make evidence``, or ``python -m saelens_ext.demo.evidence``.
"""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from sae_lens import SAE
from torch import Tensor

from saelens_ext.activations.kept_stream import KeptStream
from saelens_ext.activations.stream import ActivationStream
from saelens_ext.demo.packaged import load_demo_corpus, load_demo_model, split_corpus
from saelens_ext.dictionaries.fit_exemplars import fit_exemplar_partitions
from saelens_ext.dictionaries.fit_sae import fit_sae
from saelens_ext.evals.baselines import matched_controls
from saelens_ext.evals.concepts_data import packaged_concepts
from saelens_ext.evals.detection import evaluate_detection
from saelens_ext.evals.evidence import Evidence
from saelens_ext.evals.methods import Method
from saelens_ext.evals.novelty import evaluate_novelty
from saelens_ext.evals.probing import evaluate_probes
from saelens_ext.evals.results import save_evidence
from saelens_ext.evals.synthetic import evaluate_on_synthetic

logger = logging.getLogger(__name__)

HOOK = "blocks.15.hook_out"
CONTEXT_SIZE = 128
EXCERPT = 1_000  # characters of a document, so that there are many
PERCENTILES = (1, 4)
OUTSIDE = {
    "news": "139_news_class_Politics",
    "code": "159_code_Python",
    "tweets": "149_twt_emotion_happiness",
}
"""Sets of sae-probes whose prompts are unlike the corpus."""


def excerpts(corpus: Dataset) -> list[str]:
    """Pieces of documents, each a document of its own."""
    return [
        text[start : start + EXCERPT]
        for text in corpus["text"]
        for start in range(0, min(len(text), 8 * EXCERPT), EXCERPT)
        if len(text) - start > EXCERPT // 2
    ]


def outside_sets(n_per_side: int) -> dict[str, list[str]]:
    """Prompts by kind; a set that cannot be read is left out, with a warning."""
    found = {}
    for name, dataset in OUTSIDE.items():
        try:
            (concept,) = packaged_concepts((dataset,), n_per_side=n_per_side, words=(3, 2_000))
        except (ValueError, ImportError) as error:
            logger.warning("The outside set %s is left out: %s", name, error)
            continue
        found[name] = [*concept.positives, *concept.negatives]
    return found


def collect_evidence(
    kinds: Sequence[str], *, n_activations: int, n_per_side: int, n_seeds: int, say: Callable[[str], Any]
) -> dict[str, Evidence]:
    """Run evaluations of dictionaries of the demo model.

    Args:
        kinds: of "detection", "probes", "novelty" and "synthetic".
        n_activations: to fit dictionaries to.
        n_per_side: sentences with and without each concept.
        n_seeds: synthetic models.
        say: called with a line about each stage.
    """
    found: dict[str, Evidence] = {}
    if set(kinds) - {"synthetic"}:
        say("Loading SmolLM2-135M-Instruct and reading activations")
        model = load_demo_model()
        build, held_out = split_corpus(load_demo_corpus())
        stream = ActivationStream(
            model, excerpts(build), HOOK, context_size=CONTEXT_SIZE, batch_size=16, max_tokens=n_activations
        )
        kept = KeptStream(stream)
        fits = fit_exemplar_partitions(kept, PERCENTILES)
        partitions = {f"EP p{percentile}": fit.dictionary for (_, percentile), fit in fits.items()}
    if "novelty" in kinds:
        say("Novelty: does the distance to the nearest exemplar find unfamiliar text?")
        found["novelty"] = evaluate_novelty(
            model,
            partitions,
            kept,
            excerpts(held_out),
            outside_sets(n_per_side // 2),
            n_activations=n_activations // 2,
            max_per_document=60,
        )
        say(found["novelty"].verdict())
    if set(kinds) & {"detection", "probes"}:
        x = torch.cat([rows for batch in kept for rows in batch.activations.values()])
        dictionaries = compared(partitions, x, kept)
        concepts = packaged_concepts(n_per_side=n_per_side)
    if "detection" in kinds:
        say("Detection: do regions detect concepts better than as many random activations and an SAE?")
        found["detection"] = evaluate_detection(model, detection_methods(dictionaries, x), concepts)
        say(found["detection"].verdict())
    if "probes" in kinds:
        say("Probes: how much of a linear probe is left in a dictionary's codes?")
        found["probes"] = evaluate_probes(model, dictionaries, concepts, activations=dict.fromkeys(dictionaries, x))
        say(found["probes"].verdict())
    if "synthetic" in kinds:
        say("Synthetic models: are features that are known recovered?")
        found["synthetic"] = evaluate_on_synthetic(n_seeds=n_seeds)
        say(found["synthetic"].verdict())
    return found


def compared(partitions: Mapping[str, SAE[Any]], x: Tensor, kept: KeptStream) -> dict[str, SAE[Any]]:
    """The coarser partition and an SAE of equal width, trained on the same activations."""
    name = list(partitions)[-1]
    return {name: partitions[name], "SAE": fit_sae(kept, partitions[name].cfg.d_sae, training_samples=10 * len(x))}


def detection_methods(dictionaries: Mapping[str, SAE[Any]], x: Tensor) -> list[Method]:
    """Both bases of the partition, the SAE by its codes, and as many random activations and directions."""
    (name, partition), (_, sae) = dictionaries.items()
    return [
        Method.from_dictionary(f"{name} exemplar", partition, basis="exemplar"),
        Method.from_dictionary(f"{name} mean", partition, basis="mean"),
        Method.from_dictionary("SAE", sae, similarity="code"),
        *matched_controls(partition, x),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write ``evidence.html`` and ``results.json`` into a folder."""
    parser = argparse.ArgumentParser(prog="python -m saelens_ext.demo.evidence", description=__doc__)
    parser.add_argument("--output", default="evidence_output", help="folder to write")
    parser.add_argument(
        "--kinds", default="novelty,detection,probes,synthetic", help="evaluations to run, with commas between"
    )
    parser.add_argument("--n-activations", type=int, default=5_000, help="activations to fit dictionaries to")
    parser.add_argument("--n-per-side", type=int, default=40, help="sentences with and without each concept")
    parser.add_argument("--n-seeds", type=int, default=8, help="synthetic models")
    options = parser.parse_args(arguments)
    begin, cpu = time.perf_counter(), time.process_time()
    found = collect_evidence(
        options.kinds.split(","),
        n_activations=options.n_activations,
        n_per_side=options.n_per_side,
        n_seeds=options.n_seeds,
        say=print,
    )
    about = {
        "model": "SmolLM2-135M-Instruct",
        "hook": HOOK,
        "activations": options.n_activations,
        "corpus": "Python's own documentation",
    }
    files = save_evidence(list(found.values()), options.output, about=about, title="Evidence on SmolLM2-135M-Instruct")
    print(f"{time.perf_counter() - begin:.0f} s, of which {time.process_time() - cpu:.0f} s of computing")
    print(f"The page: {files['page'].resolve()}\nThe figures: {files['results'].resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
