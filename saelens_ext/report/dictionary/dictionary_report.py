"""The report on dictionaries: a single HTML file that opens anywhere and asks the network for nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_lens import SAE
from transformers import PreTrainedTokenizerBase

from saelens_ext import _checks
from saelens_ext.analysis.labels import Labels
from saelens_ext.analysis.logit_lens import LensResult
from saelens_ext.analysis.profile import DictionaryProfile
from saelens_ext.dictionaries.fit_result import ExemplarFitResult
from saelens_ext.ops.modes import standard_modes
from saelens_ext.report.dictionary import evaluation, snmf_summary, summary
from saelens_ext.report.dictionary.compared import ComparedWith, compared_part
from saelens_ext.report.dictionary.features import feature_data
from saelens_ext.report.dictionary.growth import growth_data
from saelens_ext.report.dictionary.latents import LatentSection, latent_part
from saelens_ext.report.dictionary.regions import region_data
from saelens_ext.report.dictionary.snmf_section import SNMFSection
from saelens_ext.report.format import count, significant, visible
from saelens_ext.report.page import embed_json, write_page

STYLES = ("dictionary.css", "features.css")
SCRIPTS = (
    "text.js",
    "line_chart.js",
    "growth.js",
    "item_map.js",
    "map.js",
    "feature_map.js",
    "table.js",
    "region_table.js",
    "detail.js",
    "region_detail.js",
    "feature_table.js",
    "feature_detail.js",
    "explorer.js",
    "page.js",
)


@standard_modes()
def write_dictionary_report(
    path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    title: str,
    fits: Sequence[ExemplarFitResult] = (),
    chosen: ExemplarFitResult | None = None,
    profile: DictionaryProfile | None = None,
    lens: LensResult | None = None,
    evals: Mapping[str, Any] | None = None,
    generations: Sequence[Mapping[str, str]] = (),
    snmf: SNMFSection | None = None,
    latents: LatentSection | None = None,
    sae: SAE[Any] | None = None,
    labels: Labels | None = None,
    compared: ComparedWith | None = None,
    evidence: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write a report on an exemplar partition, on SNMF dictionaries, or on both, as one self-contained HTML file; or on
    the latents of any other SAE.

    For an exemplar partition, pass ``chosen``, the ``fits`` whose growth it is compared with, and its ``profile``; for
    SNMF pass ``snmf``. With both, the page has a part for each. For any other SAE or transcoder pass ``sae`` and its
    ``profile``, or ``latents`` alone.

    The page shows text of the corpus as text only: it carries a content security policy under which nothing but its own
    script runs and nothing is fetched. The same arguments give the same file, on one machine.

    Args:
        path: the file to write, replaced in one step; missing directories are made.
        tokenizer: of the model, which turns ids into text.
        title: heading of the page.
        fits: all exemplar partitions of the build, at least ``chosen``.
        chosen: the one reported on; K regions.
        profile: of ``chosen.dictionary``, K latents.
        lens: the logit lens of its exemplars, K rows; None where they are not in the residual stream.
        evals: the first dict that ``sae_lens.evals.run_evals`` returns for it, nested or flat; None if it was not run.
        generations: continuations to show side by side, each with the texts ``label``, ``prompt`` and ``text``. A
            ``text`` that begins with the prompt is shown without it.
        snmf: the SNMF dictionaries, with what is known of their features.
        latents: any SAE, with what is known of its latents.
        sae: any SAELens SAE or transcoder, which ``profile``, ``lens``, ``evals`` and ``labels`` are then of.
        compared: another dictionary of the same hook, to be put beside the first one of the page.
        labels: of ``profile``; the table, the map and the details show them with their scores.
        evidence: by kind, the "title" and the "verdict" of its evaluations, from ``evidence_results.json`` beside it.

    Returns:
        The path written.

    Raises:
        ValueError: nothing to report on, or ``chosen`` without its profile; ``chosen`` is not among ``fits``, the
            profile or lens is of another dictionary, or a generation lacks one of its texts.
    """
    if sae is not None:
        if profile is None or chosen is not None or latents is not None:
            raise ValueError("sae= goes with its profile=, and with neither fits, chosen nor latents.")
        latents = LatentSection(dictionary=sae, profile=profile, lens=lens, evals=evals, labels=labels)
        profile = lens = evals = None
    has_regions = chosen is not None or profile is not None or len(fits) > 0
    if has_regions and (chosen is None or profile is None):
        missing = "chosen" if chosen is None else "profile"
        raise ValueError(f"An exemplar partition takes fits, chosen and profile together; {missing} is missing.")
    if latents is not None and (has_regions or snmf is not None):
        raise ValueError("latents= is for a report on that SAE alone: write another for exemplar partitions or SNMF.")
    if not has_regions and snmf is None and latents is None:
        raise ValueError("There is nothing to report on: pass fits, chosen and profile, or snmf=, or latents=.")
    if not has_regions and (
        lens is not None or evals is not None or generations or (labels is not None and sae is None)
    ):
        raise ValueError("lens, evals, generations and labels need a partition: pass fits, chosen and profile.")
    return write_page(
        path,
        "dictionary.html",
        styles=STYLES,
        scripts=SCRIPTS,
        title=title,
        regions=None
        if chosen is None or profile is None
        else _regions(fits, chosen, profile, lens, tokenizer, evals, generations, labels),
        features=_features(snmf, tokenizer)
        if snmf is not None
        else None
        if latents is None
        else latent_part(latents, tokenizer),
        compared=None if compared is None else compared_part(compared, labels),
        evidence=[(visible(str(one["title"])), visible(str(one["verdict"]))) for one in (evidence or {}).values()],
    )


def _regions(
    fits: Sequence[ExemplarFitResult],
    chosen: ExemplarFitResult,
    profile: DictionaryProfile,
    lens: LensResult | None,
    tokenizer: PreTrainedTokenizerBase,
    evals: Mapping[str, Any] | None,
    generations: Sequence[Mapping[str, str]],
    labels: Labels | None,
) -> dict[str, Any]:
    if labels is not None:
        labels.check_belongs(profile)
    _check_same_dictionary(fits, chosen, profile, lens)
    shown, shared_prompt = _generations(generations)
    return {
        "lead": summary.lead(chosen),
        "facts": summary.facts(chosen, profile),
        "growth_note": _growth_note(chosen),
        "builds": summary.builds(fits, chosen),
        "evaluation": evaluation.evaluation_rows(evals) if evals is not None else [],
        "evaluation_note": _evaluation_note(chosen),
        "generations": shown,
        "shared_prompt": shared_prompt,
        "growth": embed_json(growth_data(fits, chosen)),
        "data": embed_json(region_data(chosen, profile, lens, tokenizer, labels)),
    }


def _features(section: SNMFSection, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    steered = section.steered
    return {
        "heading": "Neuron features",
        "evaluation": [],
        "lead": snmf_summary.snmf_lead(section),
        "facts": snmf_summary.snmf_facts(section),
        "levels": snmf_summary.level_rows(section),
        "plots": snmf_summary.loss_plots(section),
        "has_tree": section.hierarchy is not None,
        "steered": steered,
        "target": "" if steered is None else significant(steered.target),
        "prompt": "" if steered is None else visible(steered.prompt),
        "unsteered": "" if steered is None else visible(steered.unsteered.removeprefix(" ")),
        "unreached": _unreached_note(section),
        "concept": snmf_summary.concept_table(section.concept),
        "data": embed_json(feature_data(section, tokenizer)),
    }


def _unreached_note(section: SNMFSection) -> str:
    """For how many continuations the target could not be reached."""
    texts = section.steered.texts if section.steered is not None else ()
    failed = sum(one.text is None for one in texts)
    if failed == 0:
        return "The target was reached with every feature." if texts else ""
    return f"In {count(failed)} of {count(len(texts))} cases the target cannot be reached; the feature says so."


def _check_same_dictionary(
    fits: Sequence[ExemplarFitResult], chosen: ExemplarFitResult, profile: DictionaryProfile, lens: LensResult | None
) -> None:
    """Raise ValueError unless all parts are of one dictionary."""
    if not any(fit is chosen for fit in fits):
        raise ValueError(f"chosen is none of the {len(fits)} fits; pass one of those very objects, such as fits[0].")
    k = chosen.n_regions
    if len(profile.counts) != k:
        raise ValueError(
            f"The profile is of {len(profile.counts)} latents, the chosen dictionary of {k}; profile it with "
            "profile_dictionary(chosen.dictionary, stream)."
        )
    if lens is not None and len(lens.promoted_ids) != k:
        raise ValueError(
            f"The lens is of {len(lens.promoted_ids)} directions, the chosen dictionary of {k}; make it with "
            "logit_lens(model, chosen.dictionary.exemplars)."
        )
    provenance = chosen.provenance
    at_position = provenance.windows.gather(1, provenance.positions[:, None]).squeeze(1)
    wrong = (at_position != provenance.token_ids).nonzero()
    if len(wrong):
        region = int(wrong[0])
        raise ValueError(
            f"The window of region {region} holds token {int(at_position[region])} at position "
            f"{int(provenance.positions[region])}, its provenance names token {int(provenance.token_ids[region])}: the "
            "two are not of the same stream."
        )


def _generations(generations: Sequence[Mapping[str, str]]) -> tuple[list[dict[str, str]], str]:
    """The continuations without their prompts, and the prompt if all share it, else an empty text."""
    shown = []
    for i, generation in enumerate(generations):
        missing = [key for key in ("label", "prompt", "text") if key not in generation]
        if missing:
            raise ValueError(f"Generation {i} lacks {', '.join(missing)}; each needs label, prompt and text.")
        _checks.known_keys(generation, ("label", "prompt", "text"), f"Generation {i}")
        # The space that joins the continuation to its prompt is no indent.
        text = generation["text"].removeprefix(generation["prompt"]).removeprefix(" ")
        shown.append({key: visible(value) for key, value in dict(generation, text=text).items()})
    prompts = {generation["prompt"] for generation in shown}
    return shown, prompts.pop() if len(prompts) == 1 else ""


def _growth_note(fit: ExemplarFitResult) -> str:
    note = (
        "How many regions the first activations of the stream had started. Where a curve still rises, more activations "
        "would start more regions."
    )
    if fit.percentile is None:
        return note
    return note + (
        " A lower percentile means a smaller threshold: more and narrower regions. The regions of one percentile are "
        "not nested in those of another."
    )


def _evaluation_note(fit: ExemplarFitResult) -> str:
    config = fit.dictionary.cfg
    graded = str(config.readout).startswith("top_k")
    k = f", k = {config.k}" if graded else ""
    note = (
        "SAELens' own evaluation, with this dictionary in the place of an SAE "
        f"(readout {config.readout}{k}; basis {config.basis})."
    )
    if config.readout == "one_hot" or (graded and config.k == 1):
        note += (
            " With one active latent per token little of the activation is reconstructed, so poor figures are expected."
        )
    return note
