"""All evaluations on the packaged model and data: one page and one JSON file, without a hub.

Run it with ``make evidence``, or ``python -m saelens_ext.cli.tour.evidence``.
"""

import argparse
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import SAE
from torch import Tensor

from saelens_ext.activations.kept_stream import KeptStream
from saelens_ext.activations.stream import ActivationStream
from saelens_ext.demo.packaged import load_demo_corpus, load_demo_model, split_corpus
from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from saelens_ext.dictionaries.fit_exemplars import fit_exemplar_partitions
from saelens_ext.dictionaries.fit_sae import fit_sae
from saelens_ext.dictionaries.fit_snmf import fit_snmf
from saelens_ext.evals.baselines import kmeans_directions, matched_controls, principal_directions, single_neurons
from saelens_ext.evals.concepts_data import Concept, normal_form, packaged_concepts, packaged_texts
from saelens_ext.evals.detection.detection import evaluate_detection
from saelens_ext.evals.detection.probing import evaluate_probes
from saelens_ext.evals.dictionaries.synthetic import evaluate_on_synthetic
from saelens_ext.evals.evidence import Evidence
from saelens_ext.evals.methods import Method
from saelens_ext.evals.novelty.novelty import evaluate_novelty
from saelens_ext.evals.results import save_evidence
from saelens_ext.evals.steering.steering import compare_steering
from saelens_ext.host.models import HostModel
from saelens_ext.steering.judges import EmbeddingJudge
from saelens_ext.steering.sampling import SamplingOptions

logger = logging.getLogger(__name__)

QUICK = ("novelty", "detection", "probes", "synthetic")
KINDS = (*QUICK, "steering")
HOOK = "blocks.15.hook_out"
NEURON_HOOK = "blocks.15.mlp.out.hook_in"
CONTEXT_SIZE = 128
EXCERPT = 1_000  # characters of a document, so that there are many
PERCENTILES = (1, 4)
OUTSIDE = {
    "news": "97_news_class",
    "code": "159_code_Python",
    "tweets": "102_twt_emotion",
    "sums in RPN": "40_arith_rpn",
}
"""Sets of sae-probes whose prompts are unlike the corpus."""
TOPICS = (
    "21_headline_istrump", "22_headline_isobama", "23_headline_ischina", "24_headline_isiran", "66_living-room",
    "67_social-security", "68_credit-card", "69_blood-pressure", "72_gene-expression", "74_magnetic-field",
    "76_trial-court", "78_north-america",
)  # fmt: skip
"""Concepts that are topics, which a judge by embeddings can know."""
BEGINNINGS = ("I think that", "The main thing to know is", "Yesterday we talked about", "In this article,")
N_GROUPS = 100


def excerpts(corpus: Dataset) -> list[str]:
    """Pieces of documents, each a document of its own."""
    return [
        text[start : start + EXCERPT]
        for text in corpus["text"]
        for start in range(0, min(len(text), 8 * EXCERPT), EXCERPT)
        if len(text) - start > EXCERPT // 2
    ]


class Prepared:
    """The demo model, its dictionaries and what they were fitted to, each made when it is first asked for."""

    def __init__(self, n_activations: int, n_per_side: int, n_seeds: int):
        self.n_activations, self.n_per_side, self.n_seeds = n_activations, n_per_side, n_seeds

    @cached_property
    def model(self) -> HostModel:
        """SmolLM2-135M-Instruct."""
        return load_demo_model()

    @cached_property
    def texts(self) -> tuple[list[str], list[str]]:
        """Documents to fit to, and held-out ones."""
        build, held_out = split_corpus(load_demo_corpus())
        return excerpts(build), excerpts(held_out)

    @cached_property
    def kept(self) -> KeptStream:
        """The activations to fit to."""
        options: dict[str, Any] = {"context_size": CONTEXT_SIZE, "batch_size": 16, "max_tokens": self.n_activations}
        return KeptStream(ActivationStream(self.model, self.texts[0], HOOK, **options))

    @cached_property
    def x(self) -> Tensor:
        """The same as a matrix."""
        return torch.cat([rows for batch in self.kept for rows in batch.activations.values()])

    @cached_property
    def partitions(self) -> dict[str, ExemplarPartition]:
        """By name, the finest first."""
        fits = fit_exemplar_partitions(self.kept, PERCENTILES)
        return {f"EP p{percentile}": fit.dictionary for (_, percentile), fit in fits.items()}

    @cached_property
    def dictionaries(self) -> dict[str, SAE[Any]]:
        """The coarsest partition and an SAE of equal width, trained on the same activations."""
        name, partition = list(self.partitions.items())[-1]
        sae = fit_sae(self.kept, partition.cfg.d_sae, training_samples=10 * len(self.x))
        return {name: partition, "SAE": sae}

    @cached_property
    def concepts(self) -> list[Concept]:
        """Those packaged."""
        return packaged_concepts(n_per_side=self.n_per_side)

    def novelty(self) -> Evidence:
        """Does the distance to the nearest exemplar find unfamiliar text?"""
        return evaluate_novelty(
            self.model,
            self.partitions,
            self.kept,
            self.texts[1],
            {name: packaged_texts(dataset) for name, dataset in OUTSIDE.items()},
            n_activations=self.n_activations // 2,
            max_per_document=60,
        )

    def detection(self) -> Evidence:
        """Do regions detect concepts better than as many random activations and an SAE?"""
        methods = detection_methods(self.dictionaries, self.x)
        return evaluate_detection(self.model, methods, self.concepts)

    def probes(self) -> Evidence:
        """How much of a linear probe is left in a dictionary's codes?"""
        activations = dict.fromkeys([HOOK], self.x)
        return evaluate_probes(self.model, self.dictionaries, self.concepts, activations=activations)

    def steering(self) -> Evidence:
        """Do neuron groups steer better than an SAE of the same neurons?"""
        concepts = packaged_concepts(TOPICS, n_per_side=self.n_per_side)
        known = {normal_form(text) for concept in concepts for text in (*concept.positives, *concept.negatives)}
        texts = [text for name in (*TOPICS, *OUTSIDE.values()) for text in packaged_texts(name, n=2 * self.n_per_side)]
        options: dict[str, Any] = {"context_size": CONTEXT_SIZE, "batch_size": 16, "max_tokens": 2 * self.n_activations}
        own = [text for text in dict.fromkeys(texts) if normal_form(text) not in known]
        kept = KeptStream(ActivationStream(self.model, own, NEURON_HOOK, **options))
        groups = fit_snmf(kept, N_GROUPS).dictionary
        sae = fit_sae(kept, N_GROUPS, training_samples=20 * self.n_activations)
        sampling = SamplingOptions(max_new_tokens=16)
        return compare_steering(
            self.model,
            [Method.from_dictionary("neuron groups", groups), Method.from_dictionary("SAE", sae)],
            concepts,
            EmbeddingJudge(None, self.model, options=sampling),
            prompts=BEGINNINGS,
            targets=(0.2,),
            n=2,
            options=sampling,
        )

    def synthetic(self) -> Evidence:
        """Are features that are known recovered?"""
        return evaluate_on_synthetic(n_seeds=self.n_seeds)


def detection_methods(dictionaries: Mapping[str, SAE[Any]], x: Tensor) -> list[Method]:
    """Both bases of the partition, the SAE by its codes, and as many of every baseline."""
    (name, partition), (_, sae) = dictionaries.items()
    k, options = partition.cfg.d_sae, dict[str, Any](center=partition.b_dec.detach())
    return [
        Method.from_dictionary(f"{name} exemplar", partition, basis="exemplar"),
        Method.from_dictionary(f"{name} mean", partition, basis="mean"),
        Method.from_dictionary("SAE", sae, similarity="code"),
        *matched_controls(partition, x),
        kmeans_directions(x, k, HOOK, **options),
        *(make(x, min(k, x.shape[1]), HOOK, **options) for make in (principal_directions, single_neurons)),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write ``evidence.html`` and ``results.json`` into a folder, anew after each evaluation; 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m saelens_ext.cli.tour.evidence", description=__doc__)
    parser.add_argument("--output", default="evidence_output", help="folder to write")
    which = f"evaluations to run, with commas between, of {','.join(KINDS)}"
    parser.add_argument("--kinds", default=",".join(QUICK), help=which)
    parser.add_argument("--n-activations", type=int, default=5_000, help="activations to fit dictionaries to")
    parser.add_argument("--n-per-side", type=int, default=40, help="sentences with and without each concept")
    parser.add_argument("--n-seeds", type=int, default=10, help="synthetic models")
    options = parser.parse_args(arguments)
    kinds = options.kinds.split(",")
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        parser.error(f"--kinds takes any of {','.join(KINDS)}, got {unknown[0]!r}")
    about = {
        "model": "SmolLM2-135M-Instruct",
        "hook": HOOK,
        "activations": options.n_activations,
        "corpus": "Python's own documentation",
    }
    prepared = Prepared(options.n_activations, options.n_per_side, options.n_seeds)
    found: list[Evidence] = []
    files, failed = dict[str, Path](), False
    for kind in kinds:
        begin, cpu = time.perf_counter(), time.process_time()
        evaluate = getattr(prepared, kind)
        print(f"{kind.capitalize()}: {evaluate.__doc__}")
        try:
            found.append(evaluate())
        except Exception as error:  # what the others find is not lost
            logger.error("%s failed: %s", kind, error, exc_info=True)
            failed = True
            continue
        files = save_evidence(found, options.output, about=about, title="Evidence on SmolLM2-135M-Instruct")
        print(found[-1].verdict())
        print(f"{time.perf_counter() - begin:.0f} s, of which {time.process_time() - cpu:.0f} s of computing")
    for name, path in files.items():
        print(f"{name}: {path.resolve()}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
