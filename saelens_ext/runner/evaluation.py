"""SAELens' own evaluation of finished dictionaries, on text that they were not built from where there is any."""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from sae_lens import SAE, ActivationsStore, run_evals
from sae_lens.evals import EvalConfig
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.util import dtype_to_str

from saelens_ext import _files
from saelens_ext.activations.cached_stream import CachedStream
from saelens_ext.activations.stream import ActivationStream
from saelens_ext.host.hook_names import output_behind

logger = logging.getLogger(__name__)

ALL_POSITIONS = "all_positions_of_windows"
# Groups of SAELens' evaluation whose figures its trainer logs while training, with the trainer's names.
_TRAINER_KEYS = {
    ("reconstruction_quality", "explained_variance"): "metrics/explained_variance",
    ("reconstruction_quality", "explained_variance_legacy"): "metrics/explained_variance_legacy",
    ("reconstruction_quality", "mse"): "losses/mse_loss",
    ("sparsity", "l0"): "metrics/l0",
}


@dataclass(frozen=True, kw_only=True)
class EvalWindows:
    """Token windows to evaluate on, all of the same length."""

    windows: list[list[int]]
    """Token ids."""
    unseen: bool
    """Whether they are known to come from documents behind the last that the dictionaries were built from."""
    batch_size: int
    """Windows in a batch."""

    @property
    def n_batches(self) -> int:
        """Whole batches."""
        return len(self.windows) // self.batch_size


def default_eval_size(n_activations: int, context_size: int, batch_size: int) -> tuple[int, int]:
    """Windows in a batch, and batches, to evaluate a dictionary on where nothing is asked for.

    A twentieth of the activations it was built from (divided among the dictionaries of the same pass), one window at
    least and ten batches at most. An evaluation runs the whole model about six times where a build runs a part of it
    once.
    """
    windows = min(10 * batch_size, max(1, n_activations // (20 * context_size)))
    size = min(batch_size, windows)
    return size, windows // size


def eval_windows(stream: ActivationStream, last_document: int, batch_size: int, n_batches: int) -> EvalWindows | None:
    """Windows for an evaluation: of unseen documents if they fill a batch, otherwise from the start of the dataset.

    Documents after ``last_document`` are unseen; of ``n_batches`` asked for there may be fewer.

    Returns:
        The windows; those of a cache are never called unseen, since it does not say where documents end. None where
        there are none (a cache without token ids, or less than a window of text).
    """
    wanted = batch_size * n_batches
    tells_documents = not isinstance(stream, CachedStream)
    for first, unseen in ((last_document + 1, True), (0, False)):
        pieces = (ids for document, ids in stream.token_windows() if document >= first)
        windows = list(itertools.islice(_whole(pieces, stream.context_size), wanted))
        if len(windows) >= batch_size or (windows and not unseen):
            size = min(batch_size, len(windows))
            return EvalWindows(
                windows=windows[: len(windows) // size * size], unseen=unseen and tells_documents, batch_size=size
            )
    return None


def evaluate(dictionary: SAE[Any], stream: ActivationStream, given: EvalWindows) -> dict[str, Any]:
    """Evaluate a dictionary on the model that it was built on, with ``sae_lens.run_evals``.

    Returns:
        The groups of figures that ``run_evals`` gives (without those of the model's predictions in the middle of a
        bridge's block), None for what is not finite, and under "token_stats" whether the
        text was unseen. ``run_evals`` knows no ``seqpos_slice``: where the stream leaves out positions, "token_stats"
        says under "all_positions_of_windows" that the figures are over other activations than the dictionary was built
        from.
    """
    model: Any = stream.model
    store = ActivationsStore(
        model,
        Dataset.from_dict({"tokens": given.windows}).to_iterable_dataset(),
        streaming=True,
        hook_name=dictionary.cfg.metadata.hook_name,
        hook_head_index=None,
        context_size=stream.context_size,
        d_in=dictionary.cfg.d_in,
        n_batches_in_buffer=2,
        total_training_tokens=len(given.windows),
        store_batch_size_prompts=given.batch_size,
        train_batch_size_tokens=given.batch_size * stream.context_size,
        prepend_bos=bool(stream.prepend_bos),
        normalize_activations="none",
        device=stream.device,
        dtype=dtype_to_str(dictionary.dtype),
    )
    # In the middle of a bridge's block run_evals would put the reconstruction into the MLP's input alone.
    replaceable = output_behind(model, dictionary.cfg.metadata.hook_name) is None
    if not replaceable:
        logger.warning(
            "What the reconstruction does to the model's predictions is not evaluated: %s is the middle of a block, "
            "which SAELens cannot replace on a bridge. Evaluate it on a HookedTransformer.",
            dictionary.cfg.metadata.hook_name,
        )
    config = EvalConfig(
        batch_size_prompts=given.batch_size,
        n_eval_reconstruction_batches=given.n_batches,
        n_eval_sparsity_variance_batches=given.n_batches,
        compute_kl=replaceable,
        compute_ce_loss=replaceable,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
    )
    groups, _ = run_evals(
        dictionary, store, model, ActivationScaler(), config, exclude_special_tokens=stream.excluded_ids or False
    )
    finite = _files.json_safe(groups)
    finite.setdefault("token_stats", {})["unseen_documents"] = given.unseen
    if not bool(stream._read_positions.all()):
        finite["token_stats"][ALL_POSITIONS] = True
    return finite


def trainer_figures(evals: dict[str, Any]) -> dict[str, float]:
    """Figures of an evaluation that SAELens' trainer logs too, under its keys; none if over other positions."""
    if evals.get("token_stats", {}).get(ALL_POSITIONS):
        return {}
    found = {key: evals.get(group, {}).get(name) for (group, name), key in _TRAINER_KEYS.items()}
    return {key: value for key, value in found.items() if value is not None}


def _whole(pieces: Iterator[list[int]], length: int) -> Iterator[list[int]]:
    """Windows of exactly ``length`` tokens: whole pieces as they are, shorter ones joined end to end."""
    rest: list[int] = []
    for piece in pieces:
        if len(piece) == length:
            yield piece
            continue
        rest += piece
        if len(rest) >= length:
            yield rest[:length]
            rest = []
