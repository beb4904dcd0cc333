"""Audits made up for the report's tests: planted modes, tests by steering with known effects, and the worst of
texts.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import torch

from saelens_ext.analysis.labels import Labels
from saelens_ext.analysis.profile import DictionaryProfile
from saelens_ext.continuations.clustering.joint_clusterer import JointClusterer, rate_distortion_path
from saelens_ext.continuations.continuation_set import ContinuationSet
from saelens_ext.continuations.prefix_audit import PrefixAudit
from saelens_ext.continuations.source_table import SourceTable
from saelens_ext.continuations.steering.passes import MEASURES
from saelens_ext.continuations.validation.methods import METHODS
from saelens_ext.continuations.validation.results import Validation
from tests.report import synthetic

HOOKS = ("blocks.1.hook_mlp_out", "blocks.2.hook_mlp_out")
ABOUT = {
    "model": {"model_name": "tiny-<b>llama</b>", "n_layers": 3, "d_model": 24, "compatibility_mode": False},
    "dictionaries": [{"architecture": "snmf", "hook_name": hook, "d_sae": 12} for hook in HOOKS],
    "embedder": "all-MiniLM-L6-v2",
}
CONFIG = {"n": 90, "temperature": 1.0, "weights": "uniform", "stop": [], "betas": [0.5, 1.0, 1.5], "seed": 0}
HOSTILE = '</script><img src=x onerror="window.pwned=1">'
PROMPT = f"The bank & {HOSTILE} was"
STRENGTHS = (-1.0, -0.5, 0.0, 0.5, 1.0)
PHRASES = (
    " closed for the weekend",
    " steep and covered in reeds",
    " robbed by two masked men",
    " a blood bank",
    " a long row of seats",
)
SLOPES = {"joint": 0.30, "attribution": 0.25, "semantic": 0.1, "single_member": 0.2}
"""Of the mean demeaned logit of a mode's members; other methods do nothing."""


@cache
def tokenizer():
    """The tokenizer of all made-up audits."""
    return synthetic.make_tokenizer()


def make_set(
    n: int = 90,
    k: int = 3,
    *,
    prompt: str = PROMPT,
    template: tuple[str, str] = ("", ""),
    seed: int = 0,
    mode: np.ndarray | None = None,
) -> ContinuationSet:
    """``n`` continuations in ``k`` modes that both views show; continuation i is in planted mode ``i % k``, or as
    ``mode`` says.
    """
    rng = np.random.default_rng(seed)
    mode = np.arange(n) % k if mode is None else mode
    texts = [f"{PHRASES[m % len(PHRASES)]}, case {i}" for i, m in enumerate(mode)]
    for i, text in enumerate(synthetic.HOSTILE[: n // 3]):
        texts[3 * i] = f"{PHRASES[mode[3 * i] % len(PHRASES)]} {text}"
    embeddings = rng.normal(size=(k, 24))[mode] + 0.5 * rng.normal(size=(n, 24))
    signatures = (rng.normal(size=(k, 40)) * (rng.random((k, 40)) < 0.4))[mode] + 0.15 * rng.standard_t(4, size=(n, 40))
    whole = template[0] + prompt + template[1]
    ids = [tokenizer().bos_token_id, *tokenizer()(whole, add_special_tokens=False).input_ids]
    lengths = torch.tensor([5 + i % 7 for i in range(n)])
    log_probs = torch.where(
        torch.arange(12) < lengths[:, None], -torch.rand(n, 12, generator=torch.Generator().manual_seed(seed)), 0.0
    )
    return ContinuationSet(
        prompt=prompt,
        prefix=whole,
        prefix_ids=tuple(ids),
        token_ids=torch.where(log_probs < 0, 7, -1),
        lengths=lengths,
        texts=tuple(texts),
        log_probs=log_probs,
        weights=torch.full((n,), 1 / n, dtype=torch.float64),
        embeddings=torch.tensor(embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).float(),
        signatures=torch.tensor(signatures).float(),
        sources=make_sources(ids),
        columns={"count": torch.arange(n) % 3 + 1},
        metadata={
            "sampling": {"temperature": 1.0, "top_p": 0.9, "seed": 0, "n_draws": 2 * n},
            "attribution": {"backend": "linear", "share_of_effect": 0.9876},
        },
    )


def make_sources(ids: list[int]) -> SourceTable:
    """24 latents of two dictionaries and 16 other sources, over the positions of a prefix."""
    kinds = ["latent"] * 24 + ["error", "mlp", "embedding", "bias"] * 4
    positions = tuple(i % len(ids) for i in range(40))
    return SourceTable(
        kinds=tuple(kinds),
        hooks=tuple(HOOKS[i % 2] for i in range(40)),
        positions=positions,
        latents=tuple(i // 2 if i < 24 else -1 for i in range(40)),
        activations=(1.0,) * 40,
        tokens=tuple(tokenizer().convert_ids_to_tokens([ids[p] for p in positions])),
        dictionaries=tuple(i % 2 if i < 24 else -1 for i in range(40)),
    )


def make_audit(
    n: int = 90,
    k: int = 3,
    *,
    validated: bool = True,
    prompt: str = PROMPT,
    slopes: dict[str, float] | None = None,
    **options: Any,
) -> PrefixAudit:
    """The audit of one prefix, clustered for real; its tests by steering are made up."""
    held = make_set(n, k, prompt=prompt, **options)
    e, a = held.embeddings.double().numpy(), held.signatures.double().numpy()
    table = rate_distortion_path(e, a, (0.5, 1.0, 1.5), (0.3, 0.7), random_state=0).to_dataframe()
    known = table["n_clusters"] > 1
    table["stability"], table["stability_se"] = np.where(known, 0.875, np.nan), np.where(known, 0.0375, np.nan)
    clusterer = JointClusterer(1.0, 0.3, init=np.arange(n) % k, random_state=0).fit(e, a)
    validation = (
        make_validation(held.prefix, clusterer.labels_, SLOPES if slopes is None else slopes) if validated else None
    )
    return PrefixAudit(
        continuations=held,
        clusterer=clusterer,
        path=table,
        validation=validation,
        not_validated="" if validated else "Steering was not asked for, <b>by the way</b>.",
    )


def make_weak_audit() -> PrefixAudit:
    """Seven modes, six of them as small as allowed and found in few resamples: every direction moves the continuations,
    of one mode alone most along its own, and directions from shuffled members do as well.
    """
    mode = np.repeat(np.arange(7), [60, *[6] * 6])
    held = make_set(96, 7, mode=mode)
    e, a = held.both_views()
    clusterer = JointClusterer(3.0, 0.3, init=mode, min_cluster_size=6, random_state=0).fit(e, a)
    assert sorted(np.bincount(clusterer.labels_)) == [*[6] * 6, 60]
    path = clusterer.rate_distortion_path(e, a, (3.0,), (0.3,)).to_dataframe()
    others = dict.fromkeys(("semantic", "attribution", "global", "single_member"), 0.05)
    slopes = {"joint": 0.098, "random_partition": 0.101, "wrong_cluster": 0.02, **others}
    validation = make_validation(held.prefix, clusterer.labels_, slopes, n_own=1)
    table = path.assign(stability=0.28, stability_se=0.03)
    return PrefixAudit(continuations=held, clusterer=clusterer, path=table, validation=validation)


def make_validation(
    prefix: str, labels: np.ndarray, slopes: dict[str, float], *, seed: int = 0, n_own: int | None = None
) -> Validation:
    """Up to 30 random rows are held out; effects grow linearly with the strength, with a little noise.

    All modes are moved most by their own direction, or the first ``n_own`` alone.
    """
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.permutation(len(labels))[:30])
    found = []
    for method in METHODS:
        for row in rows:
            slope = slopes.get(method, 0.0) + 0.03 * rng.normal()
            cluster = 0 if method == "global" else int(row) % 3 if method == "semantic" else int(labels[row])
            for strength in STRENGTHS:
                for measure, factor in zip(MEASURES, (1.0, 0.1, 1.3)):
                    change = 0.0 if strength == 0 else factor * (slope * strength + 0.01 * rng.normal())
                    found.append((prefix, method, int(row), cluster, int(labels[row]), strength, measure, change))
    members = pd.DataFrame(
        found, columns=["prefix", "method", "row", "cluster", "joint_cluster", "strength", "measure", "change"]
    )
    modes = sorted(set(labels.tolist()))
    n_own = len(modes) if n_own is None else n_own
    cells = [
        (prefix, measure, i, j, (0.31 if i == j < n_own else -0.12 if j in (i, i + 1) else 0.004) * (1 + i), 10)
        for measure in MEASURES
        for i in modes
        for j in modes
    ]
    shares = [
        (prefix, method, mode, 1.0, 0.5 if method == "joint" else 0.25, 0.25, 16)
        for method in METHODS
        for mode in modes
    ]
    return Validation(
        members=members,
        cells=pd.DataFrame(cells, columns=["prefix", "measure", "direction", "cluster", "change", "n_members"]),
        directions=pd.DataFrame(),
        generations=pd.DataFrame(
            shares, columns=["prefix", "method", "cluster", "strength", "share", "unsteered", "n"]
        ),
        settings={
            "top": 10,
            "strengths": list(STRENGTHS),
            "specificity_strength": 1.0,
            "n_bootstrap": 100,
            "n_permutations": 500,
            "seed": 0,
        },
    )


def make_profile(hook: str = HOOKS[0]) -> DictionaryProfile:
    """What the 12 latents of one dictionary respond to; the last one to nothing."""
    fit = synthetic.make_fit(tokenizer(), 12)
    return replace(
        synthetic.make_profile(fit, n_examples=6),
        hook_name=hook,
        hook_aliases=(hook,),
        boundary=None,
        coherence=None,
        mean_distance=None,
        max_distance=None,
        latent_names=tuple(f"latent {i}" for i in range(12)),
    )


def make_labels(profile: DictionaryProfile, hook: str = HOOKS[0]) -> Labels:
    """A label that is markup for each latent of a profile."""
    k = profile.d_sae
    figures = {"auroc": 0.9, "auroc_low": 0.8, "auroc_high": 0.95, "null_high": 0.7, "p_value": 0.001}
    return Labels(
        method="contexts",
        hook_name=hook,
        texts=tuple(f"label {i} </i>" for i in range(k)),
        outputs=(),
        sentences=(),
        n_members=torch.full((k,), 9),
        n_others=torch.full((k,), 9),
        settings={},
        **{name: torch.full((k,), value, dtype=torch.float64) for name, value in figures.items()},
    )
