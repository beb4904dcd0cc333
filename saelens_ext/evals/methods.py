"""A method under evaluation: what scores activations, and the directions by which it can act on the model.

Symbols
    k  columns: scores of an activation, one of which an evaluation chooses for each concept
    c  the origin that activations are measured from, ``(d,)``
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from sae_lens import SAE
from torch import Tensor

from saelens_ext import _checks
from saelens_ext.concepts.detector import Detector
from saelens_ext.host.flat_sae import hooks_of, latent_rows
from saelens_ext.host.models import HostModel
from saelens_ext.ops.modes import standard_modes
from saelens_ext.steering.interventions import add_direction

Kind = Literal["unsupervised", "supervised", "control"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Method:
    """k scores of an activation, and how each acts on the model.

    With a detector alone it can be judged by what it detects, and not steered with.
    """

    name: str
    """As it stands in tables; several draws of one control share it."""
    detector: Detector
    """What scores; it reads at ``detector.hook_name``."""
    directions: Tensor | None = None
    """Unit rows ``(k, d)`` that act on the model, one per column (0 for a dead latent); None: scores only."""
    acts_at: str | None = None
    """The hook where the directions act; for a transcoder the one it writes to."""
    origin: Tensor | None = None
    """c at ``acts_at``; None: 0, or not known."""
    latents: tuple[int, ...] = ()
    """The latent, or the direction given, behind each column."""
    signs: tuple[int, ...] = ()
    """1 or -1 by column: whether it is that direction or its opposite."""
    kind: Kind = "unsupervised"
    """What an evaluation asks of it: its merit ("unsupervised"), an upper reference that uses labels ("supervised"), or
    what would be seen without any merit ("control")."""
    draw: int = 0
    """Number of a control that is drawn several times under one name; results are averaged over draws."""
    description: str = ""
    """What it is, in a sentence, for a page."""

    def __post_init__(self) -> None:
        _checks.choice(self.kind, ("unsupervised", "supervised", "control"), "kind")
        k = len(self.detector.names)
        parts = {"directions": self.directions, "latents": self.latents, "signs": self.signs}
        wrong = {name: len(part) for name, part in parts.items() if part is not None and len(part) not in (0, k)}
        if wrong:
            raise ValueError(f"The detector of {self.name!r} has {k} columns, got {wrong}; give one entry per column.")

    @classmethod
    def from_dictionary(
        cls,
        name: str,
        sae: SAE[Any],
        *,
        similarity: Literal["cosine", "dot", "code"] = "cosine",
        basis: Literal["exemplar", "mean"] | None = None,
        latents: Sequence[int] | None = None,
        kind: Kind = "unsupervised",
        description: str = "",
    ) -> "Method":
        """A method of a dictionary's latents: any SAELens SAE or transcoder, those of this package among them.

        Args:
            name: of the method.
            sae: the dictionary.
            similarity: "cosine" or "dot" with its directions, or its own "code"; see :meth:`Detector.from_dictionary`.
            basis: "exemplar" or "mean", of a dictionary that has both; by default its rows of ``W_dec``.
            latents: in [0, d_sae); by default all.
            kind: see :class:`Method`.
            description: see :class:`Method`.

        Raises:
            ValueError: as :meth:`Detector.from_dictionary`, or no hook known at which the dictionary writes.
        """
        detector = Detector.from_dictionary(sae, similarity=similarity, basis=basis, latents=latents)
        rows = latent_rows(sae, list(detector.latents), basis)
        by = {"code": "its own codes", "dot": "projections on its directions"}.get(similarity, "cosines with them")
        return cls(
            name=name,
            detector=detector,
            directions=_units(rows),
            acts_at=hooks_of(sae)[1],
            origin=None if sae.cfg.normalize_activations != "none" else sae.b_dec.detach(),
            latents=detector.latents,
            signs=(1,) * len(rows),
            kind=kind,
            description=description or f"A {sae.cfg.architecture()} of {len(rows)} directions, scored by {by}.",
        )

    @classmethod
    def from_directions(
        cls,
        name: str,
        directions: Tensor,
        hook_name: str,
        *,
        similarity: Literal["cosine", "dot"] = "cosine",
        center: Tensor | None = None,
        both_signs: bool = False,
        kind: Kind = "unsupervised",
        draw: int = 0,
        description: str = "",
    ) -> "Method":
        """A method of bare directions.

        Args:
            name: of the method.
            directions: ``(k, d)``, or ``(d,)`` for one; none of them 0.
            hook_name: where they are compared with activations and act.
            similarity: as for :meth:`Detector.from_directions`.
            center: c, ``(d,)``; 0 by default.
            both_signs: offer each direction's opposite as well, since its sign says nothing (a principal component):
                2k columns.
            kind: see :class:`Method`.
            draw: see :class:`Method`.
            description: see :class:`Method`.

        Raises:
            ValueError: as :meth:`Detector.from_directions`.
        """
        rows = directions[None] if directions.ndim == 1 else directions
        offered = torch.cat([rows, -rows]) if both_signs else rows
        detector = Detector.from_directions(offered, hook_name, similarity=similarity, center=center)
        return cls(
            name=name,
            detector=detector,
            directions=detector.directions,
            acts_at=hook_name,
            origin=detector.origin,
            latents=tuple(range(len(rows))) * (len(offered) // len(rows)),
            signs=(1,) * len(rows) + (-1,) * (len(offered) - len(rows)),
            kind=kind,
            draw=draw,
            description=description or f"{len(rows)} directions{', both signs of each' if both_signs else ''}.",
        )

    def intervention(
        self, model: HostModel, column: int, coefficient: float | int
    ) -> AbstractContextManager[HostModel]:
        """Add a multiple of a column's direction at the method's own hook.

        Args:
            model: any TransformerLens model.
            column: in [0, k).
            coefficient: length of what is added, in units of the activation; negative to go against the direction.

        Returns:
            A context manager that gives the model.

        Raises:
            ValueError: the method only scores, no such column, or as
                :func:`~saelens_ext.steering.interventions.add_direction`.
        """
        hook_name, directions = self.acting()
        if not 0 <= column < len(directions):
            raise ValueError(f"column must be one of 0 to {len(directions) - 1}, got {column!r}.")
        return add_direction(model, hook_name, directions[column], coefficient)

    def acting(self) -> tuple[str, Tensor]:
        """The hook and the directions ``(k, d)`` by which the method acts; ValueError for one that only scores."""
        if self.directions is None or self.acts_at is None:
            raise ValueError(
                f"The method {self.name!r} only scores: it has no directions to act by. Make it by from_dictionary or "
                "from_directions."
            )
        return self.acts_at, self.directions


def check_methods(methods: Iterable[Method], *taken: str) -> list[Method]:
    """Return the methods as a list.

    Args:
        methods: at least one.
        *taken: names that the evaluation gives to methods of its own.

    Raises:
        ValueError: no method, a name used by two that are not draws of one control, or one that is taken.
    """
    chosen = _checks.listed(methods, "methods", "Method")
    seen = set[tuple[str, int]]()
    for method in chosen:
        if method.name in taken:
            raise ValueError(f"A method is called {method.name!r}, as one that the evaluation adds; rename it.")
        if (method.name, method.draw) in seen:
            raise ValueError(
                f"Two methods are called {method.name!r}; give each its own name, or draws of one control different "
                "draw numbers."
            )
        seen.add((method.name, method.draw))
    return chosen


@standard_modes()
def _units(rows: Tensor) -> Tensor:
    rows = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
