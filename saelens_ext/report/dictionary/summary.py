"""The summary of a build in sentences: what was read, how finely it was divided, and how much may be missing."""

from collections.abc import Sequence
from typing import Any

from saelens_ext.analysis.profile import DictionaryProfile
from saelens_ext.dictionaries.fit_result import ExemplarFitResult
from saelens_ext.report.dictionary.growth import fit_label
from saelens_ext.report.format import Fact, Line, angle, count, distance, percentage

_STOPPED = {
    "end_of_stream": (
        "End of the stream",
        "the token budget or the text ran out; the number of regions need not have levelled off",
    ),
    "unseen_mass": ("Unseen mass", "the upper limit of the unseen mass fell below the tolerance"),
    "paper": ("Quiet batches", "the paper's rule: no region was started in several batches in a row"),
}


def lead(fit: ExemplarFitResult) -> str:
    """What a dictionary of this kind is, for whoever meets one for the first time."""
    many = f"{count(fit.n_regions)} regions" if fit.n_regions != 1 else "one region"
    return (
        f"This dictionary divides the activations at one hook into {many}. Each region is anchored by one observed "
        "activation, its exemplar, and holds the activations whose direction from a common centre is closer, in cosine "
        "distance, to that exemplar than to any other. An activation farther than the threshold from every earlier "
        "exemplar starts a region of its own. Nothing is trained."
    )


def facts(fit: ExemplarFitResult, profile: DictionaryProfile) -> list[Fact]:
    """The figures of the summary, in reading order."""
    metadata = fit.dictionary.cfg.metadata.to_dict()
    return [
        model_fact(metadata),
        hook_fact(fit.hook_name, fit.dictionary.cfg.d_in, metadata),
        Fact("seen", "Activations seen", count(fit.n_seen), read_from(metadata)),
        Fact("excluded", "Excluded", *excluded(metadata, fit.n_undirected)),
        _threshold(fit, metadata),
        Fact("regions", "Regions", count(fit.n_regions), _concentration(profile)),
        _unseen(fit),
        Fact("stopped", "Stopped by", *_STOPPED.get(fit.stopped_because, (fit.stopped_because, ""))),
        _profiled(profile),
    ]


def model_fact(metadata: dict[str, Any]) -> Fact:
    """Which model, held how."""
    parts = []
    if metadata.get("model_class_name"):
        parts.append(f"held as {metadata['model_class_name']}")
    if metadata.get("compatibility_mode") is not None:
        parts.append(f"compatibility mode {'on' if metadata['compatibility_mode'] else 'off'}")
    if metadata.get("n_layers") and metadata.get("d_model"):
        parts.append(f"{metadata['n_layers']} layers of width {metadata['d_model']}")
    if metadata.get("normalization_type"):
        parts.append(f"normalisation {metadata['normalization_type']}")
    if metadata.get("dtype"):
        parts.append(str(metadata["dtype"]).removeprefix("torch."))
    return Fact("model", "Model", str(metadata.get("model_name") or "not recorded"), ", ".join(parts))


def hook_fact(hook_name: str, width: int, metadata: dict[str, Any]) -> Fact:
    """Where the activations were read."""
    fired = metadata.get("hook_name")
    known_as = f"; on this model {fired}" if fired and fired != hook_name else ""
    return Fact("hook", "Hook", hook_name or "not recorded", f"activations of width {width}{known_as}")


def active_fact(profile: DictionaryProfile, of: str = "") -> Fact:
    """How many features are active on a token; ``of`` says of how many tokens."""
    silent = int((profile.counts == 0).sum())
    never = "every feature is active somewhere" if silent == 0 else f"{count(silent)} are active nowhere"
    return Fact("active", "Features active", active_per_token(profile), f"on a token{of}; {never}")


def active_per_token(profile: DictionaryProfile) -> str:
    """The mean number of features that are active on a token."""
    return f"{int(profile.counts.sum()) / max(1, profile.n_activations):.1f}"


def read_from(metadata: dict[str, Any]) -> str:
    """What the activations were read from."""
    parts = ["one per token"]
    if metadata.get("dataset_path"):
        parts.append(f"from {metadata['dataset_path']}")
    if metadata.get("context_size"):
        prepended = metadata.get("prepend_bos")
        bos = "" if prepended is None else ", each opened by BOS" if prepended else ", without BOS"
        parts.append(f"in windows of {metadata['context_size']} tokens{bos}")
    return " ".join(parts)


def excluded(metadata: dict[str, Any], n_undirected: int = 0) -> tuple[str, str]:
    """Which tokens were left out, and what more there is to say of it."""
    left_out = metadata.get("exclude_special_tokens")
    if metadata.get("last_token_only"):
        value, meaning = "All but the last token of each document", ""
    elif left_out is None:
        value, meaning = "Not recorded", ""
    elif isinstance(left_out, bool):
        value, meaning = (
            ("Special tokens", "BOS, EOS, padding and the like")
            if left_out
            else ("Nothing", "special tokens were kept")
        )
    else:
        ids = list(left_out)
        value = f"{count(len(ids))} chosen tokens"
        meaning = "token ids " + ", ".join(map(str, ids[:12])) + (" …" if len(ids) > 12 else "")
    read = slice(*(metadata.get("seqpos_slice") or [None]))
    if read != slice(None):
        limits = [read.start, read.stop] + ([read.step] if read.step is not None else [])
        meaning += (
            "; of each window only positions "
            f"[{':'.join('' if limit is None else str(limit) for limit in limits)}] were read"
        )
    if n_undirected:
        meaning += f"; {count(n_undirected)} activations equal the centre and belong to no region"
    return value, meaning.removeprefix("; ")


def _threshold(fit: ExemplarFitResult, metadata: dict[str, Any]) -> Fact:
    theta = fit.threshold
    value = f"{distance(theta.threshold)} cosine distance, {angle(theta.threshold)}"
    if theta.resolution is None:
        return Fact("threshold", "Threshold", value, "given, not estimated")
    kind = (
        "activations of the same batch"
        if metadata.get("calibration") == "within_batch"
        else "activations of different documents"
    )
    sampled = (
        f"percentile {theta.percentile:g} of the distances between {kind}, {count(theta.n_pairs)} pairs"
        if theta.factor is None
        else f"{theta.factor:g} times the median distance to the nearest neighbour in another document, "
        f"{count(theta.n_pairs)} activations"
    )
    if theta.low <= 0 and theta.high >= 2:
        return Fact("threshold", "Threshold", value, f"too few documents to give an interval; {sampled}")
    low, high = theta.low, theta.high
    interval = f"95% interval {distance(low)} to {distance(high)}, {angle(low)} to {angle(high)}"
    return Fact("threshold", "Threshold", value, f"{interval}; {sampled}")


def _concentration(profile: DictionaryProfile) -> str:
    """How the mass is spread over the regions."""
    counts = profile.counts.sort(descending=True).values
    if int(counts.sum()) == 0:
        return ""
    half = int((counts.cumsum(0) * 2 < counts.sum()).sum()) + 1
    alone = int((counts == 1).sum())
    largest = "the largest holds" if half == 1 else f"the {count(half)} largest hold"
    single = "none has" if alone == 0 else "1 has" if alone == 1 else f"{count(alone)} have"
    return f"{largest} half of the profiled activations; {single} a single member among them"


def _unseen(fit: ExemplarFitResult) -> Fact:
    meaning = (
        f"at most {percentage(fit.unseen_mass_upper)} with 95% confidence: the probability that a further activation "
        "of the same kind starts a new region, estimated from the last half of the stream"
    )
    return Fact("unseen", "Unseen mass", percentage(fit.unseen_mass), meaning)


def _profiled(profile: DictionaryProfile) -> Fact:
    meaning = (
        "counts, distances and examples below are over these activations, each in the region of its nearest exemplar"
    )
    if profile.n_unassigned:
        meaning += f"; {count(profile.n_unassigned)} of them belong to no region"
    return Fact("profiled", "Activations profiled", count(profile.n_activations), meaning)


def builds(fits: Sequence[ExemplarFitResult], chosen: ExemplarFitResult) -> list[Line]:
    """One line per fit, in the order of their thresholds."""
    several_hooks = len({fit.hook_name for fit in fits}) > 1
    by = "Percentile" if all(fit.percentile is not None for fit in fits) else "Dictionary"
    lines = []
    for fit in sorted(fits, key=lambda fit: fit.threshold.threshold):
        theta = fit.threshold
        known = theta.resolution is not None and not (theta.low <= 0 and theta.high >= 2)
        cells = {
            by: (fit_label(fit, several_hooks), "this report" if fit is chosen else ""),
            "Threshold": (distance(theta.threshold), f"{distance(theta.low)}–{distance(theta.high)}" if known else ""),
            "Angle": angle(theta.threshold),
            "Activations": count(fit.n_seen),
            "Regions": count(fit.n_regions),
            "Single-member, when built": count(int((fit.counts == 1).sum())),
            "Unseen mass": percentage(fit.unseen_mass),
            "Stopped by": _STOPPED.get(fit.stopped_because, (fit.stopped_because, ""))[0],
        }
        lines.append(Line(cells, fit is chosen))
    return lines
