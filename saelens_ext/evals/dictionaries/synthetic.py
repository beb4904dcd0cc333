"""Dictionaries on SAELens' synthetic models, whose features are known: which of them are found, and what finds them.

Symbols
    F   true features of a synthetic model, in superposition; their directions are unit rows ``(F, d)``
    k   latents of every dictionary, as many as the exemplar partition has regions
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from sae_lens import SAE
from sae_lens.synthetic import (
    HierarchyConfig,
    LowRankCorrelationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
    cosine_similarities,
    eval_sae_on_synthetic_data,
)
from scipy.stats import rankdata
from torch import Tensor
from tqdm.auto import tqdm

from saelens_ext import _checks
from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from saelens_ext.dictionaries.fit_exemplars import fit_exemplar_partition
from saelens_ext.dictionaries.fit_sae import fit_sae
from saelens_ext.dictionaries.fit_snmf import fit_snmf
from saelens_ext.evals.baselines import gaussian_directions, random_activations
from saelens_ext.evals.evidence import Evidence, Failure
from saelens_ext.host.flat_sae import encode_flat
from saelens_ext.ops.modes import standard_modes
from saelens_ext.ops.spherical import spherical_center
from saelens_ext.report.evidence_section import EvidenceSection, Line, LineFigure

Fit = Callable[[Tensor, int, int], SAE[Any]]
"""Makes a dictionary of activations ``(n, d)``, given k and a seed."""
EXEMPLARS, CORESET, GAUSSIAN, TRUTH = "EP", "coreset", "Gaussian directions", "true features"
METHODS = (EXEMPLARS, "SNMF", "SAE")

_HOOK = "synthetic"
_N_BINS = 6
_WHAT = {
    EXEMPLARS: "Exemplar partition; its latents are scored by their cosines.",
    "SNMF": "Semi-nonnegative matrix factorisation with as many features, scored by its codes.",
    "SAE": "A top-k SAE of equal width, trained by SAELens' own trainer on the same activations, scored by its codes.",
    CORESET: "As many directions of activations drawn at random, scored by their cosines.",
    GAUSSIAN: "As many random directions, scored by their cosines.",
    TRUTH: "The directions of the true features themselves: the most that directions can do.",
}


@dataclass(kw_only=True, eq=False)
class SyntheticEvidence(Evidence):
    """How much of what is known to be there dictionaries find.

    ``cells`` has, for each seed and method, one row per metric, and for "matched_cosine" and "probe_auroc" one per true
    feature, with the fraction of activations on which it fires.
    """

    kind: ClassVar[str] = "synthetic"
    title: ClassVar[str] = "Features that are known"
    question: ClassVar[str] = (
        "Of a synthetic model whose features are known, does a dictionary recover the features, and better than as "
        "many random activations or random directions do?"
    )
    unit: ClassVar[str] = "seed"
    unit_text: ClassVar[str] = (
        "Seeds. Each draws a synthetic model with features of its own, activations to fit to, others to judge on, and "
        "whatever is random in the fits; every method sees the same."
    )
    metrics: ClassVar[Mapping[str, str]] = {
        "mcc": "mean correlation coefficient with the true features",
        "matched_cosine": "best cosine of a true feature, mean over features",
        "probe_auroc": "AUROC of the best latent for a true feature, held out",
        "f1": "F1 of latents for their nearest true feature",
        "explained_variance": "explained variance",
    }
    other_bounds: ClassVar[Mapping[str, tuple[float, float]]] = dict.fromkeys(metrics, (0.0, 1.0)) | {
        "matched_cosine": (-1.0, 1.0), "explained_variance": (-np.inf, 1.0),
    }  # fmt: skip
    chance: ClassVar[float | None] = None

    def section(self) -> EvidenceSection:
        """What a page shows of this evidence."""
        known = [metric for metric in _PER_FEATURE if (self.cells["metric"] == metric).any()]
        return replace(super().section(), figures=tuple(map(self._by_rate, known)))

    def _by_rate(self, metric: str) -> LineFigure:
        """How a metric of features depends on how often they fire."""
        own = self.cells[self.cells["metric"] == metric]
        edges = np.unique(np.quantile(own["firing_rate"], np.linspace(0, 1, _N_BINS + 1)))
        bins = np.clip(np.searchsorted(edges, own["firing_rate"], side="right") - 1, 0, max(0, len(edges) - 2))
        means = own.assign(bin=bins).groupby(["method", "bin"])[["firing_rate", "value"]].mean()
        lines = [
            Line(label=name, x=tuple(part["firing_rate"]), y=tuple(part["value"]), kind=self.kinds[name])
            for name in self.kinds
            if name in means.index.get_level_values(0)
            for part in [means.loc[name]]
        ]
        return LineFigure(
            title=f"{self.metrics[metric][0].upper()}{self.metrics[metric][1:]}, by how often a feature fires",
            x_label="fraction of activations on which the feature fires",
            y_label=metric.replace("_", " "),
            lines=tuple(lines),
            note="Features of all seeds in groups of equal size.",
        )


_PER_FEATURE = ("matched_cosine", "probe_auroc")


def synthetic_config() -> SyntheticModelConfig:
    """A small model in the manner of SynthSAEBench: 128 features in 64 dimensions, some far commoner than others, with
    correlations and a hierarchy.
    """
    return SyntheticModelConfig(
        num_features=128,
        hidden_dim=64,
        firing_probability=ZipfianFiringProbabilityConfig(),
        hierarchy=HierarchyConfig(total_root_nodes=16, branching_factor=3, max_depth=1),
        correlation=LowRankCorrelationConfig(rank=8),
        std_firing_magnitudes=0.2,
    )


@standard_modes()
def evaluate_on_synthetic(
    config: SyntheticModelConfig | None = None,
    methods: Sequence[str] = METHODS,
    *,
    others: Mapping[str, Fit] | None = None,
    n_seeds: int = 10,
    n_activations: int = 5_000,
    n_judged: int = 2_000,
    percentile: float | int = 10.0,
    min_positives: int = 20,
    n_bootstrap: int = 2000,
    n_permutations: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = False,
) -> SyntheticEvidence:
    """Fit dictionaries to activations of SAELens' synthetic models and compare them with the features that are in them.

    Every dictionary has as many latents as the exemplar partition has regions (as many as there are features, where
    there is no partition). Recovery, F1 and explained variance are SAELens' own; probing chooses, for each feature, the
    latent that tells best on one half of the judged activations whether it fires, and reports its AUROC on the other.

    Args:
        config: the synthetic model, but for its seed; by default :func:`synthetic_config`.
        methods: of "EP", "SNMF" and "SAE".
        others: further dictionaries by name, each made by a function of activations ``(n, d)``, k and a seed.
        n_seeds: synthetic models, which are the units; 10 are enough for a claim between the default methods.
        n_activations: to fit to.
        n_judged: to judge on.
        percentile: of the exemplar partition.
        min_positives: activations of either half on which a feature must fire, and must not, to be probed for.
        n_bootstrap: resamples of the seeds, for intervals.
        n_permutations: flips of signs, for p-values.
        confidence: of the intervals, in (0, 1).
        seed: of everything random.
        progress: show a progress bar.

    Returns:
        The evidence. A method that fails on a seed is in its ``failures``, and the rest is complete.

    Raises:
        ValueError: an unknown method, none at all, one of a control's name, or an option out of range.

    Examples:
        >>> found = sx.evaluate_on_synthetic(methods=("EP",), n_seeds=2, n_activations=500, n_judged=400)
        >>> sorted(found.kinds)
        ['EP', 'Gaussian directions', 'coreset', 'true features']
    """
    fits = _fits(methods, others or {}, percentile)
    for value, name in ((n_seeds, "n_seeds"), (n_activations, "n_activations"), (min_positives, "min_positives")):
        _checks.positive(value, name)
    if _checks.positive(n_judged, "n_judged") < 4 * min_positives:
        raise ValueError(
            f"n_judged must be at least 4 * min_positives = {4 * min_positives}, got {n_judged}: each half needs "
            "activations with and without a feature."
        )
    rows: list[dict[str, Any]] = []
    failures: list[Failure] = []
    settings = {
        "config": (config or synthetic_config()).to_dict(),
        "n_activations": n_activations,
        "n_judged": n_judged,
        "percentile": percentile,
        "min_positives": min_positives,
        "n_bootstrap": n_bootstrap,
        "n_permutations": n_permutations,
        "confidence": confidence,
        "seed": seed,
    }
    # SAELens draws from the global generator, which is the user's.
    with torch.random.fork_rng(devices=[]):
        for number in tqdm(range(n_seeds), desc="seeds", disable=not progress):
            # Apart, or else random directions could be the true ones, drawn once more.
            own, of_fits, of_controls = (np.random.SeedSequence([seed, number]).generate_state(3) % 2**31).tolist()
            drawn = _Drawn(replace(config or synthetic_config(), seed=own), n_activations, n_judged, min_positives)
            for name, sae, error in _dictionaries(fits, drawn, of_fits, of_controls):
                if sae is None:
                    failures.append(Failure(name, f"seed {number}", error))
                    continue
                rows += [{"seed": number, "method": name, **row} for row in drawn.judge(sae)]
    kinds = {name: "unsupervised" for name in fits} | {CORESET: "control", GAUSSIAN: "control", TRUTH: "supervised"}
    return SyntheticEvidence(
        cells=pd.DataFrame(rows),
        kinds=kinds,
        descriptions={name: _WHAT.get(name, "Given by the caller; scored by its codes.") for name in kinds},
        settings=settings,
        failures=tuple(failures),
    )


def _fits(methods: Sequence[str], others: Mapping[str, Fit], percentile: float | int) -> dict[str, Fit]:
    own: dict[str, Fit] = {
        EXEMPLARS: lambda x, k, seed: fit_exemplar_partition(x, percentile=percentile, seed=seed).dictionary,
        "SNMF": lambda x, k, seed: (
            fit_snmf(x, k, sparsity=1.0, init="svd" if k <= min(x.shape) else "kmeans", seed=seed).dictionary
        ),
        "SAE": lambda x, k, seed: fit_sae(
            x, k, k=min(4, k), training_samples=20 * len(x), batch_size=min(512, len(x)), lr=3e-3, seed=seed
        ),
    }
    for name in methods:
        _checks.choice(name, METHODS, "methods")
    taken = [name for name in others if name in (*METHODS, CORESET, GAUSSIAN, TRUTH)]
    if taken:
        raise ValueError(f"others has the name {taken[0]!r}, as a method or control of this evaluation has; rename it.")
    # The partition first: the others are as wide.
    found = {name: fit for name, fit in own.items() if name in methods} | dict(others)
    if not found:
        raise ValueError(f"methods and others are empty; give at least one of {', '.join(METHODS)}, or a fit.")
    return found


def _dictionaries(
    fits: Mapping[str, Fit], drawn: "_Drawn", seed: int, control_seed: int
) -> Iterator[tuple[str, SAE[Any] | None, str]]:
    """Name, dictionary and error of each method, then of the controls."""
    x, k = drawn.x, drawn.model.cfg.num_features
    for name, fit in fits.items():
        try:
            sae = fit(x, k, seed)
        except Exception as error:  # the other methods and seeds are complete
            yield name, None, str(error)
            continue
        k = sae.cfg.d_sae if name == EXEMPLARS else k
        yield name, sae, ""
    center = spherical_center(x)
    random = random_activations(x, min(k, len(x)), _HOOK, center=center, seed=control_seed)
    gaussian = gaussian_directions(x, k, _HOOK, center=center, seed=control_seed)
    truth = drawn.directions / drawn.directions.norm(dim=1, keepdim=True)
    for name, rows in ((CORESET, random.directions), (GAUSSIAN, gaussian.directions), (TRUTH, truth)):
        assert rows is not None
        yield name, ExemplarPartition.from_regions(rows, rows, center, 1.0), ""


class _Drawn:
    """One synthetic model with activations to fit to and to judge on."""

    def __init__(self, config: SyntheticModelConfig, n_activations: int, n_judged: int, min_positives: int):
        torch.manual_seed(config.seed or 0)
        self.model = SyntheticModel(config)
        torch.manual_seed((config.seed or 0) + 1)
        self.directions = self.model.feature_dict.feature_vectors.detach()
        self.x = self.model.sample(n_activations)
        self.judged, features = self.model.sample_with_features(n_judged)
        self.fires = features > 0
        self.rates = self.fires.double().mean(dim=0).numpy()
        self.min_positives = min_positives
        self.state = torch.random.get_rng_state()

    def judge(self, sae: SAE[Any]) -> list[dict[str, Any]]:
        """The cells of one dictionary, by SAELens' measures and by probing."""
        torch.random.set_rng_state(self.state)  # the same activations for every dictionary
        generator, features = self.model.activation_generator, self.model.feature_dict
        measured = eval_sae_on_synthetic_data(sae, features, generator, num_samples=len(self.judged))
        whole = {
            "mcc": measured.mcc,
            "f1": measured.classification.f1_score,
            "explained_variance": measured.explained_variance,
        }
        rows: list[dict[str, Any]] = [
            {"metric": metric, "value": float(value), "feature": -1, "firing_rate": np.nan}
            for metric, value in whole.items()
        ]
        cosines = cosine_similarities(self.directions, sae.W_dec.detach()).abs().amax(dim=1)
        areas = probe_aurocs(_scores(sae, self.judged), self.fires, self.min_positives)
        for metric, values in (("matched_cosine", cosines.double().numpy()), ("probe_auroc", areas)):
            rows += [
                {"metric": metric, "value": float(value), "feature": number, "firing_rate": self.rates[number]}
                for number, value in enumerate(values)
                if np.isfinite(value)
            ]
        return rows


@torch.no_grad()
def _scores(sae: SAE[Any], x: Tensor) -> Float[Tensor, "n k"]:
    """What a dictionary says of activations: cosines of a partition, codes of any other."""
    return (
        sae.with_readout("cosine").encode(x) if isinstance(sae, ExemplarPartition) else encode_flat(sae, x)
    ).detach()


def probe_aurocs(
    scores: Float[Tensor, "n k"], fires: Bool[Tensor, "n f"], min_positives: int
) -> Float[np.ndarray, " f"]:
    """For each feature, the AUROC on the second half of the rows of the column that is best on the first.

    Args:
        scores: of k latents.
        fires: which features are active.
        min_positives: rows of either half on which a feature must be active, and must not; NaN where it is not.
    """
    half = len(scores) // 2
    values, truth = scores.double().numpy(), fires.numpy()
    first, second = (_aurocs(values[rows], truth[rows]) for rows in (slice(0, half), slice(half, 2 * half)))
    best = first.argmax(axis=1)
    found = second[np.arange(len(best)), best]
    n_active = np.stack([truth[:half].sum(axis=0), truth[half : 2 * half].sum(axis=0)])
    enough = ((n_active >= min_positives) & (half - n_active >= min_positives)).all(axis=0)
    return np.where(enough, found, np.nan)


def _aurocs(scores: np.ndarray, fires: np.ndarray) -> np.ndarray:
    """AUROC of every column for every feature, ``(f, k)``, from the mid-ranks of all rows."""
    ranks = rankdata(scores, axis=0)
    p = fires.sum(axis=0)[:, None].astype(float)
    wins = fires.T.astype(float) @ ranks - p * (p + 1) / 2
    return wins / np.maximum(p * (len(scores) - p), 1)
