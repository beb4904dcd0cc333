"""The tour: dictionaries of both kinds built, inspected, evaluated, steered with and saved, and one prompt audited."""

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from sae_lens import ActivationsStore, run_evals
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.evals import get_eval_everything_config
from sae_lens.training.activation_scaler import ActivationScaler

from saelens_ext import _files
from saelens_ext.activations.stream import ActivationStream
from saelens_ext.analysis.logit_lens import logit_lens
from saelens_ext.analysis.profile import profile_dictionaries
from saelens_ext.audit.audit import audit_continuations
from saelens_ext.concepts.comparison import ConceptComparison, compare_detection
from saelens_ext.concepts.detection import Detector
from saelens_ext.demo.packaged import load_demo_corpus, load_demo_model, split_corpus
from saelens_ext.demo.sentences import NEUTRAL, WEEKDAYS
from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from saelens_ext.dictionaries.fit_exemplars import fit_exemplar_partition, fit_exemplar_partitions
from saelens_ext.dictionaries.fit_hierarchy import fit_hierarchical_snmf
from saelens_ext.dictionaries.fit_sae import fit_sae
from saelens_ext.dictionaries.fit_snmf import fit_snmf, reconstruction_loss
from saelens_ext.dictionaries.snmf import SNMFDictionary
from saelens_ext.report.dictionary.dictionary_report import write_dictionary_report
from saelens_ext.report.dictionary.snmf_section import SNMFLevel, SNMFSection
from saelens_ext.steering.interventions import ablate_directions, steer_with
from saelens_ext.steering.sampling import SamplingOptions
from saelens_ext.steering.steer_features import steer_features

# --- the demo itself ---

CONTEXT_SIZE = 128
HOOK = "blocks.15.hook_out"
PERCENTILES = (1, 2, 4, 8, 10)
CHOSEN_PERCENTILE = 2
# Steering uses the region that the last token of this text falls in.
STEER_LIKE = "define a new class"
PROMPT = "The best way to spend a free afternoon is"
STRENGTH = 0.6

NEURON_HOOK = "blocks.15.mlp.hook_post"
RANKS = (100, 50, 25)
SNMF_TOKENS = 20_000
EXCERPT = 2_000  # characters
HELD_OUT_TOKENS = 4_000
STEER_TARGET = 0.25
STEER_PROMPT = "I think that"
NEW_TOKENS = 20

CONCEPT_PERCENTILE = 10
SAE_K = 16
SAE_SAMPLES = 200_000

AUDIT_PROMPT = "Why did the old man cry?"
AUDIT_HOOKS = [f"blocks.{layer}.mlp.hook_post" for layer in (5, 10, 20, 25)]
AUDIT_TOKENS = 8_000
AUDIT_BETAS = (1.5, 2.0, 2.5)
AUDIT_GAMMAS = (0.3, 0.5, 0.7)
AUDIT_MODES = (3, 10)
N_CONTINUATIONS = 96
ANSWER_TOKENS = 14


def evaluate(
    dictionary: ExemplarPartition, model: SAETransformerBridge, corpus: Dataset
) -> dict[str, dict[str, float]]:
    """SAELens' own evaluation of a dictionary on a corpus, on 16 windows, as ``run_evals`` gives it."""
    # The store warns that a corpus with fewer rows than tokens will repeat, and the reshuffle of few rows does not
    # matter here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        store = ActivationsStore.from_sae(
            model,
            dictionary,
            corpus,
            streaming=False,
            store_batch_size_prompts=8,
            total_tokens=2048,
            n_batches_in_buffer=2,
            train_batch_size_tokens=512,
            device=str(dictionary.device),
        )
    config = get_eval_everything_config(
        batch_size_prompts=8, n_eval_reconstruction_batches=2, n_eval_sparsity_variance_batches=2
    )
    metrics, _ = run_evals(dictionary, store, model, ActivationScaler(), config)
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
        text = model.generate(PROMPT, max_new_tokens=40, do_sample=False, verbose=False)
        return text.removeprefix(PROMPT)

    unsteered = continuation()
    with steer_with(model, dictionary, region, STRENGTH):
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


def excerpts_stream(
    model: SAETransformerBridge, build: Dataset, hooks: str | list[str], max_tokens: int
) -> ActivationStream:
    """Activations of the beginning of every document, rather than of the whole of a few."""
    excerpts = Dataset.from_dict({"text": [text[:EXCERPT] for text in build["text"]]})
    return ActivationStream(
        model, excerpts, hooks, context_size=CONTEXT_SIZE, batch_size=16, max_tokens=max_tokens, progress=True
    )


def build_neuron_features(
    model: SAETransformerBridge,
    build: Dataset,
    held_out: Dataset,
    output: Path,
    max_tokens: int,
    say: Callable[[str], Any],
) -> SNMFSection:
    """Factorise the neurons of an MLP, alone and as a hierarchy, inspect the levels, and steer with every feature of
    the finest.

    Saves the dictionary fitted alone to ``snmf``, the hierarchy to ``snmf_hierarchy`` with a profile in each level's
    directory, the continuations to ``steered.json``, and how well features and other methods tell a concept to
    ``concept.json``.
    """
    stream = excerpts_stream(model, build, NEURON_HOOK, max_tokens)
    say(f"Factorising {max_tokens:,} activations of {NEURON_HOOK}: {RANKS[0]} features")
    fit = fit_snmf(stream, RANKS[0], progress=True)
    say(f"Loss {fit.loss:.3f}. From them a hierarchy of {RANKS} features, whose finest level is shown in the report")
    hierarchy = fit_hierarchical_snmf(stream, RANKS, start=fit.dictionary, progress=True)
    say("Profiling its levels in one pass, and measuring all on held-out documents")
    profiles = profile_dictionaries(hierarchy.dictionaries, stream)
    unseen = ActivationStream(
        model, held_out, NEURON_HOOK, context_size=CONTEXT_SIZE, batch_size=16, max_tokens=HELD_OUT_TOKENS
    )
    blocks = [batch.activations[NEURON_HOOK] for batch in unseen]
    losses = [reconstruction_loss(dictionary, blocks)[0] for dictionary in hierarchy.dictionaries]
    alone, n_held_out = reconstruction_loss(fit.dictionary, blocks)
    fit = replace(fit, held_out_loss=alone, n_held_out=n_held_out)
    say(f"Steering with each of the {RANKS[0]} features to {STEER_TARGET} nats, and sampling a continuation")
    steered = steer_features(
        model,
        hierarchy.dictionaries[0],
        prompt=STEER_PROMPT,
        target=STEER_TARGET,
        options=SamplingOptions(max_new_tokens=NEW_TOKENS),
        progress=True,
    )
    example = next((one for one in steered.texts if one.text is not None), None)
    say(f"  Unsteered: {STEER_PROMPT}[{steered.unsteered}]")
    if example is not None:
        say(f"  Along feature {example.feature} by {example.strength.coefficient:.1f}: {STEER_PROMPT}[{example.text}]")
    say(
        "Telling days of the week: each method chooses its best score on half of the sentences and is judged on the "
        "others"
    )
    concept = tell_a_concept(model, hierarchy.dictionaries[0], stream, say)
    _files.write_json(output / "concept.json", concept.to_dict())
    fit.save(output / "snmf")
    hierarchy.save(output / "snmf_hierarchy")
    for number, profile in enumerate(profiles):
        profile.save(output / "snmf_hierarchy" / f"level_{number}")
    steered.save(output / "steered.json")
    lenses = [logit_lens(model, dictionary.residual_directions(model)) for dictionary in hierarchy.dictionaries]
    parts = zip(hierarchy.dictionaries, profiles, lenses, losses, strict=True)
    levels = [
        SNMFLevel(dictionary=d, profile=profile, lens=lens, held_out_loss=loss) for d, profile, lens, loss in parts
    ]
    return SNMFSection(levels=levels, fit=fit, hierarchy=hierarchy, steered=steered, concept=concept)


def tell_a_concept(
    model: SAETransformerBridge, features: SNMFDictionary, stream: ActivationStream, say: Callable[[str], Any]
) -> ConceptComparison:
    """How well neuron features, an SAE and an exemplar partition of the same activations, and the difference of means,
    tell weekdays.
    """
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
    model: SAETransformerBridge,
    build: Dataset,
    known: SNMFDictionary,
    output: Path,
    max_tokens: int,
    say: Callable[[str], Any],
) -> Path:
    """Ask why the model answers one question in different ways, by features of the neurons of several layers.

    Saves the stages to ``audit`` and returns the path of the report.
    """
    say(
        f"Auditing {N_CONTINUATIONS} answers to {AUDIT_PROMPT!r}, with {known.cfg.d_sae} neuron features at each of "
        f"{1 + len(AUDIT_HOOKS)} layers"
    )
    others = [
        fit_snmf(excerpts_stream(model, build, hook, max_tokens), known.cfg.d_sae).dictionary for hook in AUDIT_HOOKS
    ]
    dictionaries = [known, *others]
    profiles = profile_dictionaries(
        dictionaries, excerpts_stream(model, build, [NEURON_HOOK, *AUDIT_HOOKS], max_tokens)
    )
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
        progress=True,
    )
    for mode in audit.modes().itertuples():
        say(f"  {mode.weight:.0%}: {mode.text}")
    (found,) = audit.prefixes
    say(f"  {found.not_validated or found.validation.claim().splitlines()[-1]}")
    return audit.save_html(
        output / "audit.html",
        profiles={d.cfg.metadata.hook_name: p for d, p in zip(dictionaries, profiles, strict=True)},
    )


def run_demo(output: Path, max_tokens: int = 40_000, say: Callable[[str], Any] = print) -> tuple[Path, Path]:
    """Build, inspect, evaluate, steer with and save dictionaries of the demo model, of both kinds, and audit one
    prompt.

    Args:
        output: directory for the dictionaries, their profiles, the figures and the report.
        max_tokens: activations to build from.
        say: called with a line about each stage.

    Returns:
        The paths of the two HTML reports, on the dictionaries and on the audit.
    """
    say("Loading SmolLM2-135M-Instruct")
    model = load_demo_model()
    build, held_out = split_corpus(load_demo_corpus())
    stream = ActivationStream(
        model, build, HOOK, context_size=CONTEXT_SIZE, batch_size=16, max_tokens=max_tokens, progress=True
    )

    say(f"Building dictionaries of {HOOK} at percentiles {PERCENTILES} from {max_tokens:,} activations, in one pass")
    fits = fit_exemplar_partitions(stream, PERCENTILES)
    say("Profiling them: a second pass, for exact regions and examples")
    profiles = profile_dictionaries([fit.dictionary for fit in fits.values()], stream)
    for ((_, percentile), fit), profile in zip(fits.items(), profiles):
        profile.save(fit.save(output / f"percentile_{percentile}"))

    chosen = fits[HOOK, CHOSEN_PERCENTILE]
    profile = profiles[PERCENTILES.index(CHOSEN_PERCENTILE)]
    say("Evaluating one with SAELens' run_evals on held-out documents")
    evals = evaluate(chosen.dictionary, model, held_out)
    region = region_of(STEER_LIKE, chosen.dictionary, model)
    say(f"Steering with region {region}, where the last token of {STEER_LIKE!r} falls")
    generations = generate_three_ways(model, chosen.dictionary, region)
    for generation in generations:
        say(f"  {generation['label']}: {generation['prompt']}[{generation['text']}]")
    finite = {
        group: {name: value if math.isfinite(value) else None for name, value in values.items()}
        for group, values in evals.items()
    }
    _files.write_json(output / "evals.json", finite)
    _files.write_json(output / "generations.json", {"generations": generations})
    snmf = build_neuron_features(model, build, held_out, output, min(max_tokens, SNMF_TOKENS), say)
    report = write_dictionary_report(
        output / "report.html",
        fits=list(fits.values()),
        chosen=chosen,
        profile=profile,
        lens=logit_lens(model, chosen.dictionary.exemplars),
        tokenizer=stream.tokenizer,
        evals=evals,
        generations=generations,
        snmf=snmf,
        title="What SmolLM2-135M-Instruct represents",
    )
    return report, audit_prompt(model, build, snmf.levels[0].dictionary, output, min(max_tokens, AUDIT_TOKENS), say)


def main(arguments: list[str] | None = None) -> int:
    """``python -m saelens_ext.demo``."""
    parser = argparse.ArgumentParser(
        prog="python -m saelens_ext.demo", description=run_demo.__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo_output"), help="where to write (default: %(default)s)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=40_000, help="activations to build from (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    reports = run_demo(options.output, options.max_tokens, lambda line: print(line, file=sys.stderr, flush=True))
    print(f"Done in {time.perf_counter() - start:.0f} s. Open the reports in a browser:", file=sys.stderr)
    for report in reports:
        print(report.resolve())
    return 0
