"""What an audit finds about the continuations of one prefix: modes, the sources that distinguish them, and steering."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from saelens_ext import _checks, _files
from saelens_ext.continuations.clustering.joint_clusterer import JointClusterer
from saelens_ext.continuations.continuation_set import ContinuationSet
from saelens_ext.continuations.mode_labels import label_modes
from saelens_ext.continuations.validation.findings import Verdict, sizes_finding, stability_finding, untested
from saelens_ext.continuations.validation.results import Validation, combine_validations
from saelens_ext.host.chat_template import in_words
from saelens_ext.ops.label_score import Label


@dataclass(frozen=True, kw_only=True, eq=False)
class PrefixAudit:
    """The audit of one prefix."""

    continuations: ContinuationSet
    """With embeddings, signatures and sources."""
    clusterer: JointClusterer
    """Fitted at the beta and gamma that were chosen: a cluster is a mode."""
    path: pd.DataFrame
    """One row per pair of beta and gamma, with its rate, distortions and number of clusters; ``stability`` and its
    standard error, NaN where they were not needed."""
    validation: Validation | None
    """What steering along the modes did; None if it was not requested, or ``not_validated`` says why it cannot be."""
    not_validated: str = ""
    """Why there is no validation; empty where there is one."""

    @property
    def prefix(self) -> str:
        """The text that was continued, as in the tables; with a chat template what the template made of the prompt."""
        return self.continuations.prefix

    @property
    def prompt(self) -> str:
        """What was given to be continued, before a chat template was put around it; of a conversation its roles and
        what each says."""
        messages = self.continuations.metadata.get("messages")
        return self.continuations.prompt if messages is None else in_words(messages)

    @property
    def labels(self) -> np.ndarray:
        """``(n,)`` mode of each continuation, by falling weight."""
        return self.clusterer.labels_

    @cached_property
    def mode_labels(self) -> tuple[Label, ...]:
        """What each mode could be called, scored on members that did not make the label; see :mod:`mode_labels`."""
        weights = self.continuations.weights.double().numpy()
        return label_modes(self.continuations.answers, self.labels, weights)

    @property
    def stability(self) -> tuple[float, float]:
        """Mean adjusted Rand index with the modes of bootstrap resamples, and its standard error; NaN: not measured."""
        if "stability" not in self.path:
            return np.nan, np.nan
        chosen = (self.path["beta"] == self.clusterer.beta) & (self.path["gamma"] == self.clusterer.gamma)
        found = self.path.loc[chosen, ["stability", "stability_se"]].to_numpy(dtype=np.float64)
        return (float(found[0, 0]), float(found[0, 1])) if len(found) else (np.nan, np.nan)

    @property
    def at_floor(self) -> np.ndarray:
        """``(K,)`` bool: modes with no more members than the clustering requires, where there are several modes."""
        sizes = np.bincount(self.labels, minlength=self.clusterer.n_clusters_)
        return (sizes <= self.min_cluster_size) & (len(sizes) > 1)

    @property
    def min_cluster_size(self) -> int:
        """Fewest continuations of a mode."""
        return self.clusterer.min_cluster_size

    @property
    def figures(self) -> dict[str, float]:
        """beta and gamma of the clustering, its objective, rate, distortions and number of modes, and its stability."""
        measured = ("objective", "rate", "semantic_distortion", "attribution_distortion", "n_clusters")
        found = {"beta": float(self.clusterer.beta), "gamma": float(self.clusterer.gamma)}
        found |= {name: float(getattr(self.clusterer, f"{name}_")) for name in measured}
        return found | {"stability": self.stability[0]}

    def outline(self) -> "PrefixOutline":
        """What an overview needs, without continuations and signatures."""
        names = ("prompt", "figures", "stability", "at_floor", "min_cluster_size", "verdict", "validation")
        shared = {name: getattr(self, name) for name in (*names, "not_validated")}
        return PrefixOutline(n_continuations=len(self.continuations), modes=self.modes(), **shared)

    @cached_property
    def verdict(self) -> Verdict:
        """Whether the modes are moved by steering, one by one, need the joint clustering, and are stable."""
        return verdict_of([self])

    def effect_by_kind(self) -> pd.Series:
        """Fraction of the absolute effect that each kind of source carries, averaged over continuations, largest first.

        Over all sources of the attribution, those that are no columns of the signatures included, where that is
        recorded; kinds that were not attributed are missing. With the gradient backend and with relevance rules kinds
        overlap: an effect that runs from an embedding through a latent is counted at both.
        """
        recorded = self.continuations.metadata.get("attribution", {}).get("share_by_kind")
        if recorded is None:
            sources, signatures = self.continuations.sources, self.continuations.both_views()[1]
            kinds = ["source"] * signatures.shape[1] if sources is None else list(sources.kinds)
            totals = pd.Series(np.abs(signatures).sum(axis=0)).groupby(kinds).sum()
            recorded = totals / (totals.sum() or 1.0)
        return pd.Series(recorded, dtype=float).sort_values(ascending=False)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per continuation, with its mode and whether it is that mode's medoid."""
        table = self.continuations.to_dataframe()
        table.insert(0, "prompt", self.prompt)
        table.insert(1, "prefix", self.prefix)
        table["cluster"] = self.labels
        table["is_medoid"] = np.isin(np.arange(len(table)), self.clusterer.medoid_indices_)
        return table

    def modes(self) -> pd.DataFrame:
        """One row per mode: its members, their weight, whether it is as small as a mode may be, its medoid, and its
        label with the held-out score (:attr:`mode_labels`).
        """
        medoids = self.clusterer.medoid_indices_
        return pd.DataFrame(
            {
                "prompt": self.prompt,
                "prefix": self.prefix,
                "cluster": np.arange(self.clusterer.n_clusters_),
                "n_members": np.bincount(self.labels, minlength=self.clusterer.n_clusters_),
                "weight": self.clusterer.cluster_weights_,
                "at_floor": self.at_floor,
                "medoid": medoids,
                "text": [self.continuations.texts[i] for i in medoids],
                "label": [label.text for label in self.mode_labels],
                "label_auroc": [label.auroc for label in self.mode_labels],
                "label_p_value": [label.p_value for label in self.mode_labels],
            }
        )

    def exemplary_members(self, cluster: int, n: int = 5) -> list[int]:
        """Rows of the n members nearest to a mode's medoid in the weighted distance of the clustering, itself first."""
        self._check_cluster(cluster)
        medoid = int(self.clusterer.medoid_indices_[cluster])
        members = np.flatnonzero(self.labels == cluster)
        e, a = self.continuations.both_views()
        semantic = ((e[members] - e[medoid]) ** 2).sum(axis=1) / self.clusterer.semantic_scale_
        attribution = np.abs(a[members] - a[medoid]).sum(axis=1) / self.clusterer.attribution_scale_
        distance = self.clusterer.gamma * semantic + (1 - self.clusterer.gamma) * attribution
        distance[members == medoid] = -1.0
        return members[np.argsort(distance, kind="stable")][: _checks.positive(n, "n")].tolist()

    def distinguishing_sources(self, cluster: int, n: int = 10) -> pd.DataFrame:
        """The n sources whose effect on a mode's members differs most from that on all other continuations.

        ``effect`` and ``elsewhere`` are weighted means of the signatures, in logits; ``difference`` is the first less
        the second, and rows stand by its size. ``t`` is that difference over its standard error (Welch), which ranks
        sources and is no test: the modes were made from these very signatures.

        Raises:
            ValueError: no such mode.
        """
        self._check_cluster(cluster)
        _, signatures = self.continuations.both_views()
        weights = self.continuations.weights.double().numpy()
        inside = self.labels == cluster
        mean, error = _weighted_mean(signatures, weights * inside)
        if inside.all():
            other, other_error = np.full((2, len(mean)), np.nan)
        else:
            other, other_error = _weighted_mean(signatures, weights * ~inside)
        order = np.argsort(-np.abs(mean - np.nan_to_num(other)), kind="stable")[: _checks.positive(n, "n")]
        sources = self.continuations.sources
        table = pd.DataFrame({"source": order}) if sources is None else sources.select(order.tolist()).to_dataframe()
        table["source"] = order
        table["effect"], table["elsewhere"] = mean[order], other[order]
        table["difference"] = mean[order] - other[order]
        with np.errstate(invalid="ignore", divide="ignore"):
            table["t"] = table["difference"] / np.sqrt(error[order] ** 2 + other_error[order] ** 2)
        return table

    def _check_cluster(self, cluster: int) -> None:
        if not 0 <= cluster < self.clusterer.n_clusters_:
            raise ValueError(f"cluster must be one of 0 to {self.clusterer.n_clusters_ - 1}, got {cluster!r}.")

    def clustering_state(self) -> dict[str, Any]:
        """What :meth:`with_clusters` needs to make the same clustering again; JSON-safe."""
        return {
            "params": {k: v for k, v in self.clusterer.get_params().items() if k != "init"},
            "labels": self.labels.tolist(),
            "not_validated": self.not_validated,
            "path": _files.json_safe(self.path.to_dict(orient="list")),
        }

    @classmethod
    def with_clusters(
        cls, continuations: ContinuationSet, state: Mapping[str, Any], validation: Validation | None
    ) -> "PrefixAudit":
        """Put a saved audit together again: the descent started at its own labels has nothing left to do."""
        clusterer = JointClusterer(**state["params"], init=np.asarray(state["labels"]))
        clusterer.fit(*continuations.both_views(), sample_weight=continuations.weights.double().numpy())
        path = pd.DataFrame(state["path"])
        path[["stability", "stability_se"]] = path[["stability", "stability_se"]].astype(float)
        found = {"continuations": continuations, "clusterer": clusterer, "path": path, "validation": validation}
        return cls(not_validated=state["not_validated"], **found)


@dataclass(frozen=True, kw_only=True, eq=False)
class PrefixOutline:
    """What an overview of many prefixes needs of the audit of one; see :class:`PrefixAudit` for its fields."""

    prompt: str
    n_continuations: int
    modes: pd.DataFrame
    figures: Mapping[str, float]
    """beta, gamma, and what the clustering at them measured."""
    stability: tuple[float, float]
    at_floor: np.ndarray
    min_cluster_size: int
    verdict: Verdict
    validation: Validation | None
    not_validated: str


def verdict_of(prefixes: Iterable[PrefixAudit | PrefixOutline]) -> Verdict:
    """What the audits of one prefix or several found together; with several, tests are over prefixes."""
    tested, reasons, stabilities, at_floor, smallest = [], {}, [], [], []
    for prefix in prefixes:  # once: they may be read from files, one at a time
        if prefix.validation is not None:
            tested.append(prefix.validation)
        reasons[prefix.not_validated] = None
        stabilities.append(prefix.stability)
        at_floor.append(prefix.at_floor)
        smallest.append(prefix.min_cluster_size)
    if not tested:
        steering = untested(" ".join(reasons))
    else:
        try:
            steering = combine_validations(tested).findings()
        except ValueError as error:
            steering = untested(f"The tests of the prefixes cannot be put together: {error}")
    sizes = sizes_finding(np.concatenate(at_floor), smallest)
    return Verdict((*steering, stability_finding(stabilities), sizes))


def _weighted_mean(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and its standard error, column by column; NaN for the error of fewer than two effective rows."""
    weights = weights / weights.sum()
    mean = weights @ values
    effective = 1 / (weights**2).sum()
    variance = weights @ (values - mean) ** 2
    return mean, np.sqrt(variance / (effective - 1)) if effective > 1.0001 else np.full_like(mean, np.nan)
