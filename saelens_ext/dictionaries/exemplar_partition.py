"""ExemplarPartition: a dictionary of Voronoi regions around observed activations.

Symbols
    x   an activation, ``(d,)``
    c   the centre, ``b_dec``
    e_k the exemplar of region k: the unit direction (x_k - c) / |x_k - c| of one observed activation x_k
    m_k the mean of region k: the normalised sum of its members' unit directions
    w_k row k of ``W_dec``: e_k or m_k, as ``cfg.basis`` says
    z_k = <x - c, w_k>, in units of the activation;  cos_k = z_k / |x - c|
    distance = 1 - cosine, in [0, 2]

Source: Rumbelow, "Exemplar Partitioning", arXiv 2605.14347, sections on construction and readout.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from sae_lens.saes.sae import SAEConfig
from sae_lens.saes.topk_sae import TopK
from sae_lens.util import dtype_to_str
from torch import Tensor, nn

from saelens_ext import _checks
from saelens_ext.dictionaries.decoder_only import UNSET, DecoderOnlyConfig, DecoderOnlySAE, Metadata
from saelens_ext.ops.memory import FEWER_ROWS, memory_for
from saelens_ext.ops.modes import standard_modes, without_autocast
from saelens_ext.ops.spherical import assign_nearest

Basis = Literal["exemplar", "mean"]
Readout = Literal["top_k", "top_k_cosine", "one_hot", "projection", "cosine"]


class Assignment(NamedTuple):
    """Which region each activation belongs to."""

    regions: Tensor
    """Index of the nearest exemplar, or -1 where rejected, int64; the leading shape of the activations."""
    distances: Tensor
    """Cosine distance to that exemplar, in [0, 2], float32: the novelty score of the activation."""


@_checks.normalising
@dataclass(kw_only=True)
class ExemplarPartitionConfig(DecoderOnlyConfig):
    """Config of an ExemplarPartition."""

    threshold: float = UNSET
    """Cosine distance, in (0, 2], within which an activation joins a region rather than starting one."""
    percentile: float | None = None
    """Percentile of pairwise distances at which the threshold was calibrated, in (0, 100); None if it was given."""
    basis: Basis = UNSET
    """What the rows of ``W_dec`` are: "exemplar" (default) or "mean". Membership always goes by exemplars."""
    readout: Readout = UNSET
    """How an activation becomes a code: "top_k" (default), the k largest projections z, none below zero;
    "top_k_cosine", the same on cosines; "one_hot", 1 at the largest; "projection", every z; "cosine", every cosine."""
    k: int = UNSET
    """How many latents "top_k" and "top_k_cosine" keep, 1 to d_sae; 1 by default."""

    @classmethod
    def architecture(cls) -> str:
        """The name under which SAELens registers this class."""
        return "exemplar_partition"

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """As for the base; a threshold must always be given."""
        return {"threshold": None, "basis": "exemplar", "readout": "top_k", "k": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.between(self.threshold, 0, 2, "threshold", closed_high=True)
        if self.percentile is not None:
            _checks.between(self.percentile, 0, 100, "percentile")
        _checks.choice(self.basis, get_args(Basis), "basis")
        _checks.choice(self.readout, get_args(Readout), "readout")
        self.k = _checks.positive(self.k, "k")
        if self.k > self.d_sae:
            raise ValueError(f"k must be at most the number of regions, {self.d_sae}, got {self.k}.")


class ExemplarPartition(DecoderOnlySAE):
    """Voronoi regions around observed activations, with SAELens' encode / decode / hook API.

    ``encode`` reads regions out as ``cfg.readout`` says, ``decode`` is ``code @ W_dec + b_dec``, ``assign`` gives the
    exact region of any activation. Under the default readout, an activation that started a region is reproduced
    exactly: its code is its distance from the centre, at its own region.

    Examples:
        >>> regions, distances = partition.assign(activations)
        >>> exemplars = partition.center + 3 * partition.exemplars  # exemplars lie in their own regions
        >>> bool((partition.assign(exemplars).regions == torch.arange(len(exemplars))).all())
        True

    Source: arXiv 2605.14347.
    """

    cfg: ExemplarPartitionConfig
    other_basis: Tensor
    extra_rows = ("other_basis",)

    @classmethod
    def get_sae_config_class_for_architecture(cls, architecture: str) -> type[SAEConfig]:
        """The config class; called by SAELens while loading."""
        return ExemplarPartitionConfig

    @classmethod
    @standard_modes()
    def from_regions(
        cls,
        exemplars: Float[Tensor, "k d"],
        means: Float[Tensor, "k d"],
        center: Float[Tensor, " d"],
        threshold: float | int,
        *,
        percentile: float | int | None = None,
        basis: Basis = "exemplar",
        readout: Readout = "top_k",
        k: int = 1,
        metadata: dict[str, Any] | None = None,
        reshape_activations: Literal["none", "hook_z"] = "none",
    ) -> "ExemplarPartition":
        """Make the dictionary from its regions.

        Args:
            exemplars: unit rows, one per region, in order of arrival.
            means: unit rows, the mean direction of each region's members.
            center: the origin of all directions.
            threshold: cosine distance of membership, in (0, 2].
            percentile: percentile of pairwise distances that gave the threshold.
            basis: rows that encode and decode use.
            readout: how activations become codes.
            k: latents kept by the top-k readouts.
            metadata: SAELens metadata, such as ``model_name``, ``hook_name`` and ``context_size``.
            reshape_activations: "hook_z" where the hook gives ``(…, heads, d_head)``.

        Raises:
            ValueError: no region, mismatched shapes, non-finite entries or rows that are not of unit norm.
        """
        if exemplars.shape != means.shape or exemplars.shape[1:] != center.shape or len(exemplars) == 0:
            raise ValueError(
                f"exemplars {tuple(exemplars.shape)} and means {tuple(means.shape)} must have one shape (k, d) with k "
                f"of at least 1, and center {tuple(center.shape)} the shape (d,)."
            )
        rows, other = (exemplars, means) if basis == "exemplar" else (means, exemplars)
        d_sae, d_in = exemplars.shape
        config = ExemplarPartitionConfig(
            d_in=d_in,
            d_sae=d_sae,
            dtype=dtype_to_str(exemplars.dtype),
            device=str(exemplars.device),
            threshold=float(threshold),
            percentile=None if percentile is None else float(percentile),
            basis=basis,
            readout=readout,
            k=k,
            metadata=Metadata(**(metadata or {})),
            reshape_activations=reshape_activations,
        )
        dictionary = cls(config)
        state = {"W_dec": rows.detach(), "other_basis": other.detach(), "b_dec": center.detach()}
        dictionary.process_state_dict_for_loading(state)
        dictionary.load_state_dict(state)
        return dictionary

    @property
    def exemplars(self) -> Tensor:
        """Unit directions of the activations that started the regions, ``(k, d)``, in order of arrival."""
        return self.W_dec if self.cfg.basis == "exemplar" else self.other_basis

    @property
    def means(self) -> Tensor:
        """Unit mean directions of the regions' members, ``(k, d)``."""
        return self.other_basis if self.cfg.basis == "exemplar" else self.W_dec

    @property
    def center(self) -> Tensor:
        """The origin of all directions, ``(d,)``."""
        return self.b_dec

    @standard_modes(gradients=False)
    def assign(self, x: Float[Tensor, "*batch d"], reject: bool = False) -> Assignment:
        """Find the region of each activation: the nearest exemplar, whatever the basis and readout.

        Memory beyond the input and the result is bounded (tens of megabytes and one float32 copy of the exemplars).

        Args:
            x: activations, any dtype.
            reject: give region -1 to activations farther than ``cfg.threshold`` from every exemplar.

        Returns:
            Regions and cosine distances of the leading shape of ``x``. An activation equal to the centre has no
            direction: its distance to every region is 1 and it counts as nearest to region 0.

        Raises:
            ValueError: wrong width or non-finite activations.
        """
        _checks.width(x, self.cfg.d_in, "The activation")
        rows = self.here(x).reshape(-1, self.cfg.d_in)
        what = f"Regions and distances of {len(rows):,} activations, and a copy of {len(self.exemplars):,} exemplars,"
        with memory_for(what, 16 * len(rows) + 4 * self.exemplars.numel(), FEWER_ROWS):
            regions, distances = assign_nearest(rows, self.center, self.exemplars)
        if reject:
            regions = torch.where(distances > self.cfg.threshold, -1, regions)
        return Assignment(*(part.to(x.device).reshape(x.shape[:-1]) for part in (regions, distances.float())))

    @without_autocast()
    def encode(self, x: Tensor) -> Tensor:
        """Read activations ``(…, d_in)`` out as codes ``(…, d_sae)``, as ``cfg.readout`` says."""
        n = x.shape[:-1].numel()
        what = f"Codes of {n:,} activations over {self.cfg.d_sae:,} regions"
        with memory_for(what, n * self.cfg.d_sae * self.W_dec.element_size(), FEWER_ROWS):
            return self._codes(self.process_sae_in(x)).to(x.device)

    def _codes(self, offset: Tensor) -> Tensor:
        z = offset @ self.W_enc
        if self.cfg.readout in ("top_k_cosine", "cosine"):
            # At the centre itself every cosine is 0 / 0; it has no direction, so its code is zero.
            z = z / offset.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
        z = self.hook_sae_acts_pre(z)
        if self.cfg.readout in ("top_k", "top_k_cosine"):
            z = TopK(self.cfg.k)(z)
        elif self.cfg.readout == "one_hot":
            has_direction = (offset != 0).any(dim=-1, keepdim=True)
            z = nn.functional.one_hot(z.argmax(dim=-1), self.cfg.d_sae).to(z.dtype) * has_direction
        return self.hook_sae_acts_post(z)

    def get_activation_fn(self) -> nn.Module:
        """SAELens' own ``TopK`` where the readout is one, which is how other tools recognise it."""
        return TopK(self.cfg.k) if self.cfg.readout in ("top_k", "top_k_cosine") else nn.Identity()

    @standard_modes()
    def with_readout(
        self, readout: Readout | None = None, *, k: int | None = None, basis: Basis | None = None
    ) -> "ExemplarPartition":
        """The same regions read out another way; the original is left as it is.

        Args:
            readout: as in the config; by default unchanged.
            k: latents that the top-k readouts keep; by default unchanged.
            basis: rows to encode and decode with; by default unchanged.
        """
        config = replace(
            self.cfg,
            basis=basis or self.cfg.basis,
            readout=readout or self.cfg.readout,
            k=self.cfg.k if k is None else k,
            metadata=Metadata(**self.cfg.metadata.to_dict()),
        )
        rows, other = (self.exemplars, self.means) if config.basis == "exemplar" else (self.means, self.exemplars)
        dictionary = ExemplarPartition(config)
        dictionary.load_state_dict(
            {"W_dec": rows.detach(), "other_basis": other.detach(), "b_dec": self.center.detach()}
        )
        return dictionary

    # --- what SAELens and its neighbours do to a SAE's weights ---

    @torch.no_grad()
    def fold_and_get_W_dec_norm(self) -> Tensor:
        """The row norms, which are 1: nothing is folded."""
        return self.get_W_dec_norm()

    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """Make a dictionary built from scaled activations ``s * x`` take raw ones: the centre shrinks, directions stay.

        Exact for the readouts whose codes grow with the activation; codes are then in units of raw activations.

        Raises:
            NotImplementedError: for readouts whose codes do not scale, "one_hot", "cosine" and "top_k_cosine".
        """
        if self.cfg.readout not in ("top_k", "projection"):
            raise NotImplementedError(
                f"An activation scale cannot be folded under readout={self.cfg.readout!r}, whose codes do not grow "
                "with the activation, so that reconstructions would change. Use with_readout('top_k') or 'projection' "
                "first."
            )
        self._take_unscaled(scaling_factor)

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Check shapes and finiteness, and that every row is a direction.

        Raises:
            ValueError: the weights are not those of an exemplar partition.
        """
        super().process_state_dict_for_loading(state_dict)
        for name in ("W_dec", "other_basis"):
            # bfloat16 keeps 8 bits of each entry, so a unit row comes back within about 2**-8 of unit norm.
            worst = float((state_dict[name].float().norm(dim=1) - 1).abs().max())
            if worst > 1e-2:
                raise ValueError(f"Rows of {name} must be unit directions, as exemplars are; one is off by {worst:.3g}")
