"""What a model card says of one dictionary: what it is, how it was built, how good it is, and how to load it."""

from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any

from huggingface_hub import EvalResult
from sae_lens import SAE
from sae_lens import __version__ as sae_lens_version

from saelens_ext.analysis.labels import Labels
from saelens_ext.dictionaries.architecture_names import OWN
from saelens_ext.dictionaries.fit_result import ExemplarFitResult
from saelens_ext.dictionaries.hierarchy import HierarchicalSNMF
from saelens_ext.dictionaries.snmf_fit_result import SNMFFitResult
from saelens_ext.hub.contents import Contents
from saelens_ext.hub.model_card import Section, cell, facts, table

_ABOUT = {
    "exemplar_partition": (
        "Voronoi regions around observed activations ([arXiv 2605.14347](https://arxiv.org/abs/2605.14347)): each "
        "latent is anchored by one activation that was observed, found in one streaming pass at a fixed cosine "
        "distance."
    ),
    "snmf": (
        "Sparse signed groups of MLP neurons with non-negative codes ([arXiv "
        "2506.10920](https://arxiv.org/abs/2506.10920)), by semi-nonnegative matrix factorisation of activations. "
        "`encode` is exact non-negative least squares, under an L1 penalty where `l1` is not 0: a feature is then "
        "active where its cosine with what the others leave of an activation, taken from `b_dec`, exceeds `l1`, and "
        "in the fit activations of any norm weighed the same."
    ),
}
_KINDS = {"exemplar_partition": "ExemplarPartition", "snmf": "SNMFDictionary"}
# The config's fields that say how to run it rather than how it was built.
_NOT_SHOWN = {"d_in", "d_sae", "device", "metadata", "format_version", "architecture", "apply_b_dec_to_input"}

Metrics = Mapping[str, Any]

N_LABELS = 10
"""Labels shown on a card."""


def describe(contents: Contents, repo_id: str, sae_id: str, metrics: Metrics | None, revision: str | None) -> Section:
    """The section of a card about a dictionary and what is pushed with it."""
    whole, sae = contents.dictionary, contents.sae
    architecture = sae.cfg.architecture()
    widths = " → ".join(map(str, whole.ranks)) if isinstance(whole, HierarchicalSNMF) else str(sae.cfg.d_sae)
    levels = isinstance(whole, HierarchicalSNMF)
    kind = "HierarchicalSNMF" if levels else _KINDS.get(architecture, f"SAELens {architecture}")
    made = sae.cfg.metadata
    hooks = dict.fromkeys((made.hook_name, made.hook_name_out))  # a transcoder writes elsewhere than it reads
    place = ", ".join(f"`{cell(name)}`" for name in (made.model_name, *hooks) if name)
    about = _ABOUT.get(architecture, f"A SAELens SAE of architecture `{architecture}`.")
    if isinstance(whole, HierarchicalSNMF):
        about += f" Levels of {widths} features, each gathering those of the one below: `{sae_id}/level_l`."
    figures = _figures(contents) | dict(metrics or {})
    parts = [
        f"## `{sae_id}`",
        about,
        f"```python\n{snippet(contents, repo_id, sae_id, revision)}\n```",
        "### How it was built",
        facts(_built(sae) | {"sae_lens_version": sae_lens_version}),
    ]
    if figures:
        parts += ["### Metrics", table(["metric", "value"], figures.items())]
    parts += _labelled(contents.labels)
    for number, level in enumerate(contents.levels):
        parts += _labelled(level.labels, f"Labels of level_{number}")
    for found in (contents.evidence or {}).values():
        parts += [f"### {cell(str(found.get('title')))}", cell(str(found.get("verdict")))]
    if files := _beside(contents, sae_id):
        parts.append("Beside it: " + ", ".join(files) + ".")
    return Section(sae_id=sae_id, kind=kind, size=f"{widths} × {sae.cfg.d_in}", place=place, text="\n\n".join(parts))


def snippet(contents: Contents, repo_id: str, sae_id: str, revision: str | None) -> str:
    """Python that loads the dictionary, and what lies beside it."""
    whole, on_main = contents.dictionary, revision in (None, "main")
    hierarchy = isinstance(whole, HierarchicalSNMF)
    own = hierarchy or whole.cfg.architecture() in OWN
    place = f'"{repo_id}", "{sae_id}"'
    lines = []
    # SAELens' own loader reads the main branch alone.
    if on_main:
        lines += ["import saelens_ext  # pip install saelens-ext"] if own else []
        lines += ["from sae_lens import SAE", ""]
        first = f'"{repo_id}", "{sae_id}/level_0")  # the finest level' if hierarchy else f"{place})"
        lines += [f"sae = SAE.from_pretrained({first}", "", "# Or with what lies beside it:"]
    install = "" if own and on_main else "  # pip install saelens-ext"
    at = "" if on_main else f', revision="{revision}"'
    lines += [f"from saelens_ext.hub import load_from_hub{install}", "", f"found = load_from_hub({place}{at})"]
    return "\n".join([*lines, "found.dictionary, found.fit, found.profile"])


def results(contents: Contents, sae_id: str, metrics: Metrics | None) -> list[EvalResult]:
    """The finite numbers among metrics, as the Hub reads them; ``sae_id`` is an argument of each."""
    dataset = str(contents.sae.cfg.metadata.get("dataset_path") or "unknown")
    given = {name: value for one in (contents.evidence or {}).values() for name, value in one["figures"].items()}
    given |= dict(metrics or {})
    found = {name: value.item() if hasattr(value, "item") else value for name, value in given.items()}
    return [
        EvalResult(
            task_type="feature-extraction",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=name,
            metric_value=value,
            metric_name=f"{name} ({sae_id})",
            metric_args={"sae_id": sae_id},
        )
        for name, value in found.items()
        if type(value) in (int, float) and isfinite(value)
    ]


def tags(contents: Contents) -> list[str]:
    """Words under which the Hub should find the repository."""
    whole = contents.dictionary
    architecture = "snmf" if isinstance(whole, HierarchicalSNMF) else whole.cfg.architecture()
    tag = architecture.replace("_", "-")
    return [tag] if architecture in OWN else ["sparse-autoencoder", tag]


def _built(sae: SAE[Any]) -> dict[str, Any]:
    config = {name: value for name, value in sae.cfg.to_dict().items() if name not in _NOT_SHOWN}
    named = {"architecture": sae.cfg.architecture(), **config, **sae.cfg.metadata.to_dict()}
    return {name: value for name, value in named.items() if not name.startswith("sae_lens_")}


def _figures(contents: Contents) -> dict[str, Any]:
    fit, profile, whole = contents.fit, contents.profile, contents.dictionary
    figures: dict[str, Any] = {}
    if isinstance(fit, ExemplarFitResult):
        figures |= {
            "regions": fit.n_regions,
            "activations clustered": fit.n_seen,
            "threshold (cosine distance)": fit.threshold.threshold,
            "fraction of further activations that would start a region": fit.unseen_mass,
            "its 95% upper limit": fit.unseen_mass_upper,
            "stopped because": fit.stopped_because,
        }
    elif isinstance(fit, SNMFFitResult):
        figures |= {"activations fitted": fit.n_seen, "squared error / sum of squares": fit.loss}
        if fit.held_out_loss is not None:
            figures[f"the same on {fit.n_held_out} activations held out"] = fit.held_out_loss
        figures |= {"features never used": fit.n_dead, "stopped because": fit.stopped_because}
    elif isinstance(whole, HierarchicalSNMF):
        losses = zip(whole.ranks, whole.encode_losses)
        figures |= {f"squared error / sum of squares, {rank} features": loss for rank, loss in losses}
        figures["activations fitted"] = whole.n_seen
    if profile is not None:
        figures["activations profiled"] = profile.n_activations
        figures["latents met while profiling"] = int((profile.counts > 0).sum())
    return figures | _of_labels(contents.labels)


def _of_labels(labels: Labels | None) -> dict[str, Any]:
    if labels is None:
        return {}
    return {
        "latents with a label": sum(map(bool, labels.texts)),
        "of them labels that detect members better than chance, held out (5% level)": int(labels.distinguishes.sum()),
    }


def _labelled(labels: Labels | None, heading: str = "Labels") -> list[str]:
    """The labels that detect their latents best, as a table."""
    if labels is None:
        return []
    order = labels.auroc.nan_to_num(-1).argsort(descending=True, stable=True).tolist()
    best = [(latent, labels[latent]) for latent in order if labels[latent].distinguishes][:N_LABELS]
    rows = [[i, _text(label.text), f"{label.auroc:.2f} [{label.low:.2f}, {label.high:.2f}]"] for i, label in best]
    return [f"### {heading}", table(["latent", "label", "held-out AUROC"], rows)] if rows else []


def _text(text: str) -> str:
    """Text of the corpus as it can stand in Markdown that shows HTML."""
    return "".join(f"&#{ord(c)};" if c in "<>&[]`*_|\\~!#" else c for c in text)


def _any(found: Iterable[Any]) -> Any:
    return next((one for one in found if one is not None), None)


def _beside(contents: Contents, sae_id: str) -> list[str]:
    found = {
        "statistics of the fit (`fit.json`, `fit.safetensors`)": contents.fit,
        "what each latent responds to (`profile.json`, `profile.safetensors`)": contents.profile,
        "a label per latent (`labels.json`, `labels.safetensors`)": contents.labels,
        "what the features of levels respond to (`level_l/profile.json`)": _any(one.profile for one in contents.levels),
        "labels of levels (`level_l/labels.json`)": _any(one.labels for one in contents.levels),
        "the config of the run (`runner_cfg.json`)": contents.runner_config,
        f"[a report]({sae_id}/report.html)": contents.report,
        "the figures of its evaluations (`evidence_results.json`)": contents.evidence,
    }
    return [name for name, value in found.items() if value is not None]
