"""SNMFDictionary: signed groups of neurons with non-negative codes.

Symbols
    x   an activation over neurons, ``(d,)``
    F   features, ``(k, d)``: ``W_dec``; signed, each non-zero at few neurons
    b   the origin, ``b_dec``: where most activations lie, if ``l1`` is not 0, else zero unless set by hand
    g   the code of an activation, ``(k,)``, the g >= 0 that minimises |x - b - g F|^2 + 2 l1 |x - b| sum_i g_i |F_i|

Source: Shafran, Geiger and Geva, "Decomposing MLP activations into interpretable features via semi-nonnegative matrix
factorization", arXiv 2506.10920.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from sae_lens.saes.sae import SAEConfig
from sae_lens.saes.topk_sae import TopK
from sae_lens.util import dtype_to_str
from torch import Tensor, nn

from saelens_ext import _checks
from saelens_ext.dictionaries.decoder_only import UNSET, DecoderOnlyConfig, DecoderOnlySAE, Metadata
from saelens_ext.host import mlp_output
from saelens_ext.host.models import HostModel
from saelens_ext.ops.memory import FEWER_ROWS, memory_for
from saelens_ext.ops.modes import standard_modes, without_autocast
from saelens_ext.ops.nnls.kernels import FeatureGram
from saelens_ext.ops.nnls.solve import check_l1, nnls, solve_codes
from saelens_ext.ops.precision import where_float64_is, wide
from saelens_ext.ops.semi_nmf.updates import support_size

_TOL = {torch.float32: 2e-5, torch.float64: 1e-10}


class Neurons(NamedTuple):
    """The neurons of one feature, the heaviest first."""

    indices: Tensor
    """Which neurons, int64 ``(m,)``, on the CPU."""
    weights: Tensor
    """Their entries in the feature, ``(m,)``, on the CPU."""


@_checks.normalising
@dataclass(kw_only=True)
class SNMFDictionaryConfig(DecoderOnlyConfig):
    """Config of an SNMFDictionary."""

    sparsity: float | int = UNSET
    """Fraction of the ``d_in`` neurons that a feature may use, in (0, 1], rounded up to whole neurons; 1 by default. A
    record of how the features were made: nothing enforces it on features that are changed later."""
    l1: float | int = UNSET
    """Weight of the L1 penalty on the codes, in [0, 1): the cosine that a feature must have with what the others leave
    of an activation to be active, so that few are. 0, the default, is plain non-negative least squares."""

    @classmethod
    def architecture(cls) -> str:
        """The name under which SAELens registers this class."""
        return "snmf"

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """As for the base."""
        return {"sparsity": 1.0, "l1": 0.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.between(self.sparsity, 0, 1, "sparsity", closed_high=True)
        check_l1(self.l1)


class _TopKOfAll(TopK):
    """The ReLU of every code: SAELens' TopK where k is all of them.

    By this type sae-dashboard knows an encoder whose codes depend on each other, and encodes before it takes a part.
    From any other it first cuts the weights, and codes solved on a part of the features are other codes.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


class SNMFDictionary(DecoderOnlySAE):
    """Sparse signed features over neurons with non-negative codes, with SAELens' encode / decode / hook API.

    ``encode`` is exact non-negative least squares of any activation on the features, with the L1 penalty of ``cfg.l1``,
    held-out ones included: it is deterministic and differentiable, in the activation and in ``W_dec`` (first
    derivatives), and the codes grow in proportion to the activation's distance from ``b_dec``. ``decode`` is
    ``code @ W_dec + b_dec``. At ``hook_sae_acts_pre`` is the solution itself, and what a hook makes of it passes a
    ReLU: without a hook, that changes nothing.

    The conditions of optimality hold to 2e-5 of the activation's largest product with a unit feature. The solver works
    in float32, or for a dictionary in float64 in that, to 1e-10; one in half precision rounds features and codes only.

    Source: arXiv 2506.10920, whose code has no encoder.
    """

    cfg: SNMFDictionaryConfig
    _prepared: tuple[Tensor, FeatureGram] | None = None

    @classmethod
    def get_sae_config_class_for_architecture(cls, architecture: str) -> type[SAEConfig]:
        """The config class; called by SAELens while loading."""
        return SNMFDictionaryConfig

    @classmethod
    @standard_modes()
    def from_features(
        cls,
        features: Float[Tensor, "k d"],
        *,
        sparsity: float | int | None = None,
        l1: float | int = 0.0,
        center: Float[Tensor, " d"] | None = None,
        metadata: dict[str, Any] | None = None,
        reshape_activations: Literal["none", "hook_z"] = "none",
    ) -> "SNMFDictionary":
        """Make the dictionary from its features.

        Args:
            features: signed rows over neurons. Rows of zeros are allowed and get zero codes; see :attr:`n_dead`.
            sparsity: fraction of neurons that a feature may use; by default the largest that one does.
            l1: weight of the L1 penalty on the codes, in [0, 1).
            center: ``(d,)`` what becomes ``b_dec``; zero by default.
            metadata: SAELens metadata, such as ``model_name``, ``hook_name`` and ``context_size``.
            reshape_activations: "hook_z" where the hook gives ``(…, heads, d_head)``.

        Raises:
            ValueError: no feature, features that are not finite or all zero, or one that uses more neurons than
                ``sparsity`` allows.
        """
        if features.ndim != 2 or not features.is_floating_point() or not bool(features.any()):
            raise ValueError(
                "features must be a floating-point (k, d) matrix with at least one row that is not zero, got "
                f"{features.dtype} of shape {tuple(features.shape)}, {int(features.count_nonzero())} entries not zero."
            )
        d_sae, d_in = features.shape
        largest = int(_checks.finite(features, "features").count_nonzero(dim=1).max())
        sparsity = (
            largest / d_in if sparsity is None else float(_checks.between(sparsity, 0, 1, "sparsity", closed_high=True))
        )
        allowed = support_size(sparsity, d_in)
        if largest > allowed:
            raise ValueError(
                f"A feature uses {largest} of {d_in} neurons, more than the {allowed} that sparsity={sparsity:g} "
                "allows. Leave sparsity out to have it measured."
            )
        config = SNMFDictionaryConfig(
            d_in=d_in,
            d_sae=d_sae,
            dtype=dtype_to_str(features.dtype),
            device=str(features.device),
            sparsity=sparsity,
            l1=l1,
            metadata=Metadata(**(metadata or {})),
            reshape_activations=reshape_activations,
        )
        dictionary = cls(config)
        origin = features.new_zeros(d_in) if center is None else _checks.finite(center.detach(), "center").to(features)
        dictionary.load_state_dict({"W_dec": features.detach(), "b_dec": origin})
        return dictionary

    @without_autocast()
    def encode(self, x: Tensor) -> Tensor:
        """The codes ``(…, d_sae)``, >= 0, that reconstruct activations ``(…, d_in)`` best under the penalty.

        Memory beyond input and output is bounded: 4,096 activations are solved at a time.

        Raises:
            ValueError: wrong width, or an activation that is not finite.
        """
        n = x.shape[:-1].numel()
        what = f"Codes of {n:,} activations over {self.cfg.d_sae:,} features"
        with memory_for(what, n * self.cfg.d_sae * self.W_dec.element_size(), FEWER_ROWS):
            offset = self.process_sae_in(x)
            codes = self._solve(offset.reshape(-1, self.cfg.d_in)).reshape(*offset.shape[:-1], self.cfg.d_sae)
            codes = self.hook_sae_acts_pre(codes.to(offset.device).to(offset.dtype))
            return self.hook_sae_acts_post(self.activation_fn(codes)).to(x.device)

    def get_activation_fn(self) -> nn.Module:
        """A ReLU: codes are not negative, whatever a hook makes of them."""
        return _TopKOfAll(self.cfg.d_sae)

    def _solve(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """Codes in the working dtype."""
        working = torch.promote_types(x.dtype, torch.float32)
        x = where_float64_is(_checks.finite(x.to(working), "The activation"))
        if torch.is_grad_enabled() and (x.requires_grad or self.W_dec.requires_grad):
            return nnls(x, where_float64_is(self.W_dec).to(working), l1=self.cfg.l1, tol=_TOL[working])
        return solve_codes(x, self._gram(working), _TOL[working], l1=self.cfg.l1)

    @standard_modes(gradients=False)
    def _gram(self, working: torch.dtype) -> FeatureGram:
        """The solver's preparation of the features, which costs as much as the codes of a short text: kept."""
        rows = where_float64_is(self.W_dec.detach())
        # Compared by value: what is written to W_dec.data leaves neither address nor version changed.
        if self._prepared is not None:
            kept, gram = self._prepared
            if (kept.dtype, kept.device, kept.shape) == (rows.dtype, rows.device, rows.shape) and torch.equal(
                kept, rows
            ):
                return gram
        self._prepared = (rows.clone(), FeatureGram.of(_checks.finite(rows, "W_dec").to(working)))
        return self._prepared[1]

    # --- what the features are ---

    @property
    def features(self) -> Tensor:
        """Features over neurons, ``(k, d)``: ``W_dec`` itself."""
        return self.W_dec

    @property
    def support(self) -> Tensor:
        """Which neurons each feature uses, bool ``(k, d)``."""
        return self.W_dec.detach() != 0

    @property
    def n_neurons_used(self) -> int:
        """How many of the ``d`` neurons at least one feature uses."""
        return int(self.support.any(dim=0).sum())

    @property
    def n_dead(self) -> int:
        """How many features use no neuron."""
        return int((~self.support.any(dim=1)).sum())

    @standard_modes()
    def neurons(self, feature: int, n: int | None = None) -> Neurons:
        """The neurons of a feature by falling |weight|, equal ones by index.

        Args:
            feature: index, in [0, d_sae).
            n: how many at most; by default all that are not zero.

        Raises:
            ValueError: no such feature, or ``n`` below 1.
        """
        if not 0 <= feature < self.cfg.d_sae:
            raise ValueError(f"feature must be one of 0 to {self.cfg.d_sae - 1}, got {feature!r}.")
        row = self.W_dec[feature].detach().cpu()
        count = int(row.count_nonzero())
        count = count if n is None else min(count, _checks.positive(n, "n"))
        indices = row.abs().argsort(descending=True, stable=True)[:count]
        return Neurons(indices, row[indices])

    def residual_directions(
        self, model: HostModel, *, hook_name: str | None = None, layer: int | None = None
    ) -> Tensor:
        """What each feature writes into the residual stream, ``(k, d_model)``.

        See :func:`saelens_ext.host.mlp_output.residual_directions`, for the meaning on models with a norm behind the
        MLP too.

        Args:
            model: any TransformerLens model.
            hook_name: the neurons' hook; by default the dictionary's own.
            layer: the block, from 0, instead of ``hook_name``.

        Raises:
            ValueError: the dictionary is not one of the neurons of an MLP of this model.
        """
        return mlp_output.residual_directions(model, self, hook_name=hook_name, layer=layer)

    # --- what SAELens and its neighbours do to a SAE's weights ---

    @torch.no_grad()
    def fold_and_get_W_dec_norm(self) -> Tensor:
        """Scale features to unit norm; codes, being fitted to them, come out larger by the norms by themselves.

        Reconstructions stay as they are. A feature of zeros stays so.

        Returns:
            The norms before, ``(k,)``; 1 for a feature of zeros.
        """
        rows = wide(self.W_dec.detach())
        norms = torch.linalg.vector_norm(rows, dim=1)
        norms = torch.where(norms > 0, norms, 1.0)
        self.W_dec.data.copy_((rows / norms[:, None]).to(self.dtype))
        return norms.to(self.dtype).to(self.device)

    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Make a dictionary built from scaled activations ``s * x`` take raw ones: features and origin shrink by s.

        Exact: codes stay what they were for ``s * x``, and reconstructions are those of raw activations.

        Raises:
            ValueError: a factor that is not positive and finite.
        """
        _checks.between(scaling_factor, 0, math.inf, "scaling_factor")
        self.W_dec.data /= scaling_factor
        self._take_unscaled(scaling_factor)
