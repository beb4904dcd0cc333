"""Whatever modes of torch a caller has set, every public entry works and gives what it gives without them."""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pandas
import pytest
import torch
from sae_lens import SAE
from sentence_transformers import SentenceTransformer
from torch import Tensor

import saelens_ext as ext
from saelens_ext.continuations.embed import visible_rows
from saelens_ext.evals import baselines
from saelens_ext.host import edit_effects, mlp_output
from saelens_ext.host.sentence_model import packaged_sentence_model
from tests import models_zoo
from tests.continuations._dictionaries import make
from tests.hub.conftest import hub, running_hub  # noqa: F401
from tests.published import foreign
from tests.runner import runs

# The client's own upload of large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")

HOOK, NEURONS = "blocks.1.hook_out", "blocks.1.mlp.out.hook_in"
STREAM = {"context_size": 16, "batch_size": 4, "max_tokens": 300}
SENTENCES = ["The cat sat on the mat.", "A dog ran to the sea.", "Ships sail at noon.", "Bread is baked at night."]
CONCEPTS = [
    ext.Concept(
        name=word,
        positives=[f"The {word} sat on the mat {n}." for n in range(4)],
        negatives=[f"Ships sail at noon {n}." for n in range(4)],
    )
    for word in ("cat", "dog")
]
SHORT = ext.SamplingOptions(max_new_tokens=3)
AUDIT = {
    "n": 12, "max_new_tokens": 3, "betas": (1.0,), "gammas": (0.5,), "n_clusters": (1, 12), "min_cluster_size": 1,
    "n_resamples": 2, "max_rows": 4, "backend": "gradient",
}  # fmt: skip


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {"float64": torch.float64, "bfloat16": torch.bfloat16}
MODES = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    **{name: partial(default_dtype, dtype) for name, dtype in DEFAULTS.items()},
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
}
# Tried together where one does not hide the other.
COMBINED = {"inference, bfloat16": ("inference", "bfloat16"), "no_grad, float64": ("no_grad", "float64")} | {
    "autocast": ("autocast",)
}
# What takes a second or more. `make test` tries the others, in the strictest modes; `make test-slow` tries the rest.
LONG = {
    "Audit", "DictionaryRunner", "Evidence", "audit_continuations", "audit_steps", "evaluate_clusters",
    "evaluate_supernodes",
    "evaluate_novelty", "evaluate_probes", "fit_hierarchical_snmf", "fit_snmf", "write_evidence_report",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tiny_texts):
    """One of everything, made without any mode."""
    return make_all(tiny_texts)


def make_all(texts, device="cpu"):
    """One of everything, on a device."""
    model = models_zoo.make_model("llama", "SAETransformerBridge").to(device)
    residual, neurons = (ext.ActivationStream(model, texts, hook, **STREAM) for hook in (HOOK, NEURONS))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 24, generator=generator).to(device)
    dictionary = make("standard", HOOK, model.cfg.d_model, d_sae=16).to(device)
    embedder = SentenceTransformer(str(packaged_sentence_model()), device="cpu")
    drawn = ext.sample_continuations(model, "The assert statement", 24, max_new_tokens=3)
    drawn = drawn.select(visible_rows(drawn, embedder)).select(range(10))
    embedded = ext.embed_continuations(drawn, embedder)
    partition = ext.fit_exemplar_partition(residual, percentile=20)
    return SimpleNamespace(
        model=model,
        texts=texts,
        residual=residual,
        neurons=neurons,
        x=x,
        units=torch.nn.functional.normalize(x, dim=1),
        features=torch.randn(5, models_zoo.D_MLP["llama"], generator=generator).to(device),
        direction=torch.randn(model.cfg.d_model, generator=generator).to(device),
        dictionary=dictionary,
        partition=partition,
        profile=ext.profile_dictionary(partition.dictionary, residual, n_examples=2, n_boundary=1),
        snmf=ext.fit_snmf(neurons, 5, sparsity=0.3, max_iter=5),
        hierarchy=ext.fit_hierarchical_snmf(x, (4, 2), max_iter=5, refine_iter=2),
        embedder=embedder,
        drawn=drawn,
        embedded=embedded,
        attributed=ext.attribute_continuations(model, [dictionary], embedded, backend="gradient"),
        labels=np.arange(10) % 3,
    )


def methods(m):
    """A dictionary's latents, and every kind of baseline."""
    options = {"center": m.partition.dictionary.b_dec.detach()}
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, m.model.cfg.d_model, generator=generator, dtype=torch.float32)
    made = [baselines.random_activations, baselines.gaussian_directions, baselines.principal_directions]
    made += [baselines.kmeans_directions, baselines.single_neurons]
    return [
        ext.Method.from_dictionary("regions", m.partition.dictionary),
        ext.Method.from_dictionary("codes", m.dictionary, similarity="code"),
        *(make_baseline(x, 4, HOOK, **options) for make_baseline in made),
    ]


def method(m, tmp):
    made = methods(m)
    found = [(each.directions, each.origin, each.detector.score(m.direction[None]).tolist()) for each in made]
    return found, changed_logits(made[0].intervention(m.model, 0, 2.0), m.model)


def changed_logits(context, model):
    """What a forward pass of the user's gives inside an intervention made by ours."""
    with context:
        ids = torch.tensor([[0, 5, 6, 7]], device=next(model.parameters()).device)
        return model(ids, return_type="logits").tolist()


def clustered(m, tmp):
    clustering = ext.LeaderClustering(m.x.mean(0), 0.7)
    first = clustering.partial_fit(m.x[:50])
    return first, clustering.partial_fit(m.x[50:]), clustering.state_dict()


def partition_read(m, tmp):
    center = m.x.mean(0)
    regions = ext.ExemplarPartition.from_regions(m.units[:6], m.units[6:12], center, 0.5, k=2)
    codes = [regions.with_readout(readout).encode(m.x) for readout in ("top_k", "one_hot", "projection", "cosine")]
    own = [*codes, regions.decode(codes[2]), regions(m.x)]  # the forward passes are in the mode of whoever asks
    return regions, regions.assign(m.x, reject=True), [part.tolist() for part in own]


def snmf_read(m, tmp):
    features = ext.SNMFDictionary.from_features(m.features, metadata={"hook_name": NEURONS})
    x = torch.relu(m.features)
    own = features.encode(x).tolist(), features(x).tolist()
    return features, own, features.neurons(0), features.residual_directions(m.model)


def saved_and_loaded(value, tmp):
    value.save(tmp)
    return type(value).load(tmp)


def audit(m, tmp):
    return ext.audit_continuations(m.model, "The assert statement", [m.dictionary], m.embedder, **AUDIT)


def run(m, tmp):
    kinds = [runs.PARTITIONS, runs.FACTORS]
    config = runs.config(tmp, hook_name=[HOOK, NEURONS], profile=True, dictionary=kinds, n_eval_batches=1)
    return {
        name: one.fit
        for name, one in ext.DictionaryRunner(config, model=m.model, dataset=m.texts).run().dictionaries.items()
    }


def loaded_model(m, tmp, model_class):
    hf_model = models_zoo.make_hf_model("llama")
    model = ext.load_model("tiny", model_class=model_class, hf_model=hf_model, tokenizer=models_zoo.make_tokenizer())
    return [parameter.detach() for parameter in model.parameters()], model.cfg.dtype


def report(m, tmp):
    fit = m.partition
    path = ext.write_dictionary_report(
        tmp / "r.html", tokenizer=m.model.tokenizer, title="t", fits=[fit], chosen=fit, profile=m.profile,
        lens=ext.logit_lens(m.model, fit.dictionary.W_dec.detach(), top_n=3),
    )  # fmt: skip
    return len(path.read_text()) > 1000


def views(m):
    return m.attributed.embeddings, m.attributed.signatures


def exported(path):
    """The tensors of a control vector."""
    return {tensor.name: tensor.data.tolist() for tensor in gguf.GGUFReader(path).tensors}


def uploaded(m, tmp):
    """The batches that would be sent."""
    ext.push_to_neuronpedia(m.profile, m.model.tokenizer, "tiny", "1-res-ep", dry_run=tmp / "batches")
    return [path.read_text() for path in sorted((tmp / "batches").iterdir())]


def steered(m, tmp):
    """Two concepts, with a judge that counts."""
    return ext.compare_steering(
        m.model,
        [ext.Method.from_directions("one", m.direction, HOOK)],
        CONCEPTS[:2],
        lambda concept, prompt, texts: [ext.JudgeScore(len(text) % 3, 2.0) for text in texts],
        prompts=["I think", "It is so"],
        targets=[0.1],
        n=2,
        options=ext.SamplingOptions(max_new_tokens=3),
    ).summary()


def detectors(m):
    return {
        "a": ext.Detector.from_directions(m.direction, HOOK),
        "b": ext.Detector.from_dictionary(m.partition.dictionary),
    }


def convert(m, tmp):
    (tmp / "in").mkdir()
    path = foreign.write(tmp / "in", foreign.pickled(*foreign.make_state()))
    return ext.convert_published_dictionary(
        path, tmp / "out", hook_name=HOOK, model_name="tiny", percentile=5
    ).dictionary


def judge(m, tmp):
    found = ext.EmbeddingJudge(m.embedder, m.model, options=SHORT, n_references=4)
    return found("the sea", SENTENCES[0], ["The sea is wide.", "", "Ships"])


def scores(m, tmp):
    rate = lambda concept, prompt, texts: [ext.JudgeScore(1.0, float(len(text) % 3)) for text in texts]  # noqa: E731
    options = {"targets": (0.05,), "n": 2, "options": SHORT, "tolerance": 0.5}
    return ext.steering_score(m.model, HOOK, m.direction, ["a"], rate, **options).to_dataframe()


def shared(m, tmp):
    fit = m.partition
    ext.push_to_hub(fit, "lab/tiny", "p20", profile=m.profile)
    found = ext.load_from_hub("lab/tiny", "p20")
    return found.dictionary, found.fit, found.profile


def novelty(m):
    inside, outside = ([f"{i} {text} {i}" for i, text in enumerate(m.texts * 2)] for _ in range(2))
    outside = {"upside down": [text[::-1] for text in outside]}
    options = {"n_activations": 300, "max_per_document": 10, "n_coresets": 2, "n_bootstrap": 20, "n_permutations": 50}
    regions = ext.fit_exemplar_partition(m.residual, percentile=40).dictionary
    return ext.evaluate_novelty(m.model, regions, m.residual, inside, outside, rates=(0.1,), **options)


def evidence_page(m, tmp):
    found = novelty(m)
    page = ext.write_evidence_report(tmp / "evidence.html", [found.section()]).read_text()
    return found.summary(), found.comparisons(), len(page) > 10_000


ASKED = [f"{i} {sentence}" for i in range(4) for sentence in SENTENCES]
ODDS = {"shows": [" the"], "lacks": [" a"]}


def localised(m):
    """Prompts, log-odds with a threshold in the middle of a wide gap, and where they are high."""
    split = ext.PromptSplit(build=ASKED[:4], choose=ASKED[4:12], test=ASKED[12:14], contrast=ASKED[14:])
    measured = ext.measure_behaviour(m.model, split.choose, ext.OpeningOdds(**ODDS), chat_template=False)
    values = sorted(measured["odds"])
    gap = max(range(1, len(values)), key=lambda place: values[place] - values[place - 1])
    odds = ext.OpeningOdds(**ODDS, threshold=(values[gap - 1] + values[gap]) / 2)
    options = {"chat_template": False, "min_members": 1, "min_rate": 0.01}
    return split, odds, ext.localise_behaviour(m.model, m.partition.dictionary, split, odds, **options)


def ablated(m, tmp):
    split, odds, found = localised(m)
    options = {"neutral_texts": SENTENCES[:1], "n_random": 2, "n_bootstrap": 20, "n_permutations": 20}
    return ext.ablate_behaviour(m.model, found, split, odds, **options)


def swept(m, tmp):
    split, odds, _ = localised(m)
    options = {"chat_template": False, "min_members": 1, "min_rate": 0.01, "n_bootstrap": 20, "n_permutations": 20}
    found = ext.localisation_sweep(m.model, HOOK, split, odds, percentiles=(20,), seeds=(0,), **options)
    return found.cells, found.grid


def clusters_steered(m, tmp):
    prefixes = ["The assert statement", "An object is", "Ships sail", "Bread is", "A dog ran", "The cat"]
    audit = ext.AuditConfig(
        n=10, max_new_tokens=3, backend="gradient", min_cluster_size=2, strengths=(-1.0, 1.0), max_rows=4
    )
    options = {"embedder": m.embedder, "audit": audit, "n_bootstrap": 20, "n_permutations": 20}
    return ext.evaluate_clusters(m.model, prefixes, [m.dictionary], cells=((4.0, 0.5),), controls=(), **options).cells


def names_swapped(m, tmp):
    swaps = [(f"{start} is A and B.", "A", "B") for start in ("It", "One", "Two", "That", "What", "Who")]
    config = ext.AuditConfig(n=2, max_new_tokens=2, backend="gradient")
    return ext.evaluate_supernodes(
        m.model, swaps, [m.dictionary], audit=config, n_bootstrap=20, n_permutations=20
    ).cells


STEPS = {
    "n_candidates": 16, "max_steps": 2, "delimiter": "e", "max_step_tokens": 16, "final": (), "temperature": 1.0,
}  # fmt: skip


def stepped(m, tmp):
    tree = ext.sample_steps(m.model, "The assert statement", **STEPS)
    config = AUDIT | {"min_cluster_size": 2, "betas": (4.0,), "n_clusters": (1, 16)}
    del config["n"], config["max_new_tokens"]
    options = {"embedder": m.embedder, "audit": ext.AuditConfig(**config), "n_bootstrap": 20, "n_permutations": 20}
    return ext.audit_steps(m.model, tree, [m.dictionary], **options).cells


CASES: dict[str, Callable[[SimpleNamespace, Any], Any]] = {
    "ActivationBatch": lambda m, tmp: [(b.context(slice(0, 3)), b.first(2)) for b in m.residual],
    "ActivationStream": lambda m, tmp: list(ext.ActivationStream(m.model, m.texts, [HOOK, NEURONS], **STREAM)),
    "Assignment": lambda m, tmp: m.partition.dictionary.assign(m.partition.dictionary.W_dec),
    "Audit": audit,
    "ContinuationSet": lambda m, tmp: [
        saved_and_loaded(m.attributed, tmp),
        m.drawn.with_weights("path"),
        m.drawn.select([1, 2]),
        m.drawn.with_weights("uniform").effective_sample_size,
    ],
    "Detector": lambda m, tmp: [d.score(m.direction[None].repeat(2, 1)).tolist() for d in detectors(m).values()],
    "DictionaryProfile": lambda m, tmp: [saved_and_loaded(m.profile, tmp), m.profile.to_dataframe()],
    "DictionaryRunner": run,
    "EmbeddingJudge": judge,
    "ExemplarPartition": partition_read,
    "ExemplarFitResult": lambda m, tmp: saved_and_loaded(m.partition, tmp),
    "Evidence": lambda m, tmp: ext.Evidence.load(novelty(m).save(tmp)).summary(),
    "HierarchicalSNMF": lambda m, tmp: [saved_and_loaded(m.hierarchy, tmp), str(m.hierarchy.trees())],
    "JointClusterer": lambda m, tmp: ext.JointClusterer(random_state=0).fit(
        m.attributed.embeddings, m.attributed.signatures
    ),
    "Method": method,
    "KeptStream": lambda m, tmp: list(ext.KeptStream(m.residual).only(HOOK)),
    "LeaderClustering": clustered,
    "SNMFDictionary": snmf_read,
    "SNMFFitResult": lambda m, tmp: saved_and_loaded(m.snmf, tmp),
    "ablate_behaviour": ablated,
    "ablate_directions": lambda m, tmp: changed_logits(ext.ablate_directions(m.model, HOOK, m.direction), m.model),
    "add_direction": lambda m, tmp: changed_logits(ext.add_direction(m.model, HOOK, m.direction, 2.0), m.model),
    "export_direction": lambda m, tmp: exported(ext.export_direction(m.model, HOOK, m.direction, 2.0, tmp / "v.gguf")),
    "push_to_neuronpedia": uploaded,
    "compare_steering": steered,
    "evaluate_clusters": clusters_steered,
    "evaluate_supernodes": names_swapped,
    "compare_clusterings": lambda m, tmp: ext.compare_clusterings(
        [replace(m.attributed, prefix=f"Prefix {number}") for number in range(6)], betas=(1.0,), gammas=(0.5,)
    ).summary(),
    "dictionary_stability": lambda m, tmp: ext.dictionary_stability({"a": m.dictionary, "b": m.partition}).summary(),
    "compare_checkpoints": lambda m, tmp: ext.compare_checkpoints(
        *[{"a": m.dictionary, "b": m.partition}] * 2, models=[m.model] * 2, texts=SENTENCES
    ).summary(),
    "compare_models": lambda m, tmp: ext.compare_models(
        m.model, m.model, m.texts, hook_name=HOOK, percentile=20, n_replicas=2, context_size=16, max_tokens=300
    ).checkpoints.summary(),
    "overlap_by_tokens": lambda m, tmp: ext.overlap_by_tokens(
        {"a": m.partition.dictionary, "b": m.dictionary}, m.residual, min_active=1, n_bootstrap=5
    ).summary(),
    "partition_nesting": lambda m, tmp: ext.partition_nesting(
        {"a": m.partition, "b": m.dictionary}, m.residual, n_shuffles=2, n_bootstrap=5
    ).summary(),
    "threshold_sensitivity": lambda m, tmp: (
        ext.threshold_sensitivity(m.residual, percentiles=(20,), neighbour_factors=(1,), n_orders=2).cells
    ),
    "saturation_curves": lambda m, tmp: ext.saturation_curves({"a": m.residual}, percentile=20, n_orders=1).curves,
    "decompose_dictionary": lambda m, tmp: ext.decompose_dictionary(m.dictionary, m.dictionary, n_null=2),
    "pathway_check": lambda m, tmp: ext.pathway_check(
        m.model, HOOK, m.direction, SENTENCES * 5, coefficient=2.0, prompts="I think"
    ),
    "replace_direction": lambda m, tmp: changed_logits(ext.replace_direction(m.model, HOOK, m.direction), m.model),
    "attribute_continuations": lambda m, tmp: [
        ext.attribute_continuations(m.model, [m.dictionary], m.embedded, backend=backend, **options)
        for backend in ("linear", "gradient", "relp")
        for options in (
            {},
            {"sources": m.attributed.sources.select(range(9)), "target": torch.arange(m.model.cfg.d_vocab)},
        )
    ],
    "audit_continuations": audit,
    "audit_steps": stepped,
    "score_continuations": lambda m, tmp: ext.score_continuations(m.model, "The assert", [" a", " statement"]),
    "HuggingFaceSampler": lambda m, tmp: ext.sample_continuations(
        m.model,
        "The assert statement",
        3,
        max_new_tokens=3,
        sampler=ext.HuggingFaceSampler(models_zoo.make_hf_model("llama"), m.model.tokenizer),
    ).to_dataframe(),
    "mark_answers": lambda m, tmp: ext.mark_answers(m.model, m.drawn, span=(0, 2)),
    "sample_steps": lambda m, tmp: ext.sample_steps(m.model, "The assert statement", **STEPS, folder=tmp),
    "clamp_latent": lambda m, tmp: changed_logits(ext.clamp_latent(m.model, m.dictionary, 3, 1.5), m.model),
    "compare_detection": lambda m, tmp: ext.compare_detection(
        m.model, detectors(m), SENTENCES[:2], SENTENCES[2:], diff_means_at=HOOK
    ),
    "concept_scores": lambda m, tmp: ext.concept_scores(m.model, detectors(m)["b"], SENTENCES[:2], SENTENCES[2:]),
    "convert_published_dictionary": convert,
    "core_and_exclusive_neurons": lambda m, tmp: ext.core_and_exclusive_neurons(m.snmf.dictionary.features, [0, 1]),
    "evaluate_detection": lambda m, tmp: ext.evaluate_detection(m.model, methods(m), CONCEPTS, n_splits=1),
    "evaluate_probes": lambda m, tmp: ext.evaluate_probes(
        m.model, {"regions": m.partition.dictionary, "sae": m.dictionary}, CONCEPTS, ks=(2,), n_splits=1
    ),
    "diff_means": lambda m, tmp: ext.diff_means(m.model, HOOK, SENTENCES[:2], SENTENCES[2:]),
    "embed_continuations": lambda m, tmp: [
        ext.embed_continuations(m.drawn, m.embedder, mode=mode) for mode in ("contextual", "sentence")
    ],
    "evaluate_novelty": lambda m, tmp: novelty(m),
    "evaluate_on_synthetic": lambda m, tmp: (
        ext.evaluate_on_synthetic(methods=("EP",), n_seeds=1, n_activations=200, n_judged=100, n_bootstrap=20).cells
    ),
    "fit_exemplar_partition": lambda m, tmp: ext.fit_exemplar_partition(m.residual, percentile=20),
    "fit_exemplar_partitions": lambda m, tmp: ext.fit_exemplar_partitions(
        m.residual, (5, 20), calibration="within_batch"
    ),
    "fit_hierarchical_snmf": lambda m, tmp: ext.fit_hierarchical_snmf(m.neurons, (4, 2), max_iter=5, refine_iter=2),
    "fit_sae": lambda m, tmp: [ext.fit_sae(of, 8, training_samples=64, batch_size=16) for of in (m.neurons, m.x)],
    "fit_snmf": lambda m, tmp: [
        ext.fit_snmf(m.neurons, 5, max_iter=5, max_passes=2, held_out=0.2, **options)
        for options in ({}, {"init": "kmeans"}, {"memory_limit": 10_000})
    ],
    "Labels": lambda m, tmp: saved_and_loaded(ext.label_latents(m.profile, m.model.tokenizer, n_null=20), tmp),
    "label_latents": lambda m, tmp: [
        ext.label_latents(m.profile, m.model.tokenizer, n_null=20),
        ext.label_latents(
            m.profile,
            m.model.tokenizer,
            method="promoted",
            n_null=20,
            lens=ext.logit_lens(m.model, m.partition.dictionary.W_dec.detach(), top_n=3),
        ),
    ],
    "latent_directions": lambda m, tmp: ext.latent_directions(m.model, m.partition.dictionary, [0, 1], basis="mean"),
    "load_from_hub": shared,
    "load_model": lambda m, tmp: [loaded_model(m, tmp, name) for name in models_zoo.MODEL_CLASSES],
    "localisation_sweep": swept,
    "localise_behaviour": lambda m, tmp: localised(m)[2],
    "logit_lens": lambda m, tmp: ext.logit_lens(m.model, m.direction[None], top_n=3),
    "match_dictionaries": lambda m, tmp: ext.match_dictionaries(
        m.partition.dictionary, m.partition.dictionary, n_null=20
    ),
    "match_strength": lambda m, tmp: ext.match_strength(
        m.model, HOOK, m.direction, [0.05], prompts=SENTENCES[:2], tolerance=0.5
    ),
    "measure_behaviour": lambda m, tmp: ext.measure_behaviour(
        m.model, SENTENCES, ext.begins_with(["a"]), chat_template=False, max_new_tokens=3
    ),
    "neuron_group_effect": lambda m, tmp: ext.neuron_group_effect(
        m.model, NEURONS, torch.tensor([1, 5]), torch.tensor([3.0, -2.0]), [5, 77], SENTENCES[:2], n_random=4
    ),
    "neuron_overlap": lambda m, tmp: ext.neuron_overlap(m.snmf.dictionary.features),
    "profile_dictionaries": lambda m, tmp: ext.profile_dictionaries(
        [m.partition.dictionary, m.dictionary], m.residual, n_examples=2, n_boundary=2, n_random=2
    ),
    "profile_dictionary": lambda m, tmp: ext.profile_dictionary(m.snmf.dictionary, m.neurons, n_examples=2, n_random=2),
    "push_to_hub": shared,
    "rate_distortion_path": lambda m, tmp: ext.rate_distortion_path(
        m.attributed.embeddings, m.attributed.signatures, [1.0], [0.5], random_state=0
    ),
    "read_texts": lambda m, tmp: [
        ext.read_texts(m.model, [HOOK, NEURONS], SENTENCES, positions=positions, chat_template=positions == "last")
        for positions in ("content", "last")
    ],
    "residual_directions": lambda m, tmp: ext.residual_directions(m.model, m.features, layer=1),
    "retarget": lambda m, tmp: ext.retarget(m.partition.dictionary, m.model),
    "sample_continuations": lambda m, tmp: ext.sample_continuations(m.model, "The", 6, max_new_tokens=3),
    "sample_texts": lambda m, tmp: ext.sample_texts(m.model, ["The", "A word"], n=2, options=SHORT),
    "scale_latent": lambda m, tmp: changed_logits(ext.scale_latent(m.model, m.dictionary, [1, 3], 3.0), m.model),
    "steer_continuations": lambda m, tmp: ext.steer_continuations(
        m.model, [m.dictionary], m.attributed, m.attributed.signatures[0], strengths=(-0.5, 0.5), generate=2
    ),
    "steer_features": lambda m, tmp: ext.steer_features(
        m.model, HOOK, m.partition.dictionary.W_dec, target=0.05, features=[0, 1], options=SHORT, tolerance=0.5
    ),
    "steering_score": scores,
    "validate_clusters": lambda m, tmp: ext.validate_clusters(
        m.model,
        [m.dictionary],
        m.attributed,
        m.labels,
        ext.ValidationOptions(strengths=(-0.5, 0.5), n_bootstrap=20, n_permutations=20),
    ),
    "write_dictionary_report": report,
    "write_evidence_report": evidence_page,
}

# Settings, protocols and records, which hold no tensor that they make, and a client of a server. The stream on Ray is
# tried with its own tests, which have a cluster.
WITHOUT_TORCH = {
    "AuditConfig", "Behaviour", "Concept", "DictionaryRunnerConfig", "Draw", "EndpointSampler",
    "ExemplarPartitionConfig",
    "ExemplarRunnerConfig", "Judge", "JudgeScore", "Labeller", "OpenAIJudge", "OpenAILabeller", "OpeningOdds",
    "PromptSplit", "RayActivationStream", "SNMFDictionaryConfig", "SNMFRunnerConfig", "Sampler", "SamplingOptions",
    "ValidationOptions", "begins_with", "list_on_hub", "neuronpedia_labels", "packaged_concepts", "read_concepts",
    "read_continuations",
}  # fmt: skip


# Under autocast a model computes in bfloat16, as its user wants, and what is read from it is rounded.
RUN_THE_MODEL = {
    "compare_checkpoints", "compare_models", "overlap_by_tokens", "partition_nesting",
    "threshold_sensitivity", "saturation_curves",
    "Evidence", "evaluate_novelty", "write_evidence_report",
    "ActivationBatch", "ActivationStream", "Audit", "DictionaryRunner", "EmbeddingJudge", "KeptStream",
    "ablate_directions",
    "add_direction", "audit_continuations", "audit_steps", "evaluate_clusters", "evaluate_supernodes",
    "sample_steps", "score_continuations",
    "HuggingFaceSampler",
    "clamp_latent",
    "compare_detection", "concept_scores", "diff_means",
    "fit_exemplar_partition", "fit_exemplar_partitions", "fit_hierarchical_snmf", "fit_sae",
    "fit_snmf", "match_strength", "neuron_group_effect", "profile_dictionaries", "profile_dictionary",
    "Method", "ablate_behaviour", "evaluate_detection", "evaluate_probes", "localisation_sweep", "localise_behaviour",
    "measure_behaviour", "pathway_check", "replace_direction",
    "compare_steering",
    "read_texts", "sample_continuations", "sample_texts", "scale_latent", "steer_continuations", "steer_features",
    "steering_score", "validate_clusters",
}  # fmt: skip


STREAMS = {"ActivationBatch", "ActivationStream", "KeptStream", "read_texts"}  # give what the model gave


def leaves(value, path="result"):
    """Every tensor, array, number and text in a result, with the way to it."""
    if isinstance(value, (Tensor, str, int, float)) or value is None:
        yield path, value
    elif isinstance(value, np.ndarray | np.generic):
        yield path, torch.as_tensor(value) if value.dtype.kind in "biuf" else str(value)
    elif isinstance(value, pandas.DataFrame | pandas.Series):
        yield from leaves(value.to_dict(), path)
    elif isinstance(value, SAE):
        yield from leaves(value.state_dict(), path)
    elif isinstance(value, torch.nn.Module) or callable(value):
        pass  # the model that a result refers to
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from leaves(part, f"{path}[{key!r}]")
    elif is_dataclass(value):
        for field in fields(value):
            yield from leaves(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, list | tuple | set):
        for number, part in enumerate(value):
            yield from leaves(part, f"{path}[{number}]")
    elif hasattr(value, "__dict__"):
        yield from leaves(vars(value), path)


@pytest.fixture(scope="module")
def plain(made, tmp_path_factory):
    """What an entry gives without modes, computed once."""
    known: dict[str, dict[str, Any]] = {}

    def of(name: str) -> dict[str, Any]:
        if name not in known:
            known[name] = dict(leaves(CASES[name](made, tmp_path_factory.mktemp(name))))
        return known[name]

    return of


def test_every_public_name_is_tried():
    assert set(CASES) | WITHOUT_TORCH == set(ext.__all__)


@pytest.mark.parametrize(
    ("name", "modes"),
    [
        pytest.param(name, modes, marks=pytest.mark.slow if name in LONG or "inference" not in modes else (), id=text)
        for name in CASES
        for text, modes in ((f"{name}-{combined}", modes) for combined, modes in COMBINED.items())
    ],
)
def test_modes_change_nothing(made, plain, request, tmp_path, name, modes):
    if CASES[name] is shared:
        request.getfixturevalue("hub")
    expected = plain(name)
    before = torch.get_default_dtype(), torch.is_grad_enabled()
    with ExitStack() as entered:
        for mode in modes:
            entered.enter_context(MODES[mode]())
        result = CASES[name](made, tmp_path)
        assert torch.is_inference_mode_enabled() == ("inference" in modes)
        assert torch.is_autocast_enabled("cpu") == ("autocast" in modes)
        assert torch.get_default_dtype() == DEFAULTS.get(modes[-1], torch.float32)
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == before
    found = dict(leaves(result))
    for path, value in found.items():
        if isinstance(value, Tensor):
            assert not value.is_inference(), f"{path} is of no use outside inference mode"
    if "autocast" in modes and name in RUN_THE_MODEL:
        for path, value in found.items():
            if isinstance(value, Tensor) and value.is_floating_point() and isinstance(expected.get(path), Tensor):
                assert value.dtype == expected[path].dtype or name in STREAMS, path
                assert bool(value.isfinite().all()) or not bool(expected[path].isfinite().all()), path
            if isinstance(value, float) and math.isfinite(expected.get(path, math.nan)):
                assert math.isfinite(value), path
        return
    assert found.keys() == expected.keys()
    for path, value in found.items():
        assert _same(value, expected[path]), f"{path}: {value} is not {expected[path]}"


def _same(value, expected):
    if isinstance(value, Tensor):
        return value.dtype == expected.dtype and torch.equal(value.nan_to_num(7), expected.nan_to_num(7))
    return value == expected or (value != value and expected != expected)


@pytest.mark.parametrize("name", ["inference", "float64", "bfloat16", "autocast"])
def test_what_was_made_in_a_mode_is_used_outside_it(made, plain, name):
    stream = lambda hook: ext.ActivationStream(made.model, made.texts, hook, **STREAM)  # noqa: E731
    with MODES[name]():
        residual, clustering = stream(HOOK), ext.LeaderClustering(made.x.mean(0), 0.7)
        first = clustering.partial_fit(made.x[:50].clone())
        adding = ext.add_direction(made.model, HOOK, made.direction.clone(), 2.0)
        partition = ext.fit_exemplar_partition(residual, percentile=20).dictionary
        snmf = ext.fit_snmf(stream(NEURONS), 5, sparsity=0.3, max_iter=5).dictionary
        snmf.encode(torch.relu(made.features))
    assert {path: value for path, value in leaves(list(residual))}.keys() == dict(leaves(list(made.residual))).keys()
    found = dict(leaves((first, clustering.partial_fit(made.x[50:]), clustering.state_dict())))
    assert all(_same(value, plain("LeaderClustering")[path]) for path, value in found.items())
    assert changed_logits(adding, made.model) == changed_logits(
        ext.add_direction(made.model, HOOK, made.direction, 2.0), made.model
    )
    for dictionary in (partition, snmf):
        x = torch.randn(3, dictionary.cfg.d_in, requires_grad=True)
        dictionary(x).sum().backward()
        assert bool(x.grad.isfinite().all()) and dictionary.W_dec.grad is not None
        dictionary.fold_W_dec_norm()


@pytest.mark.slow
@pytest.mark.parametrize("model_class", models_zoo.MODEL_CLASSES)
def test_a_program_that_lies_whole_in_inference_mode(made, model_class):
    def program():
        model = models_zoo.make_model("llama", model_class)
        sae = make("standard", HOOK, model.cfg.d_model, d_sae=16)
        drawn = ext.sample_continuations(model, "The assert statement", 4, max_new_tokens=3)
        found = [
            ext.attribute_continuations(model, [sae], drawn, backend=each) for each in ("linear", "relp", "gradient")
        ]
        trained = ext.fit_sae(made.x.clone(), 8, training_samples=64, batch_size=16)
        stream = ext.ActivationStream(model, made.texts, HOOK, **STREAM)
        fit = ext.fit_exemplar_partition(stream, percentile=20)
        return found, trained, fit, ext.profile_dictionary(fit.dictionary, stream, n_examples=2)

    with torch.inference_mode():
        found = dict(leaves(program()))
    expected = dict(leaves(program()))
    assert found.keys() == expected.keys()
    assert all(_same(value, expected[path]) for path, value in found.items())
    assert not any(value.is_inference() for value in found.values() if isinstance(value, Tensor))


def test_a_model_loaded_by_others_in_inference_mode_can_be_attributed(made):
    with torch.inference_mode():
        copy = ext.load_model("tiny", hf_model=models_zoo.make_hf_model("llama"), tokenizer=made.model.tokenizer)
        for part in copy.modules():  # as the hosts' own loaders leave them there
            part._parameters.update(
                {name: torch.nn.Parameter(p.clone()) for name, p in part._parameters.items() if p is not None}
            )
    assert any(parameter.is_inference() for parameter in copy.parameters())
    one, other = (
        ext.attribute_continuations(model, [made.dictionary], made.embedded, backend="relp").signatures
        for model in (copy, made.model)
    )
    assert torch.equal(one, other)


def test_a_place_can_be_changed_under_autocast_too(made):
    model = models_zoo.make_model("llama", "SAETransformerBridge")  # on which nothing was tried before
    arguments = "blocks.1.hook_resid_mid", made.direction, 2.0
    with MODES["autocast"]():
        found = changed_logits(ext.add_direction(model, *arguments), model)
    expected = torch.tensor(changed_logits(ext.add_direction(model, *arguments), model))
    assert torch.allclose(torch.tensor(found), expected, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("name", MODES)
def test_what_a_model_shows_of_itself_is_measured_in_no_mode(name):
    with MODES[name]():
        model = models_zoo.make_model("granite", "SAETransformerBridge")
        weights = model.blocks[1].mlp.out.weight.detach().T
        scale, logits = mlp_output._measured_scale(model, 1, weights, 1.0), edit_effects._short_pass(model, {})
    model = models_zoo.make_model("granite", "SAETransformerBridge")
    assert scale == pytest.approx(0.5, abs=1e-6) and torch.equal(logits, edit_effects._short_pass(model, {}))


def test_a_model_runs_under_the_callers_autocast(made):
    with MODES["autocast"]():
        seen = next(iter(made.neurons)).activations[NEURONS]
        first = ext.fit_snmf(made.neurons, 5, sparsity=0.3, max_iter=5)
    assert seen.dtype is torch.bfloat16 and first.dictionary.W_dec.dtype is torch.float32
    assert torch.equal(
        first.dictionary.W_dec,
        ext.fit_snmf(
            torch.cat([batch.activations[NEURONS] for batch in _under_autocast(made.neurons)]),
            5,
            sparsity=0.3,
            max_iter=5,
        ).dictionary.W_dec,
    )


def _under_autocast(stream):
    with MODES["autocast"]():
        return list(stream)
