"""What the latents of a dictionary respond to: counts, strengths and examples, for any SAELens SAE.

Symbols
    k  latents (``d_sae``)
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from saelens_ext import _checks, _files
from saelens_ext.activations.stream import ActivationStream
from saelens_ext.analysis.background import Background
from saelens_ext.analysis.examples import Examples
from saelens_ext.analysis.logit_lens import LensResult
from saelens_ext.analysis.profiler import Profiled, gather
from saelens_ext.analysis.show import LatentLabels, LatentView, ShownContext, shown_contexts
from saelens_ext.host.hook_names import BLOCKS, spellings_of
from saelens_ext.host.tokens import token_strings
from saelens_ext.ops.modes import standard_modes

FORMAT = _files.Format("profile", "saelens_ext.DictionaryProfile", version=1, stated=("d_sae",))
TABLES = ("top", "boundary", "random")


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
    """Of them, those of no region (rejected, or equal to the centre); 0 for a dictionary without regions."""
    context: int
    """Tokens on either side of an example."""
    latent_names: tuple[str, ...]
    """One name per latent: "latent 0", or "region 0" where the dictionary has regions."""
    counts: Tensor
    """Activations with a non-zero code, or with regions the members of the Voronoi cell: int64 ``(k,)``."""
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
    background: Background | None = None
    """Activations drawn at random from all, which labels are scored against; None where none were asked for, and in
    profiles from before they were kept.
    """
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
        shapes = {name: tuple(value.shape) for name, value in columns.items() if isinstance(value, Tensor)}
        shapes["latent_names"] = (len(self.latent_names),)
        expected: dict[str, tuple[int, ...]] = dict.fromkeys(shapes, (self.d_sae,))
        for table in (name for name in TABLES if columns[name] is not None):
            examples = vars(columns[table])
            n = examples["values"].shape[-1] if examples["values"].ndim else 0
            for name, column in examples.items():
                if column is not None:
                    shapes[f"{table}.{name}"] = tuple(column.shape)
                    wide = (2 * self.context + 1,) if name in ("contexts", "token_values") else ()
                    expected[f"{table}.{name}"] = (self.d_sae, n, *wide)
        wrong = {name: shape for name, shape in shapes.items() if shape != expected[name]}
        if wrong:
            raise ValueError(f"The profile in {path} is damaged: {self.d_sae} latents, tensors of shapes {wrong}.")

    def _check_belongs(self, config: dict[str, Any], what: str) -> None:
        hook = (config.get("metadata") or {}).get("hook_name")
        # The same place has another name in another host class, to which the dictionary may have been moved since.
        spellings = [] if hook is None else [hook, *(name for kind in BLOCKS for name in spellings_of(hook, kind))]
        if self.d_sae != config.get("d_sae"):
            mismatch = f"The profile is of {self.d_sae} latents, {what} has {config.get('d_sae')}"
        elif hook is not None and not set(spellings) & set(self.hook_aliases):
            mismatch = f"The profile was made at {' = '.join(self.hook_aliases)}, {what} is of {hook!r}"
        else:
            return
        raise ValueError(f"{mismatch}: they do not belong together.")

    def to_dataframe(self) -> pd.DataFrame:
        """One row per latent: its name, count, fraction of all activations and figures."""
        columns: dict[str, Any] = {
            "name": list(self.latent_names),
            "count": self.counts.numpy(),
            "frequency": (self.counts.double() / max(self.n_activations, 1)).numpy(),
        }
        for name in ("mean_activation", "max_activation", "coherence", "mean_distance", "max_distance"):
            if getattr(self, name) is not None:
                columns[name] = getattr(self, name).numpy()
        return pd.DataFrame(columns, index=pd.RangeIndex(self.d_sae, name="latent"))

    def contexts(
        self,
        latent: int,
        tokenizer: PreTrainedTokenizerBase,
        n: int = 5,
        *,
        which: Literal["top", "boundary", "random"] = "top",
    ) -> pd.DataFrame:
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
        rows = []
        for one in self._shown(latent, tokenizer, n, which):
            parts = one.tokens[: one.mark], one.tokens[one.mark : one.mark + 1], one.tokens[one.mark + 1 :]
            rows.append((one.value, one.document, *map("".join, parts)))
        return pd.DataFrame(rows, columns=["value", "document", "before", "token", "after"])

    def show(
        self,
        latent: int,
        tokenizer: PreTrainedTokenizerBase,
        n: int = 5,
        *,
        which: Literal["top", "boundary", "random"] = "top",
        labels: LatentLabels | None = None,
        lens: LensResult | None = None,
    ) -> LatentView:
        """One latent for a notebook or a terminal: its label, figures, promoted tokens, and examples in which every
        token is coloured by the latent's code there.

        Args:
            latent: index, in [0, d_sae).
            tokenizer: the model's.
            n: how many examples at most.
            which: "top", "boundary" or "random", as for :meth:`contexts`.
            labels: the :class:`Labels` of this dictionary.
            lens: the logit lens of its directions.

        Raises:
            ValueError: no such latent or examples, or labels or a lens of another dictionary.
        """
        contexts = self._shown(latent, tokenizer, n, which)
        self.check_sizes(labels, lens)
        label = None if labels is None else labels[latent]
        figures = self.to_dataframe().loc[latent].drop("name")
        return LatentView(
            name=self.latent_names[latent],
            label="" if label is None else label.text,
            score="" if label is None else label.score_text,
            statistics={str(name).replace("_", " "): f"{value:.4g}" for name, value in figures.items()},
            promoted=[] if lens is None else token_strings(tokenizer, lens.promoted_ids[latent]),
            contexts=contexts,
        )

    def check_sizes(self, labels: LatentLabels | None, lens: LensResult | None) -> None:
        """Raise ValueError for labels, or a lens, of another number of latents."""
        for name, given in (("labels", labels), ("lens", None if lens is None else lens.promoted_ids)):
            if given is not None and len(given) != self.d_sae:
                raise ValueError(f"{name} is of {len(given)} latents, the profile of {self.d_sae}.")

    def _shown(self, latent: int, tokenizer: PreTrainedTokenizerBase, n: int, which: str) -> list[ShownContext]:
        if not 0 <= latent < self.d_sae:
            raise ValueError(f"latent must be one of 0 to {self.d_sae - 1}, got {latent!r}.")
        examples = getattr(self, _checks.choice(which, TABLES, "which"))
        if examples is None:
            raise ValueError(f"This profile has no {which} examples; see n_{which} of profile_dictionary.")
        return shown_contexts(examples, latent, tokenizer, _checks.positive(n, "n"))


def profile_dictionary(
    sae: SAE[Any],
    stream: ActivationStream,
    *,
    hook_name: str | None = None,
    n_examples: int = 10,
    n_boundary: int = 5,
    n_random: int = 0,
    n_background: int = 512,
    context: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> DictionaryProfile:
    """Go once over a stream and gather what each latent responds to.

    Works on any SAELens SAE or transcoder through its ``encode`` (a transcoder is profiled at its input hook). Where
    the dictionary has regions, that is an ``assign`` method, counts and examples are those of the exact Voronoi cells.
    The result does not depend on how the activations are batched; of equal examples the first in the stream are kept.
    (Another ``batch_size`` of the stream also changes the last bits of the activations themselves.) Of a
    :class:`RayActivationStream` it is gathered in the actors, on the device of the activations, and is that of one
    process on such a device; ``mean_activation``, ``mean_distance`` and ``coherence`` may differ in their last bit.

    Memory: the examples, a few numbers per latent, a few blocks of codes of tens of megabytes each, and for a
    dictionary with regions one float64 copy of its exemplars. Examples hold the latent's code at every token of their
    contexts, in float16: ``2 * n * (2 * context + 1)`` bytes a latent for n examples, 660 by default.

    Args:
        sae: the dictionary; left as it is.
        stream: activations to read, in float32 or the model's dtype.
        hook_name: which hook of the stream; by default the dictionary's own.
        n_examples: examples kept per latent, at least 1.
        n_boundary: farthest members kept per region; 0 for none.
        n_random: random examples kept per latent, as automatic explanations want them beside the top ones; 0 for none.
        n_background: activations drawn at random from all, for labels to be scored against; 0 for none.
        context: tokens kept on either side of an example.
        seed: of the random examples and the background, any whole number.
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
        "n_background": n_background,
        "context": context,
        "seed": seed,
        "progress": progress,
    }
    (profile,) = profile_dictionaries([sae], stream, hook_name=hook_name, **options)
    return profile


@standard_modes(gradients=False)
def profile_dictionaries(
    saes: Sequence[SAE[Any]],
    stream: ActivationStream,
    *,
    hook_name: str | None = None,
    n_examples: int = 10,
    n_boundary: int = 5,
    n_random: int = 0,
    n_background: int = 512,
    context: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> list[DictionaryProfile]:
    """Profile several dictionaries, at one or several hooks of a stream, in one pass over the model.

    Args:
        saes: the dictionaries, at least one.
        stream: activations of every hook they need.
        hook_name: one hook for all of them; by default each dictionary's own.
        n_examples: as for :func:`profile_dictionary`, as are all other arguments.

    Returns:
        A profile per dictionary, in their order; each is that of :func:`profile_dictionary` alone.

    Raises:
        ValueError: as :func:`profile_dictionary`, and without a dictionary.
    """
    _checks.positive(n_examples, "n_examples")
    counts = {"n_boundary": n_boundary, "n_random": n_random, "n_background": n_background, "context": context}
    if wrong := {name: value for name, value in counts.items() if value < 0}:
        raise ValueError(f"n_boundary, n_random, n_background and context must be at least 0, got {wrong}.")
    if not saes:
        raise ValueError("saes is empty; give at least one dictionary to profile.")
    sizes = counts | {"n_examples": n_examples, "seed": seed}
    dictionaries = [Profiled.of(sae, stream, hook_name, **sizes) for sae in saes]
    with tqdm(total=stream.max_tokens, unit="token", desc="profile", disable=not progress) as bar:
        found = gather(dictionaries, stream, bar.update)
    return [DictionaryProfile(**one.fields(tallies)) for one, tallies in zip(dictionaries, found, strict=True)]
