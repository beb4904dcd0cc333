"""From the values in a published pickle to tensors, checked.

Symbols
    k  regions
    d  width of the activations
    n  examples of a region
    m  entries of all regions together (members, batches, reservoir vectors)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saelens_ext.published.stand_ins import (
    Array,
    Dictionary,
    Instance,
    Numbers,
    Region,
    UnsafePickleError,
    bytes_of,
    short,
)

_MAX_TEXT = 2**20  # characters of a prompt or label; the published prompts are of 128 tokens
_UNIT_TOLERANCE = 1e-3
_SEPARATION_TOLERANCE = 1e-4
_BLOCK_BYTES = 2**26

# Attributes under which the regions were kept, and what the classes are known to hold; others are reported and left
# out.
_REGION_KEYS = ("partitions", "concepts")
_DICTIONARY_STATE = {"center", "threshold", "merge_close", "_exemplars", "_exemplars_capacity", *_REGION_KEYS}
_DICTIONARY_STATE |= {"_last_batch_new_partition_rate", "_last_batch_new_concept_rate"}
_REGION_STATE = {"member_count", "exemplar_direction", "mean_member_direction", "member_coherence", "label"}
_REGION_STATE |= {"sum_dist_to_exemplar", "sum_sq_dist_to_exemplar", "source_iterations", "constituent_sample_indices"}
_REGION_STATE |= {"sample_prompts", "boundary_prompts", "sample_members"}


class Ragged(NamedTuple):
    """Lists of different lengths, one per region, end to end."""

    values: Tensor
    """``(m, …)``: those of region 0, then those of region 1, and so on."""
    offsets: Tensor
    """Where each begins, and the end: int64 ``(k + 1,)``."""

    def row(self, region: int) -> Tensor:
        """The entries of one region."""
        return self.values[self.offsets[region] : self.offsets[region + 1]]


class PublishedExamples(NamedTuple):
    """Example prompts of each region; where there are fewer than n, distances are NaN, positions and prompts -1."""

    distances: Tensor
    """Cosine distance to the exemplar, in [0, 2]: float32 ``(k, n)``."""
    positions: Tensor
    """Position in the prompt, BOS included: int64 ``(k, n)``."""
    prompts: Tensor
    """Index of the prompt: int64 ``(k, n)``."""


@dataclass(kw_only=True, frozen=True, eq=False)
class RegionStatistics:
    """What a published pickle says of its regions, beside their exemplars and means; tensors on the CPU.

    Counts, coherence, distances and prompts describe the assignment at arrival under the author's batches, not the
    final Voronoi cells; :func:`saelens_ext.profile_dictionary` gives those of any text.
    """

    counts: Tensor
    """Members of each region: int64 ``(k,)``."""
    coherence: Tensor
    """|sum of the members' unit directions| / members, in [0, 1]: float32 ``(k,)``."""
    distance_sums: Tensor
    """Sum of the members' cosine distances to the exemplar: float64 ``(k,)``."""
    squared_distance_sums: Tensor
    """Sum of their squares: float64 ``(k,)``."""
    nearest: PublishedExamples
    """Up to ten prompts nearest to each exemplar, nearest first; the exemplar's own is at distance 0."""
    boundary: PublishedExamples
    """Up to ten prompts farthest from each exemplar, farthest first."""
    prompts: tuple[str, ...]
    """The prompts that the examples index."""
    members: Ragged
    """Stream positions of the members of each region, in the author's order: int64."""
    iterations: Ragged
    """Batches in which each region gained members, rising: int64."""
    reservoir: Ragged | None
    """Unit directions of up to 30 random members of each region, ``(m, d)`` float32; None if they were left out."""
    labels: tuple[str | None, ...]
    """The author's label of each region, if any."""
    merge_close: bool | None
    """Whether near regions were merged while it was built."""
    last_founding_rate: float | None
    """Fraction of the activations of the last batch that started a region."""


@dataclass(kw_only=True, frozen=True, eq=False)
class Regions(RegionStatistics):
    """Everything that a published pickle says."""

    center: Tensor
    threshold: float
    exemplars: Tensor
    means: Tensor
    ignored: tuple[str, ...]


class Contents:
    """Reads checked values; what is shared by many objects is counted each time it is read."""

    def __init__(self, size: int, n_items: int):
        self.size = size
        self.prompts: dict[str, int] = {}
        self._left = {"array bytes": size, "list items": n_items}

    def spend(self, what: str, amount: int) -> None:
        """Count something against what the file can hold."""
        self._left[what] -= amount
        if self._left[what] < 0:
            raise UnsafePickleError(f"it repeats its content: its objects together hold more {what} than the file")

    def vector(self, value: Any, name: str, d: int | None = None) -> np.ndarray:
        """A finite vector, ``(d,)`` float32."""
        if type(value) is not Array or not hasattr(value, "shape"):
            raise UnsafePickleError(f"{name} is {short(value)} instead of an array")
        n, code = value.shape[0], value.dtype.code
        if len(value.shape) != 1 or code[0] != "f" or n == 0 or d not in (None, n):
            wanted = "a vector of floats" if d is None else f"a vector of {d} floats"
            raise UnsafePickleError(f"{name} has shape {value.shape} and dtype {code!r}; it should be {wanted}")
        self.spend("array bytes", n * value.dtype.itemsize)
        vector = np.frombuffer(bytes_of(value.content), dtype=value.dtype.order + code).astype(np.float32)
        if not np.isfinite(vector).all():
            raise UnsafePickleError(f"{name} holds NaN or infinity")
        return vector

    def prompt(self, value: Any) -> int:
        """Index of a prompt among all of them; equal ones are kept once."""
        return self.prompts.setdefault(text(value, "it holds {} where a prompt is expected"), len(self.prompts))

    def numbers(self, value: Any, kind: type, name: str) -> np.ndarray:
        """Whole numbers of at least 0, int64; those of a set rising."""
        if type(value) is not kind and not (kind is set and type(value) is Numbers):
            raise UnsafePickleError(f"{name} is {short(value)}")
        entries = value.items if type(value) is Numbers else value
        self.spend("list items", len(entries))
        if set(map(type, entries)) - {int}:
            raise UnsafePickleError(f"{name} holds something else than whole numbers")
        numbers = np.fromiter(entries, dtype=np.int64, count=len(entries))
        if len(numbers) and numbers.min() < 0:
            raise UnsafePickleError(f"{name} holds the negative number {numbers.min()}")
        return np.sort(numbers) if kind is set else numbers


def text(value: Any, complaint: str) -> str:
    """A text that is not too long; ``complaint`` has a place for what it is otherwise."""
    if type(value) is not str or len(value) > _MAX_TEXT:
        raise UnsafePickleError(f"{complaint.format(short(value))}: a text of at most {_MAX_TEXT} characters")
    return value


def number(value: Any, name: str) -> float:
    """A finite number."""
    if type(value) not in (int, float) or not np.isfinite(value):
        raise UnsafePickleError(f"{name} is {short(value)} instead of a finite number")
    return float(value)


def read_regions(root: Any, size: int, n_items: int, *, reservoir: bool) -> Regions:
    """Make tensors of what ``restricted_pickle.load`` has read from a file of ``size`` bytes.

    ``n_items`` is the number of list items in it; ``reservoir`` keeps the sampled members, which are most of the file.

    Raises:
        UnsafePickleError: the value is no published dictionary, or breaks a rule of one: a finite centre, a threshold
            in (0, 2], unit directions, coherence in [0, 1], counts of at least 1.
    """
    state = _state(root, Dictionary, "the file's content")
    contents = Contents(size, n_items)
    center = contents.vector(state.get("center"), "the centre")
    threshold = number(state.get("threshold"), "the threshold")
    if not 0 < threshold <= 2:
        raise UnsafePickleError(f"the threshold is {threshold:g}; a cosine distance in (0, 2] is expected")
    items = next((state[key] for key in _REGION_KEYS if key in state), None)
    if type(items) is not list or not items:
        raise UnsafePickleError(f"its regions are {short(items)} instead of a list of at least one region")
    d, k = len(center), len(items)
    if 4 * d * k > size:
        raise UnsafePickleError(f"it repeats its content: {k} regions of width {d} do not fit a file of {size} bytes")
    states = [_state(region, Region, f"region {i}") for i, region in enumerate(items)]
    rate = next((state[key] for key in sorted(state) if key.startswith("_last_batch_new_")), None)
    ignored = state.keys() - _DICTIONARY_STATE | {key for s in states for key in s.keys() - _REGION_STATE}
    members = [s.get("constituent_sample_indices", []) for s in states]
    iterations = [s.get("source_iterations", set()) for s in states]
    return Regions(
        center=torch.from_numpy(center),
        threshold=threshold,
        exemplars=_directions(contents, states, "exemplar_direction", d),
        means=_directions(contents, states, "mean_member_direction", d),
        counts=torch.tensor([_count(state, i) for i, state in enumerate(states)], dtype=torch.int64),
        coherence=_coherence(states),
        distance_sums=_column(states, "sum_dist_to_exemplar"),
        squared_distance_sums=_column(states, "sum_sq_dist_to_exemplar"),
        nearest=_examples(contents, states, "sample_prompts", -1),
        boundary=_examples(contents, states, "boundary_prompts", 1),
        prompts=tuple(contents.prompts),
        members=_ragged(contents.numbers(value, list, "a list of members") for value in members),
        iterations=_ragged(contents.numbers(value, set, "a set of batches") for value in iterations),
        reservoir=_reservoir(contents, states, d) if reservoir else None,
        labels=tuple(None if s.get("label") is None else text(s["label"], "a label is {}") for s in states),
        merge_close=bool(state["merge_close"]) if "merge_close" in state else None,
        last_founding_rate=None if rate is None else number(rate, "the rate of new regions"),
        ignored=tuple(sorted(key[:60] for key in ignored)),
    )


def _state(value: Any, kind: type[Instance], name: str) -> dict[str, Any]:
    if type(value) is not kind or not hasattr(value, "state"):
        raise UnsafePickleError(f"{name} is {short(value)} instead of a whole {kind.__name__.lower()}")
    return value.state


def _directions(contents: Contents, states: Sequence[dict[str, Any]], key: str, d: int) -> Tensor:
    rows = torch.empty(len(states), d)
    for i, state in enumerate(states):
        rows[i] = torch.from_numpy(contents.vector(state.get(key), f"{key} of region {i}", d))
    worst = (rows.norm(dim=1) - 1).abs()
    if float(worst.max()) > _UNIT_TOLERANCE:
        i = int(worst.argmax())
        raise UnsafePickleError(f"{key} of region {i} has norm {float(rows[i].norm()):.4g}; directions are of norm 1")
    return rows


def _count(state: dict[str, Any], i: int) -> int:
    value = state.get("member_count")
    if type(value) is not int or value < 1:
        raise UnsafePickleError(f"member_count of region {i} is {short(value)}; at least 1 is expected")
    return value


def _coherence(states: Sequence[dict[str, Any]]) -> Tensor:
    column = _column(states, "member_coherence", default=1.0)
    if bool(((column < 0) | (column > 1 + _UNIT_TOLERANCE)).any()):
        i = int((column - 0.5).abs().argmax())
        raise UnsafePickleError(f"member_coherence of region {i} is {float(column[i]):g}; it lies in [0, 1]")
    return column.clamp_max(1).float()  # the published running mean can exceed 1 by rounding


def _column(states: Sequence[dict[str, Any]], key: str, default: float = 0.0) -> Tensor:
    entries = [number(state.get(key, default), f"{key} of region {i}") for i, state in enumerate(states)]
    return torch.tensor(entries, dtype=torch.float64)


def _examples(contents: Contents, states: Sequence[dict[str, Any]], key: str, sign: int) -> PublishedExamples:
    """Prompts by rising (``sample_prompts``) or falling distance; the former were saved with a negative sign."""
    rows = [sorted(_entries(contents, state.get(key), sign), key=lambda entry: -sign * entry[0]) for state in states]
    n = max(map(len, rows))
    # Padding to the longest must not cost more than the lists themselves could.
    contents.spend("list items", n * len(rows) - sum(map(len, rows)) if n > 10 else 0)
    distances = torch.full((len(rows), n), torch.nan)
    places = torch.full((2, len(rows), n), -1)
    for i, row in enumerate(rows):
        if row:
            distance, position, prompt = zip(*row)
            distances[i, : len(row)] = torch.tensor(distance)
            places[:, i, : len(row)] = torch.tensor([position, prompt])
    return PublishedExamples(distances, places[0].contiguous(), places[1].contiguous())


def _entries(contents: Contents, value: Any, sign: int) -> Iterable[tuple[float, int, int]]:
    if value is None:
        return
    if type(value) is not list:
        raise UnsafePickleError(f"a list of prompts is {short(value)}")
    contents.spend("list items", len(value))
    for entry in value:
        if type(entry) is not tuple or len(entry) != 3 or type(entry[2]) is not int:
            raise UnsafePickleError(f"a prompt is {short(entry)} instead of (distance, text, position)")
        distance = sign * number(entry[0], "the distance of a prompt")
        if not -_SEPARATION_TOLERANCE <= distance <= 2 + _SEPARATION_TOLERANCE:
            raise UnsafePickleError(f"a prompt is at distance {distance:g}; cosine distances lie in [0, 2]")
        yield max(0.0, distance), entry[2], contents.prompt(entry[1])


def _ragged(rows: Iterable[np.ndarray]) -> Ragged:
    arrays = list(rows)
    return Ragged(torch.from_numpy(np.concatenate(arrays)), torch.tensor([0, *map(len, arrays)]).cumsum(0))


def _reservoir(contents: Contents, states: Sequence[dict[str, Any]], d: int) -> Ragged:
    lists = [state.get("sample_members", []) for state in states]
    if any(type(members) is not list for members in lists):
        raise UnsafePickleError("sample_members of a region is not a list")
    lengths = torch.tensor([0, *map(len, lists)])
    contents.spend("list items", int(lengths.sum()))
    if 4 * d * int(lengths.sum()) > contents.size:
        raise UnsafePickleError("it repeats its content: its sampled members do not fit the file")
    rows = torch.empty(int(lengths.sum()), d)
    for i, value in enumerate(value for members in lists for value in members):
        rows[i] = torch.from_numpy(contents.vector(value, "a sampled member", d))
    return Ragged(rows, lengths.cumsum(0))


def check_separation(exemplars: Tensor, threshold: float) -> None:
    """Raise UnsafePickleError if two exemplars are not farther apart than the threshold, as leader clustering makes
    them, by more than rounding. Memory: 64 MB."""
    k = len(exemplars)
    rows = max(1, min(k, _BLOCK_BYTES // (4 * k)))
    limit = 1 - threshold + _SEPARATION_TOLERANCE
    for start in range(0, k, rows):
        cosines = exemplars[start : start + rows] @ exemplars[start:].T
        # Each row with itself, and with rows before it, is no pair to look at.
        cosines.masked_fill_(torch.ones_like(cosines, dtype=torch.bool).tril(), -2)
        if float(cosines.max()) >= limit:
            i, j = divmod(int(cosines.argmax()), cosines.shape[1])
            raise UnsafePickleError(
                f"the exemplars of regions {start + i} and {start + j} are {1 - float(cosines.max()):.6g} apart, no "
                f"more than the threshold {threshold:.6g}"
            )
