"""How an audit was made: the facts of a prefix, and the settings of the whole."""

from collections.abc import Mapping, Sequence
from typing import Any

from saelens_ext.continuations.prefix_audit import PrefixAudit
from saelens_ext.continuations.validation.figures import counted, fixed
from saelens_ext.report.audit.wording import plain
from saelens_ext.report.format import Fact, count, percentage, visible

_WEIGHTS = {
    "uniform": "each counts alike",
    "frequency": "by how often each was sampled",
    "path": "by the probability of the whole continuation",
    "length_normalised": "by the exponential of the log-probability per token",
}
_KINDS = {
    "error": "errors (what dictionaries do not reconstruct)",
    "embedding": "token embeddings",
    "mlp": "MLP outputs without a dictionary",
    "bias": "decoder biases",
}
_BACKENDS = {
    "linear": "attention patterns, norm scales and MLPs frozen: direct linear effects",
    "gradient": "activation times gradient through the model as it is",
    "relp": "norms frozen and nonlinear parts replaced by their local slopes",
}


def dictionary_hooks(about: Mapping[str, Any]) -> list[str]:
    """The hook of each dictionary of an audit, in their order."""
    dictionaries = about.get("dictionaries") or []
    return [str(one.get("hook_name", "")) if isinstance(one, Mapping) else "" for one in dictionaries]


def facts(audit: PrefixAudit, config: Mapping[str, Any]) -> list[Fact]:
    """The figures of one prefix, in reading order."""
    return [_continuations(audit), _weights(audit, config), _modes(audit), _signatures(audit), _carried(audit)]


def _continuations(audit: PrefixAudit) -> Fact:
    held = audit.continuations
    lengths, sampling = held.lengths.tolist(), held.metadata.get("sampling")
    span = (
        f"{min(lengths)} to {max(lengths)} tokens"
        if min(lengths) < max(lengths)
        else f"{lengths[0]} token{'s' if lengths[0] > 1 else ''}"
    )
    meaning = f"{span} long"
    if isinstance(sampling, Mapping) and "temperature" in sampling:
        meaning += (
            f"; sampled at temperature {plain(sampling['temperature'])}, top-p "
            f"{plain(sampling.get('top_p'))}, seed {plain(sampling.get('seed'))}"
        )
        if "n_draws" in sampling:
            meaning += f", in {count(int(sampling['n_draws']))} draws"
        differs = sampling.get("log_prob_difference")
        if isinstance(differs, Mapping):
            size = differs.get("mean_absolute")
            known = "are not known" if size is None else f"differ from the model’s by {fixed(size, 3)} nats per token"
            meaning += f", by another sampler, whose log-probabilities {known}"
    return Fact("continuations", "Distinct continuations", count(len(held)), meaning)


def _weights(audit: PrefixAudit, config: Mapping[str, Any]) -> Fact:
    held = audit.continuations
    meaning = f"effective sample size of the weights, {_WEIGHTS.get(str(config.get('weights')), 'as given')}"
    return Fact("weights", "Worth in equal continuations", fixed(held.effective_sample_size, 1), meaning)


def _modes(audit: PrefixAudit) -> Fact:
    clusterer = audit.clusterer
    fewest = counted(clusterer.min_cluster_size, "continuation")
    meaning = f"at beta {clusterer.beta:g} and gamma {clusterer.gamma:g}, of at least {fewest} each"
    return Fact("modes", "Modes", count(clusterer.n_clusters_), meaning)


def _signatures(audit: PrefixAudit) -> Fact:
    held, signatures = audit.continuations, audit.continuations.both_views()[1]
    described = held.metadata.get("attribution")
    meaning = "of the prefix, behind each signature"
    if isinstance(described, Mapping):
        backend = str(described.get("backend"))
        meaning += (
            f"; backend {plain(backend)} ({_BACKENDS[backend]})"
            if backend in _BACKENDS
            else f"; backend {plain(backend)}"
        )
        if isinstance(described.get("share_of_effect"), float):
            meaning += f"; they hold {percentage(described['share_of_effect'])} of the prefix’s effect"
    return Fact("sources", "Sources", count(signatures.shape[1]), meaning)


def _carried(audit: PrefixAudit) -> Fact:
    kinds = {"latent": 0.0, **audit.effect_by_kind()}
    others = [f"{percentage(value)} {_KINDS.get(kind, kind)}" for kind, value in kinds.items() if kind != "latent"]
    meaning = "of the absolute effect on the continuations is that of latents, which alone can be steered"
    if audit.continuations.metadata.get("attribution", {}).get("kinds_overlap"):
        others.append("kinds overlap with this backend: what runs from an embedding through a latent counts at both")
    return Fact("carried", "Effect of latents", percentage(kinds["latent"]), "; ".join([meaning, *others]))


def settings_rows(about: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Everything about how the audit was made: names and values."""
    by_default = {"min_cluster_size": "a sixteenth of the continuations, at least 2", "batch_size": "32, or 16"}
    shown = {key: by_default[key] if value is None and key in by_default else value for key, value in config.items()}
    return [
        *_about_rows(about),
        *((_spaced(key), plain(value)) for key, value in shown.items()),
    ]


def _spaced(key: Any) -> str:
    return visible(str(key).replace("_", " "))


def _about_rows(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for key, value in about.items():
        entries: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
        for number, entry in enumerate(entries):
            name = _spaced(key)
            singular = f"{name[:-3]}y" if name.endswith("ies") else name.removesuffix("s")
            rows.append((f"{singular} {number}" if len(entries) > 1 else name, _entry(entry)))
    return rows


def _entry(entry: Any) -> str:
    if isinstance(entry, Mapping):
        return "; ".join(f"{_spaced(key)} {plain(value)}" for key, value in entry.items())
    return plain(entry)
