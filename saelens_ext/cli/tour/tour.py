"""The tour: dictionaries of both kinds built, inspected, evaluated, steered with and saved, and one prompt audited."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from sae_lens import ActivationsStore, run_evals
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.evals import get_eval_everything_config
from sae_lens.training.activation_scaler import ActivationScaler

from saelens_ext import _files
from saelens_ext.activations.kept_stream import KeptStream
from saelens_ext.activations.stream import ActivationStream
from saelens_ext.analysis.labels import label_latents
from saelens_ext.analysis.logit_lens import logit_lens
from saelens_ext.analysis.profile import profile_dictionaries
from saelens_ext.audit.audit import audit_continuations
from saelens_ext.concepts.comparison import ConceptComparison, compare_detection
from saelens_ext.concepts.detector import Detector
from saelens_ext.demo.packaged import load_demo_corpus, load_demo_model, split_corpus
from saelens_ext.demo.sentences import NEUTRAL, WEEKDAYS
from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from saelens_ext.dictionaries.fit_exemplars import fit_exemplar_partition, fit_exemplar_partitions
from saelens_ext.dictionaries.fit_hierarchy import fit_hierarchical_snmf
from saelens_ext.dictionaries.fit_sae import fit_sae
from saelens_ext.dictionaries.fit_snmf import fit_snmf, reconstruction_loss
from saelens_ext.dictionaries.snmf import SNMFDictionary
from saelens_ext.host.models import tokenizer_of
from saelens_ext.report.dictionary.dictionary_report import write_dictionary_report
from saelens_ext.report.dictionary.snmf_section import SNMFLevel, SNMFSection
from saelens_ext.steering.interventions import ablate_directions, add_direction, latent_directions
from saelens_ext.steering.sampling import SamplingOptions, sample_texts
from saelens_ext.steering.steer_features import steer_features

CONTEXT_SIZE = 128
EVALUATED_AT_ONCE = 2
READ_AT_ONCE = 4  # windows; more of them leave the processor's cache
HOOK = "blocks.15.hook_out"
PERCENTILES = (1, 2, 4, 8, 10)
CHOSEN_PERCENTILE = 2
# Steering uses the region that the last token of this text falls in.
STEER_LIKE = "define a new class"
PROMPT = "The best way to spend a free afternoon is"
STRENGTH = 0.6
LIKELIEST = SamplingOptions(max_new_tokens=30, temperature=0)
N_RANDOM = 10  # examples of each region, which its label is scored on

NEURON_HOOK = "blocks.15.mlp.hook_post"
RANKS = (100, 50, 25)
EXCERPT = 1_000  # characters
HELD_OUT_TOKENS = 2_000
STEERED_FEATURES = 20  # those that explain most
STEER_TARGET = 0.25
STEER_PROMPT = "I think that"
NEW_TOKENS = 20

CONCEPT_PERCENTILE = 10
SAE_K = 16
SAE_SAMPLES = 100_000

AUDIT_PROMPT = "Why did the old man cry?"
AUDIT_HOOKS = [f"blocks.{layer}.mlp.hook_post" for layer in (5, 10)]
AUDIT_BETAS = (1.5, 2.0, 2.5)
AUDIT_GAMMAS = (0.3, 0.5, 0.7)
AUDIT_MODES = (3, 10)
AUDIT_ROWS = 20  # held-out continuations that are steered
N_CONTINUATIONS = 64
ANSWER_TOKENS = 14


def evaluate(
    dictionary: ExemplarPartition, model: SAETransformerBridge, corpus: Dataset
) -> dict[str, dict[str, float]]:
    """SAELens' own evaluation of a dictionary on a corpus, on 8 windows, as ``run_evals`` gives it."""
    # The store warns that a corpus with fewer rows than tokens will repeat, and the reshuffle of few rows does not
    # matter here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        store = ActivationsStore.from_sae(
            cast(Any, model),
            dictionary,
            corpus,
            streaming=False,
            store_batch_size_prompts=EVALUATED_AT_ONCE,
            total_tokens=1024,
            n_batches_in_buffer=2,
            train_batch_size_tokens=256,
            device=str(dictionary.device),
        )
    config = get_eval_everything_config(
        batch_size_prompts=EVALUATED_AT_ONCE, n_eval_reconstruction_batches=4, n_eval_sparsity_variance_batches=4
    )
    metrics, _ = run_evals(dictionary, store, cast(Any, model), ActivationScaler(), config)
    return metrics


def region_of(text: str, dictionary: ExemplarPartition, model: SAETransformerBridge) -> int:
    """The region that the activation at the last token of a text falls in."""
    hook = dictionary.cfg.metadata.hook_name
    _, cache = model.run_with_cache(text, names_filter=[hook])
    return int(dictionary.assign(cache[hook][0, -1]).regions)


def generate_three_ways(
    model: SAETransformerBridge, dictionary: ExemplarPartition, region: int
) -> list[dict[str, str]]:
    """Continue one prompt unsteered, steered along an exemplar, and with that exemplar's direction ablated."""
    hook = dictionary.cfg.metadata.hook_name
    exemplar = dictionary.exemplars[region]

    def continuation() -> str:
        ((text,),) = sample_texts(model, PROMPT, n=1, options=LIKELIEST)
        return text

    unsteered = continuation()
    with add_direction(model, hook, exemplar, STRENGTH * dictionary.cfg.metadata.typical_norm):
        steered = continuation()
    with ablate_directions(model, hook, exemplar, center=dictionary.center):
        ablated = continuation()
    return [
        {"label": "Unsteered", "prompt": PROMPT, "text": unsteered},
        {
            "label": f"Steered along region {region} by {STRENGTH} of the typical norm",
            "prompt": PROMPT,
            "text": steered,
        },
        {"label": f"Region {region} ablated", "prompt": PROMPT, "text": ablated},
    ]


def keep_excerpts(model: SAETransformerBridge, build: Dataset, hooks: list[str], max_tokens: int) -> KeptStream:
    """Activations of the beginning of every document, rather than of the whole of a few, read once."""
    excerpts = Dataset.from_dict({"text": [text[:EXCERPT] for text in build["text"]]})
    sizes: dict[str, Any] = {"context_size": CONTEXT_SIZE, "batch_size": READ_AT_ONCE, "max_tokens": max_tokens}
    return KeptStream(ActivationStream(model, excerpts, hooks, progress=True, **sizes))


def build_regions(
    model: SAETransformerBridge, kept: KeptStream, held_out: Dataset, output: Path, say: Callable[[str], Any]
) -> dict[str, Any]:
    """Build exemplar partitions at five percentiles, profile and evaluate them, and steer with one region.

    Saves each dictionary with its profile to ``percentile_<p>``, the evaluation to ``evals.json`` and the continuations
    to ``generations.json``.

    Returns:
        What the report shows of them: arguments of ``write_dictionary_report``.
    """
    stream = kept.only(HOOK)
    say(f"Building dictionaries of {HOOK} at percentiles {PERCENTILES}, and profiling them")
    fits = fit_exemplar_partitions(stream, PERCENTILES)
    profiles = profile_dictionaries([fit.dictionary for fit in fits.values()], stream, n_random=N_RANDOM)
    for ((_, percentile), fit), profile in zip(fits.items(), profiles):
        profile.save(fit.save(output / f"percentile_{percentile}"))
    chosen = fits[HOOK, CHOSEN_PERCENTILE]
    profile = profiles[PERCENTILES.index(CHOSEN_PERCENTILE)]
    labels = label_latents(profile, tokenizer_of(model))
    labels.save(output / f"percentile_{CHOSEN_PERCENTILE}")
    say(f"  {int(labels.distinguishes.sum())} of {len(labels)} labels detect members better than chance, held out")
    say("Evaluating one with SAELens' run_evals on held-out documents")
    evals = evaluate(chosen.dictionary, model, held_out)
    _files.write_json(output / "evals.json", _files.json_safe(evals))
    region = region_of(STEER_LIKE, chosen.dictionary, model)
    say(f"Steering with region {region}, where the last token of {STEER_LIKE!r} falls")
    generations = generate_three_ways(model, chosen.dictionary, region)
    for generation in generations:
        say(f"  {generation['label']}: {generation['prompt']}[{generation['text']}]")
    _files.write_json(output / "generations.json", {"generations": generations})
    return {
        "fits": list(fits.values()),
        "chosen": chosen,
        "profile": profile,
        "labels": labels,
        "lens": logit_lens(model, chosen.dictionary.exemplars),
        "evals": evals,
        "generations": generations,
    }


def build_neuron_features(
    model: SAETransformerBridge, stream: KeptStream, held_out: Dataset, output: Path, say: Callable[[str], Any]
) -> SNMFSection:
    """Factorise the neurons of an MLP, alone and as a hierarchy, inspect the levels, and steer with the features of the
    finest that explain most.

    Saves the dictionary fitted alone to ``snmf``, the hierarchy to ``snmf_hierarchy`` with a profile in each level's
    directory, the continuations to ``steered.json``, and how well features and other methods detect a concept to
    ``concept.json``.
    """
    say(f"Factorising activations of {NEURON_HOOK}: {RANKS[0]} features, and features of features")
    fit = fit_snmf(stream, RANKS[0], progress=True)
    hierarchy = fit_hierarchical_snmf(stream, RANKS, start=fit.dictionary, progress=True)
    profiles = profile_dictionaries(hierarchy.dictionaries, stream)
    labels = [label_latents(profile, tokenizer_of(model)) for profile in profiles]
    unseen = ActivationStream(
        model, held_out, NEURON_HOOK, context_size=CONTEXT_SIZE, batch_size=READ_AT_ONCE, max_tokens=HELD_OUT_TOKENS
    )
    blocks = [batch.activations[NEURON_HOOK] for batch in unseen]
    losses = [reconstruction_loss(dictionary, blocks)[0] for dictionary in hierarchy.dictionaries]
    alone, n_held_out = reconstruction_loss(fit.dictionary, blocks)
    fit = replace(fit, held_out_loss=alone, n_held_out=n_held_out)
    strongest = sorted(fit.shares.argsort(descending=True)[:STEERED_FEATURES].tolist())
    say(f"Steering with {len(strongest)} features to {STEER_TARGET} nats, and sampling a continuation each")
    place, directions, norm = latent_directions(model, hierarchy.dictionaries[0])
    steered = steer_features(
        model,
        place,
        directions,
        prompt=STEER_PROMPT,
        target=STEER_TARGET,
        features=strongest,
        typical_norm=norm,
        options=SamplingOptions(max_new_tokens=NEW_TOKENS),
        progress=True,
    )
    example = next((one for one in steered.texts if one.text is not None), None)
    say(f"  Unsteered: {STEER_PROMPT}[{steered.unsteered}]")
    if example is not None:
        say(f"  Along feature {example.feature} by {example.strength.coefficient:.1f}: {STEER_PROMPT}[{example.text}]")
    concept = detect_a_concept(model, hierarchy.dictionaries[0], stream, say)
    _files.write_json(output / "concept.json", concept.to_dict())
    fit.save(output / "snmf")
    hierarchy.save(output / "snmf_hierarchy")
    for number, profile in enumerate(profiles):
        labels[number].save(profile.save(output / "snmf_hierarchy" / f"level_{number}"))
    steered.save(output / "steered.json")
    lenses = [logit_lens(model, dictionary.residual_directions(model)) for dictionary in hierarchy.dictionaries]
    parts = zip(hierarchy.dictionaries, profiles, lenses, losses, labels, strict=True)
    levels = [
        SNMFLevel(dictionary=d, profile=profile, lens=lens, held_out_loss=loss, labels=named)
        for d, profile, lens, loss, named in parts
    ]
    return SNMFSection(levels=levels, fit=fit, hierarchy=hierarchy, steered=steered, concept=concept)


def detect_a_concept(
    model: SAETransformerBridge, features: SNMFDictionary, stream: KeptStream, say: Callable[[str], Any]
) -> ConceptComparison:
    """How well neuron features, an SAE and an exemplar partition of the same activations, and the difference of means,
    detect days of the week. Each method chooses its best score on half of the sentences and is judged on the others.
    """
    say("Detecting days of the week with regions, neuron features, an SAE and the difference of means")
    k = features.cfg.d_sae
    detectors = {
        "SNMF features": Detector.from_dictionary(features),
        "SAE latents": Detector.from_dictionary(
            fit_sae(stream, k, k=SAE_K, training_samples=SAE_SAMPLES, batch_size=512)
        ),
        "Regions": Detector.from_dictionary(fit_exemplar_partition(stream, percentile=CONCEPT_PERCENTILE).dictionary),
    }
    compared = compare_detection(
        model, detectors, WEEKDAYS, NEUTRAL, concept="days of the week", diff_means_at=NEURON_HOOK
    )
    for row in compared.rows:
        say(
            f"  {row.method}: {row.chosen} of {row.n_scores}, AUROC {row.auroc:.2f} [{row.auroc_low:.2f}, "
            f"{row.auroc_high:.2f}]"
        )
    return compared


def audit_prompt(
    model: SAETransformerBridge, kept: KeptStream, known: SNMFDictionary, output: Path, say: Callable[[str], Any]
) -> Path:
    """Ask why the model answers one question in different ways, by features of the neurons of several layers.

    Saves the stages to ``audit`` and returns the path of the report.
    """
    say(
        f"Auditing {N_CONTINUATIONS} answers to {AUDIT_PROMPT!r}, with {known.cfg.d_sae} neuron features at each of "
        f"{1 + len(AUDIT_HOOKS)} layers"
    )
    dictionaries = [known, *(fit_snmf(kept.only(hook), known.cfg.d_sae).dictionary for hook in AUDIT_HOOKS)]
    profiles = profile_dictionaries(dictionaries, kept)
    audit = audit_continuations(
        model,
        AUDIT_PROMPT,
        dictionaries,
        folder=output / "audit",
        n=N_CONTINUATIONS,
        max_new_tokens=ANSWER_TOKENS,
        temperature=0.8,
        chat_template=True,
        backend="gradient",
        betas=AUDIT_BETAS,
        gammas=AUDIT_GAMMAS,
        n_clusters=AUDIT_MODES,
        max_rows=AUDIT_ROWS,
        progress=True,
    )
    for mode in audit.modes().itertuples():
        say(f"  {mode.weight:.0%}: {mode.text}")
    say(f"  {audit.verdict.headline}")
    by_hook = {str(d.cfg.metadata.hook_name): p for d, p in zip(dictionaries, profiles, strict=True)}
    labels = {hook: label_latents(profile, tokenizer_of(model)) for hook, profile in by_hook.items()}
    return audit.save_html(output / "audit.html", profiles=by_hook, labels=labels)


def run_demo(output: Path, max_tokens: int, say: Callable[[str], Any]) -> tuple[Path, Path]:
    """Build, inspect, evaluate, steer with and save dictionaries of the demo model, of both kinds, and audit one
    prompt.

    Args:
        output: directory for the dictionaries, their profiles, the figures and the reports.
        max_tokens: activations to build from.
        say: called with a line about each stage.

    Returns:
        The paths of the two HTML reports, on the dictionaries and on the audit.
    """
    say("Loading SmolLM2-135M-Instruct")
    model = load_demo_model()
    build, held_out = split_corpus(load_demo_corpus())
    neurons = [NEURON_HOOK, *AUDIT_HOOKS]
    say(f"Reading {max_tokens:,} activations of {HOOK} and the neurons of {len(neurons)} layers, in one pass")
    kept = keep_excerpts(model, build, [HOOK, *neurons], max_tokens)

    def write(**parts: Any) -> Path:
        return write_dictionary_report(
            output / "report.html",
            tokenizer=tokenizer_of(model),
            title="What SmolLM2-135M-Instruct represents",
            **parts,
        )

    regions = build_regions(model, kept, held_out, output, say)
    say(f"The first report is there, and will grow: {write(**regions)}")
    snmf = build_neuron_features(model, kept.only(NEURON_HOOK), held_out, output, say)
    report = write(**regions, snmf=snmf)
    return report, audit_prompt(model, kept.only(neurons), snmf.levels[0].dictionary, output, say)
