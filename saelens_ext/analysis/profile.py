"""What the latents of a dictionary respond to: counts, strengths and examples, for any SAELens SAE.

Symbols
    k  latents (``d_sae``)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from saelens_ext import _checks, _files
from saelens_ext._modes import standard_modes
from saelens_ext.activations.stream import ActivationStream
from saelens_ext.analysis.examples import BlockCutter, Examples, RowBlock
from saelens_ext.analysis.profiled_hook import profiled_hook
from saelens_ext.analysis.tallies import CodeTally, RandomExamples, RegionTally
from saelens_ext.host.bos import warn_of_other_bos
from saelens_ext.host.flat_sae import refuse_sequence_codes
from saelens_ext.host.hook_names import BLOCKS, spellings_of
from saelens_ext.host.tokens import token_strings

if TYPE_CHECKING:
    import pandas

FORMAT = _files.Format("profile", "saelens_ext.DictionaryProfile", version=1, stated=("d_sae",))
TABLES = ("top", "boundary", "random")

# Codes held at once: 16 MB in float32, whatever the number of latents.
_CODES_PER_BLOCK = 2**22
_MAX_BLOCK = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class DictionaryProfile:
    """What each latent of a dictionary responds to; tensors on the CPU, one entry per latent."""

    hook_name: str
    """The hook profiled, as the stream was given it."""
    hook_aliases: tuple[str, ...]
    """Every name under which that hook was met: the stream's, the model's and the dictionary's own."""
    n_activations: int
    """Activations seen."""
    n_unassigned: int
    """Of them, those of no region because they equal the centre or were rejected; 0 for a dictionary without
    regions.
    """
    context: int
    """Tokens on either side of an example."""
    latent_names: tuple[str, ...]
    """One name per latent: "latent 0", or "region 0" where the dictionary has regions."""
    counts: Tensor
    """Activations with a non-zero code, or for a dictionary with regions the members of the Voronoi cell: int64
    ``(k,)``.
    """
    mean_activation: Tensor
    """Mean of the non-zero codes: float32 ``(k,)``, 0 where there is none."""
    max_activation: Tensor
    """Largest of the non-zero codes: float32 ``(k,)``, 0 where there is none."""
    top: Examples
    """The largest activations; for a dictionary with regions the members nearest to the exemplar, nearest first."""
    boundary: Examples | None = None
    """The members farthest from the exemplar, farthest first; None for a dictionary without regions."""
    random: Examples | None = None
    """Activations drawn at random from those that ``counts`` counts; None where none were asked for."""
    coherence: Tensor | None = None
    """|sum of the members' directions| / members, in [0, 1]: float32 ``(k,)``, NaN without members."""
    mean_distance: Tensor | None = None
    """Mean cosine distance of the members to the exemplar, in [0, 2]: float32 ``(k,)``, NaN without members."""
    max_distance: Tensor | None = None
    """Largest of these distances: float32 ``(k,)``, NaN without members."""

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.counts)

    def save(self, path: str | Path) -> Path:
        """Write ``profile.safetensors`` and ``profile.json`` into a directory, usually that of the dictionary.

        An interrupted save leaves the previous profile readable.

        Returns:
            The directory.
        """
        return FORMAT.save(self, Path(path))

    @classmethod
    @standard_modes()
    def load(cls, path: str | Path, sae: SAE[Any] | None = None) -> "DictionaryProfile":
        """Read what :meth:`save` wrote.

        Args:
            path: the directory.
            sae: the dictionary it should be of. Without it, the ``cfg.json`` beside the profile is compared, if any.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is truncated, foreign or newer than this package; the two files are of different
                saves; or the profile is of another dictionary.
        """
        path = Path(path)
        profile = FORMAT.load(cls, path)
        profile._check_shapes(path)
        beside = path / SAE_CFG_FILENAME
        if sae is not None:
            profile._check_belongs(sae.cfg.to_dict(), f"the dictionary given ({sae.get_name()})")
        elif beside.exists():
            profile._check_belongs(_files.read_json(beside), str(beside))
        return profile

    def _check_shapes(self, path: Path) -> None:
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        tables = {name: columns[name] for name in TABLES if columns[name] is not None}
        shapes = {name: tuple(value.shape) for name, value in columns.items() if isinstance(value, Tensor)}
        expected: dict[str, tuple[int, ...]] = {name: (self.d_sae,) for name in (*shapes, "latent_names")}
        shapes["latent_names"] = (len(self.latent_names),)
        for table, examples in tables.items():
            n = examples.values.shape[-1] if examples.values.ndim else 0
            expected |= {f"{table}.{field.name}": (self.d_sae, n) for field in fields(Examples)}
            expected[f"{table}.contexts"] = (self.d_sae, n, 2 * self.context + 1)
            shapes |= {f"{table}.{f.name}": tuple(getattr(examples, f.name).shape) for f in fields(Examples)}
        wrong = {name: shape for name, shape in shapes.items() if shape != expected[name]}
        if wrong:
            raise ValueError(
                f"The profile in {path} is damaged: for {self.d_sae} latents it holds tensors of shapes {wrong}."
            )

    def _check_belongs(self, config: dict[str, Any], what: str) -> None:
        """Raise ValueError if a dictionary has another number of latents or another hook."""
        hook = (config.get("metadata") or {}).get("hook_name")
        # The same place has another name in another host class, to which the dictionary may have been moved since.
        spellings = [] if hook is None else [hook, *(name for kind in BLOCKS for name in spellings_of(hook, kind))]
        if self.d_sae != config.get("d_sae"):
            raise ValueError(
                f"The profile is of {self.d_sae} latents, {what} has {config.get('d_sae')}: they do not belong "
                "together."
            )
        if hook is not None and not set(spellings) & set(self.hook_aliases):
            raise ValueError(
                f"The profile was made at {' = '.join(self.hook_aliases)}, {what} is of {hook!r}: they do not belong "
                "together."
            )

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per latent: its name, count, share of all activations and figures."""
        import pandas

        columns: dict[str, Any] = {
            "name": list(self.latent_names),
            "count": self.counts.numpy(),
            "frequency": (self.counts.double() / max(self.n_activations, 1)).numpy(),
        }
        for name in ("mean_activation", "max_activation", "coherence", "mean_distance", "max_distance"):
            if getattr(self, name) is not None:
                columns[name] = getattr(self, name).numpy()
        return pandas.DataFrame(columns, index=pandas.RangeIndex(self.d_sae, name="latent"))

    def contexts(
        self,
        latent: int,
        tokenizer: PreTrainedTokenizerBase,
        n: int = 5,
        *,
        which: Literal["top", "boundary", "random"] = "top",
    ) -> "pandas.DataFrame":
        """The examples of one latent as text.

        Args:
            latent: index, in [0, d_sae).
            tokenizer: the model's.
            n: how many at most, the first of those kept.
            which: "top", "boundary" where the dictionary has regions, or "random" where random ones were kept.

        Returns:
            One row per example: ``value`` (the code, or for a region the cosine distance to its exemplar), ``document``
            (row of the dataset), and the text ``before`` the token, the ``token`` and the text ``after`` it.

        Raises:
            ValueError: no such latent, ``n`` below 1, or no such examples.
        """
        import pandas

        if not 0 <= latent < self.d_sae:
            raise ValueError(f"latent must be one of 0 to {self.d_sae - 1}, got {latent!r}.")
        examples = getattr(self, _checks.choice(which, TABLES, "which"))
        if examples is None:
            raise ValueError(f"This profile has no {which} examples; see n_{which} of profile_dictionary.")
        found = []
        for number in range(min(_checks.positive(n, "n"), examples.values.shape[1])):
            if int(examples.token_ids[latent, number]) < 0:
                break
            row = examples.contexts[latent, number]
            parts = [token_strings(tokenizer, part[part >= 0]) for part in row.split([self.context, 1, self.context])]
            where = float(examples.values[latent, number]), int(examples.document_ids[latent, number])
            found.append((*where, *("".join(part) for part in parts)))
        return pandas.DataFrame(found, columns=["value", "document", "before", "token", "after"])


def profile_dictionary(
    sae: SAE[Any],
    stream: ActivationStream,
    *,
    hook_name: str | None = None,
    n_examples: int = 10,
    n_boundary: int = 5,
    n_random: int = 0,
    context: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> DictionaryProfile:
    """Go once over a stream and gather what each latent responds to.

    Works on any SAELens SAE or transcoder through its ``encode`` (a transcoder is profiled at its input hook). Where
    the dictionary has regions, that is an ``assign`` method, counts and examples are those of the exact Voronoi cells.
    The result does not depend on how the activations are batched; of equal examples the first in the stream are kept.
    (Another ``batch_size`` of the stream also changes the last bits of the activations themselves.)

    Memory: the examples, a few numbers per latent, a block of codes of tens of megabytes, and for a dictionary with
    regions one float64 copy of its exemplars.

    Args:
        sae: the dictionary; left as it is.
        stream: activations to read, in float32 or the model's dtype.
        hook_name: which hook of the stream; by default the dictionary's own.
        n_examples: examples kept per latent, at least 1.
        n_boundary: farthest members kept per region; 0 for none.
        n_random: random examples kept per latent, as automatic explanations want them beside the top ones; 0 for none.
        context: tokens kept on either side of an example.
        seed: of the random examples.
        progress: show a progress bar.

    Raises:
        ValueError: the stream has not the dictionary's hook, its activations have another width or are not finite,
            codes are not finite, or the SAE codes whole sequences.

    Examples:
        >>> profile = sx.profile_dictionary(partition, stream)
        >>> int(profile.counts.sum()) == profile.n_activations  # every activation lies in one region
        True
        >>> list(profile.contexts(0, model.tokenizer).columns)
        ['value', 'document', 'before', 'token', 'after']

    Source: coherence and boundary examples after arXiv 2605.14347, but of final Voronoi cells instead of arrival order.
    """
    options = {
        "n_examples": n_examples,
        "n_boundary": n_boundary,
        "n_random": n_random,
        "context": context,
        "seed": seed,
        "progress": progress,
    }
    (profile,) = profile_dictionaries([sae], stream, hook_name=hook_name, **options)
    return profile


@standard_modes()
@torch.no_grad()
def profile_dictionaries(
    saes: Sequence[SAE[Any]],
    stream: ActivationStream,
    *,
    hook_name: str | None = None,
    n_examples: int = 10,
    n_boundary: int = 5,
    n_random: int = 0,
    context: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> list[DictionaryProfile]:
    """Profile several dictionaries, at one or several hooks of a stream, in one pass over the model.

    Args:
        saes: the dictionaries, at least one.
        stream: activations of every hook they need.
        hook_name: one hook for all of them; by default each dictionary's own.
        n_examples: as for :func:`profile_dictionary`, as all that follow.
        n_boundary: farthest members kept per region.
        n_random: random examples kept per latent.
        context: tokens on either side of an example.
        seed: of the random examples.
        progress: show a progress bar.

    Returns:
        A profile per dictionary, in their order; each is that of :func:`profile_dictionary` alone.

    Raises:
        ValueError: as :func:`profile_dictionary`, and without a dictionary.
    """
    _checks.positive(n_examples, "n_examples")
    if n_boundary < 0 or n_random < 0 or context < 0:
        raise ValueError(
            f"n_boundary, n_random and context must be at least 0, got {n_boundary}, {n_random} and {context}."
        )
    if not saes:
        raise ValueError("saes is empty; give at least one dictionary to profile.")
    sizes = {"n_examples": n_examples, "n_boundary": n_boundary, "context": context}
    draws = [RandomExamples(sae.cfg.d_sae, n_random, context, seed) if n_random else None for sae in saes]
    profilers = [_Profiler(sae, stream, hook_name, random, **sizes) for sae, random in zip(saes, draws, strict=True)]
    with tqdm(total=stream.max_tokens, unit="token", desc="profile", disable=not progress) as bar:
        for batch in stream:
            for profiler in profilers:
                profiler.take(profiler.blocks.cut(batch))
            bar.update(len(batch))
    return [profiler.finish() for profiler in profilers]


class _Profiler:
    """The profile of one dictionary while it is gathered."""

    def __init__(
        self,
        sae: SAE[Any],
        stream: ActivationStream,
        hook_name: str | None,
        random: RandomExamples | None,
        *,
        n_examples: int,
        n_boundary: int,
        context: int,
    ):
        refuse_sequence_codes(sae)
        starts = getattr(stream, "prepend_bos", None)  # a stream of one's own need not know
        warn_of_other_bos(sae.cfg.metadata.get("prepend_bos"), starts, "the texts of this stream")
        self.sae, self.context = sae, context
        self.key, self.aliases = profiled_hook(sae, stream, hook_name)
        has_regions = hasattr(sae, "assign")
        self.codes = CodeTally(sae, n_examples, context, None if has_regions else random)
        self.regions = RegionTally(sae, n_examples, n_boundary, context, random) if has_regions else None
        self.blocks = BlockCutter(self.key, context, max(1, min(_MAX_BLOCK, _CODES_PER_BLOCK // sae.cfg.d_sae)))
        self.n = 0

    def take(self, blocks: Iterable[RowBlock]) -> None:
        """Add blocks of activations."""
        for block in blocks:
            what = f"The activation at {self.key}"
            x = _checks.finite(_checks.width(block.x, self.sae.cfg.d_in, what), what).to(self.sae.W_dec.device)
            self.codes.take(x, block if self.regions is None else None)
            if self.regions is not None:
                self.regions.take(x, block)
            self.n += len(block)

    def finish(self) -> DictionaryProfile:
        """The profile of everything taken."""
        self.take(self.blocks.rest())
        results = self.codes.results() | (self.regions.results() if self.regions is not None else {})
        return DictionaryProfile(
            hook_name=self.key, hook_aliases=self.aliases, n_activations=self.n, context=self.context, **results
        )
