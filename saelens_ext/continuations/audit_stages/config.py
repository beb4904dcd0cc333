"""Settings of an audit of continuations, checked before anything is computed."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from typing_extensions import TypedDict

from saelens_ext import _checks
from saelens_ext.continuations.attribution.sites import BACKENDS
from saelens_ext.continuations.clustering.path import GAMMAS
from saelens_ext.continuations.clustering.problem import check_beta_and_gamma
from saelens_ext.continuations.embed import MODES
from saelens_ext.continuations.validation.options import VALIDATION_STRENGTHS, ValidationOptions, checked_controls


@_checks.normalising
@dataclass(kw_only=True, frozen=True)
class AuditConfig:
    """Settings of an audit; those of each stage are those of the function that it calls."""

    n: int = 96
    """Distinct continuations of each prefix, at least 2."""
    temperature: float | int = 1.0
    """Of sampling."""
    top_p: float | int = 0.9
    """Of sampling."""
    max_new_tokens: int = 20
    """Of each continuation."""
    stop: str | tuple[str, ...] = ()
    """Texts that end a continuation."""
    chat_template: bool = False
    """Whether a prefix is a user's message, put into the tokenizer's chat template; a conversation always is."""
    chat_template_options: dict[str, Any] | None = None
    """Passed to the template: {"enable_thinking": false}."""
    answer_after: str = ""
    """Marker, such as "</think>", behind which the answer stands that is embedded, attributed and measured alone;
    continuations without it are left out."""
    weights: str = "uniform"
    """Weight of each continuation: "uniform", "frequency", "path" or "length_normalised"."""
    embedding: str = "contextual"
    """"contextual", the continuation's tokens in the context of the prefix, or "sentence"."""
    backend: str = "linear"
    """Of attribution: "linear", "gradient" or "relp"."""
    max_sources: int = 4096
    """Sources of the prefix that signatures keep."""
    betas: tuple[float | int, ...] = (1.0, 1.5, 2.0, 2.5, 3.0)
    """Values of beta to try; higher than the paper's, because ``min_cluster_size`` forbids small clusters."""
    gammas: tuple[float | int, ...] = GAMMAS
    """Values of gamma to try, the fraction of beta that weights the semantic view."""
    n_clusters: tuple[int, int] = (2, 10)
    """Fewest and most clusters; the most stable clustering among those is chosen."""
    min_cluster_size: int | None = None
    """Fewest continuations of a mode; by default a sixteenth of them, and at least 2."""
    n_resamples: int = 10
    """Bootstrap resamples for the stability of each clustering."""
    validate: bool = True
    """Whether to test the modes by steering."""
    strengths: tuple[float | int, ...] = VALIDATION_STRENGTHS
    """Of steering."""
    top: int = 10
    """Latents that each direction scales."""
    direction: str = "medoid"
    """What stands for a mode: its "medoid", its "center" or the medoid in "contrast" to all."""
    sign: str = "all"
    """Latents scaled: of "all" weights, or of "positive" or "negative" ones alone."""
    held_out: float | int = 0.5
    """Fraction of each mode's members that effects are measured on, and no direction is chosen from, in (0, 1)."""
    max_rows: int = 32
    """Held-out members that effects are measured on, at most."""
    generate: int = 0
    """Open-ended samples to draw under each direction of each method; 0 draws none."""
    partitions: tuple[str, ...] = ()
    """Further controls: "coherent_semantic", "coherent_attribution", "length" and "top_activation"."""
    seed: int = 0
    """Of everything random."""
    batch_size: int | None = None
    """Continuations per forward pass of each stage, at most; by default 32, and 16 where they are scored or attributed.
    Lower it where memory does not suffice: results change by rounding alone, so another call may go on with another."""

    def __post_init__(self) -> None:
        _checks.normalise_fields(self)
        for name in ("n", "max_new_tokens", "max_sources"):
            _checks.positive(getattr(self, name), name)
        if self.n < 2:
            raise ValueError("n must be at least 2, since one continuation differs from no other.")
        _checks.choice(self.embedding, MODES, "embedding")
        _checks.choice(self.backend, BACKENDS, "backend")
        checked_controls(self.partitions, "partitions")
        self.validation_options()  # which checks them
        if self.generate:
            _checks.positive(self.generate, "generate")
        if _checks.positive(self.n_resamples, "n_resamples") < 2:
            raise ValueError(f"n_resamples must be at least 2, got {self.n_resamples!r}; 10 is usual.")
        for name in ("min_cluster_size", "batch_size"):
            if getattr(self, name) is not None:
                _checks.positive(getattr(self, name), name)
        if len(self.n_clusters) != 2 or not 1 <= self.n_clusters[0] <= self.n_clusters[1]:
            raise ValueError(f"n_clusters must be 1 <= fewest <= most, got {self.n_clusters!r}.")
        if not self.betas or not self.gammas:
            raise ValueError(f"betas and gammas must not be empty, got {self.betas!r} and {self.gammas!r}.")
        for beta in self.betas:
            for gamma in self.gammas:
                check_beta_and_gamma(beta, gamma)

    @property
    def per_pass(self) -> dict[str, Any]:
        """The batch size as a keyword of each stage's function, if there is one."""
        return {} if self.batch_size is None else {"batch_size": self.batch_size}

    @property
    def identity(self) -> dict[str, Any]:
        """The settings on which results hang by more than rounding."""
        return {name: value for name, value in asdict(self).items() if name != "batch_size"}

    def smallest_mode(self, n: int) -> int:
        """Fewest of n continuations that a mode may have."""
        return self.min_cluster_size or max(2, n // 16)

    def validation_options(self, **other: Any) -> ValidationOptions:
        """How modes are tested by steering, with some options replaced."""
        names = ("strengths", "top", "direction", "sign", "held_out", "max_rows", "seed")
        own: dict[str, Any] = {name: getattr(self, name) for name in names}
        own["controls"] = self.partitions
        return ValidationOptions(**own | other)


class AuditOptions(TypedDict, total=False):
    """Fields of :class:`AuditConfig`, as keywords."""

    n: int
    temperature: float | int
    top_p: float | int
    max_new_tokens: int
    stop: str | Sequence[str]
    chat_template: bool
    chat_template_options: dict[str, Any] | None
    answer_after: str
    weights: str
    embedding: str
    backend: str
    max_sources: int
    betas: Sequence[float | int]
    gammas: Sequence[float | int]
    n_clusters: Sequence[int]
    min_cluster_size: int | None
    n_resamples: int
    validate: bool
    strengths: Sequence[float | int]
    top: int
    direction: str
    sign: str
    held_out: float | int
    max_rows: int
    generate: int
    partitions: Sequence[str]
    seed: int
    batch_size: int | None
