"""What a latent could be called, and how far the name can be trusted.

Symbols
    k     latents
    U     AUROC of a label: the probability that a member of the latent scores above a random activation
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from saelens_ext import _checks, _files
from saelens_ext.analysis.labeller import Labeller, LabellerLabels, to_rate
from saelens_ext.analysis.labels_examples import ExampleRows, Made, Split
from saelens_ext.analysis.labels_terms import ContextLabels
from saelens_ext.analysis.logit_lens import LensResult
from saelens_ext.analysis.profile import DictionaryProfile
from saelens_ext.host.tokens import bare, token_strings
from saelens_ext.ops.detection import auroc_interval
from saelens_ext.ops.label_score import FIGURES, LEVEL, Label, Scorer
from saelens_ext.ops.modes import standard_modes

FORMAT = _files.Format("labels", "saelens_ext.Labels", version=1, stated=("d_sae",))
METHODS = ("contexts", "promoted")
_N_PROMOTED = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Labels:
    """One label per latent with its held-out score; tensors on the CPU, ``(k,)`` each. ``labels[7]`` is one of them."""

    method: str
    """``contexts``, ``promoted``, or what made them."""
    hook_name: str
    """The hook profiled."""
    texts: tuple[str, ...]
    """The labels; empty for a latent without one."""
    outputs: tuple[str, ...]
    """What each latent makes the model say, where a labeller described it."""
    sentences: tuple[dict[str, list[str]], ...]
    """Sentences a labeller wrote to test each label, ``activating`` and ``neutral``; empty for other methods."""
    auroc: Tensor
    """U, float64; NaN where nothing was left to score a label on."""
    auroc_low: Tensor
    """Lower limit of its 95 % interval."""
    auroc_high: Tensor
    """Upper limit."""
    null_high: Tensor
    """95 % quantile of U with shuffled labels."""
    p_value: Tensor
    """Probability of a U as high with shuffled labels."""
    n_members: Tensor
    """Members that a label was scored on, int64."""
    n_others: Tensor
    """Random activations that it was scored on, int64."""
    settings: dict[str, Any]
    """How they were made."""

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.texts)

    @property
    def distinguishes(self) -> Tensor:
        """Labels that detect members better than shuffled ones do, at the 5 % level: bool ``(k,)``. Of labels that say
        nothing, 5 % are among them.
        """
        return self.p_value <= LEVEL

    def __len__(self) -> int:
        return self.d_sae

    def __iter__(self) -> Iterator[Label]:
        return (self[latent] for latent in range(self.d_sae))

    def __getitem__(self, latent: int) -> Label:
        """The label of one latent; IndexError for a number that is none."""
        figures = zip(("auroc", "low", "high", "null_high", "p_value"), FIGURES)
        return Label(
            text=self.texts[latent],
            output=self.outputs[latent] if self.outputs else "",
            n_members=int(self.n_members[latent]),
            n_others=int(self.n_others[latent]),
            **{name: float(getattr(self, figure)[latent]) for name, figure in figures},
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row per latent."""
        columns: dict[str, Any] = {"label": list(self.texts)}
        if self.outputs:
            columns["output"] = list(self.outputs)
        columns |= {name: getattr(self, name).numpy() for name in (*FIGURES, "distinguishes", "n_members", "n_others")}
        return pd.DataFrame(columns, index=pd.RangeIndex(self.d_sae, name="latent"))

    def save(self, path: str | Path) -> Path:
        """Write ``labels.safetensors`` and ``labels.json`` into a directory, usually that of the profile.

        Returns:
            The directory.
        """
        return FORMAT.save(self, Path(path))

    @classmethod
    @standard_modes()
    def load(cls, path: str | Path, profile: DictionaryProfile | None = None) -> "Labels":
        """Read what :meth:`save` wrote.

        Args:
            path: the directory.
            profile: of the dictionary that they should be of.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is truncated, foreign or newer than this package, or the labels are of another
                dictionary.
        """
        labels = FORMAT.load(cls, Path(path))
        columns = {field.name: getattr(labels, field.name) for field in fields(cls)}
        wrong = [name for name, value in columns.items() if isinstance(value, Tensor) and len(value) != len(labels)]
        if wrong:
            raise ValueError(f"The labels in {path} are damaged: there are {len(labels)}, and others of {wrong}.")
        if profile is not None:
            labels.check_belongs(profile)
        return labels

    def check_belongs(self, profile: DictionaryProfile) -> None:
        """Raise ValueError if a profile is of another dictionary, as far as its size and its hook say."""
        if self.d_sae != profile.d_sae or self.hook_name not in profile.hook_aliases:
            raise ValueError(
                f"The labels are of {self.d_sae} latents at {self.hook_name}, the profile of {profile.d_sae} at "
                f"{' = '.join(profile.hook_aliases)}: they do not belong together."
            )


@standard_modes()
def label_latents(
    profile: DictionaryProfile,
    tokenizer: PreTrainedTokenizerBase,
    *,
    method: str | Labeller = "contexts",
    lens: LensResult | None = None,
    latents: Sequence[int] | None = None,
    n_null: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> Labels:
    """Give every latent of a profiled dictionary a label, and score each label on examples that did not make it.

    "contexts" needs no model: the tokens, and behind an ellipsis the words around them, that the strongest examples
    have in common and other latents' have not (class-based TF-IDF, weighted by activation). "promoted" takes the tokens
    that the latent's direction promotes. A labeller, such as :class:`OpenAILabeller`, describes both in words.

    The score of a label is an AUROC: how often it fits a member of the latent better than a random activation, with a
    95 % interval, beside what shuffled labels reach. Examples that made the label, and contexts cut from the same
    window of text as they, never score it. Members are random ones where the profile has kept some (``n_random`` of
    :func:`profile_dictionary`) and the latent is active on at most half of all activations, else strong examples from
    windows set aside. A label fits an activation by the terms of
    the label that its context has; a "promoted" one by how soon one of its tokens follows; with a labeller, as it says
    itself when shown the contexts in random order.

    Args:
        profile: of any dictionary.
        tokenizer: of the model that was profiled.
        method: "contexts", "promoted", or a labeller.
        lens: the logit lens of the directions, ``(k, n)``: needed for "promoted", shown to a labeller.
        latents: which to label, all by default; the others get an empty label.
        n_null: shuffles behind the null.
        seed: of the shuffles and of all that is drawn.
        progress: show a progress bar.

    Raises:
        ValueError: the profile holds no example, a token that the tokenizer does not know, or an option is out of
            range; "promoted" without the lens, or the lens of another dictionary.
        EndpointUnavailableError: a labeller's endpoint refused, failed or did not answer; answers so far are in its
            cache.

    Examples:
        >>> profile = sx.profile_dictionary(partition, stream, n_random=5)
        >>> labels = sx.label_latents(profile, model.tokenizer)
        >>> len(labels) == profile.d_sae
        True

    Source: class-based TF-IDF is that of BERTopic (arXiv 2203.05794); input- and output-centric descriptions are those
    of arXiv 2506.10920. Scores on held-out examples and their null are ours.
    """
    if isinstance(method, str):
        _checks.choice(method, METHODS, "method")
    _checks.positive(n_null, "n_null")
    chosen = chosen_latents(latents, profile.d_sae)
    if lens is not None and len(lens.promoted_ids) != profile.d_sae:
        raise ValueError(f"The lens is of {len(lens.promoted_ids)} directions, the profile of {profile.d_sae} latents.")
    rows = ExampleRows(profile, tokenizer, seed)
    splits = list(rows.splits(make=method != "promoted"))
    if isinstance(method, str) and method == "contexts":
        made = ContextLabels(rows, splits, profile.max_distance is not None)
    elif isinstance(method, str):
        if lens is None:
            raise ValueError("Labels of promoted tokens need lens=, the logit_lens of the dictionary's directions.")
        made = _PromotedLabels(rows, lens, tokenizer)
    else:
        splits = to_rate(splits, seed)
        made = LabellerLabels(method, rows, splits, lens, tokenizer, chosen, seed)
    wanted = set(chosen)
    texts = [text if latent in wanted else "" for latent, text in enumerate(made.texts)]
    return Labels(
        method=made.name,
        hook_name=profile.hook_name,
        texts=tuple(texts),
        outputs=tuple(made.outputs),
        sentences=tuple(made.sentences),
        settings={"n_null": n_null, "seed": seed, "random_members": profile.random is not None},
        **_scores(made, texts, splits, Scorer(n_null, seed), progress),
    )


class _PromotedLabels(Made):
    """The most promoted tokens of each latent; a label fits an activation by how soon one of them follows it."""

    name = "promoted"

    def __init__(self, rows: ExampleRows, lens: LensResult, tokenizer: PreTrainedTokenizerBase):
        self._following = rows.contexts[:, rows.contexts.shape[1] // 2 + 1 :]
        self._ids = lens.promoted_ids[:, :_N_PROMOTED].numpy()
        unique = np.unique(self._ids)
        strings = dict(zip(unique.tolist(), token_strings(tokenizer, unique.tolist())))
        self.texts = [" / ".join(dict.fromkeys(bare(strings[token]) for token in row)) for row in self._ids.tolist()]

    def scores(self, latent: int, rows: np.ndarray) -> np.ndarray:
        """One over the distance, in tokens, of the first that follows; 0 where none does within the context."""
        hits = np.isin(self._following[rows], self._ids[latent])
        return np.where(hits.any(axis=1), 1 / (1 + hits.argmax(axis=1)), 0.0) if hits.size else np.zeros(len(rows))


def _scores(
    made: Made, texts: Sequence[str], splits: Sequence[Split], scorer: Scorer, progress: bool
) -> dict[str, Tensor]:
    """The columns of figures; NaN for latents without a label."""
    nothing = np.zeros(0)
    found = []
    for latent, split in enumerate(tqdm(splits, desc="score labels", unit="label", disable=not progress)):
        rows = (split.members, split.others) if texts[latent] else (split.members[:0], split.others[:0])
        found.append(scorer.score(*(made.scores(latent, part) if len(part) else nothing for part in rows)))
    columns = {name: torch.tensor([one[name] for one in found]) for name in found[0]}
    columns = {name: column.double() if name in FIGURES else column for name, column in columns.items()}
    intervals = auroc_interval(columns["auroc"], columns["n_members"], columns["n_others"])
    known = ~columns["auroc"].isnan()
    low, high = (limit.masked_fill(~known, torch.nan) for limit in intervals)
    return columns | {"auroc_low": low, "auroc_high": high}


def chosen_latents(latents: Sequence[int] | None, d_sae: int) -> list[int]:
    """Different latents in [0, d_sae), all where none are named; ValueError for one that is none."""
    if latents is None:
        return list(range(d_sae))
    chosen = [int(latent) for latent in _checks.listed(latents, "latents", "index")]
    wrong = [latent for latent in chosen if not 0 <= latent < d_sae]
    if wrong:
        raise ValueError(f"latents must be some of 0 to {d_sae - 1}, got {wrong[0]}.")
    return list(dict.fromkeys(chosen))
