"""Labels out of the tokens that a latent's direction promotes."""

import numpy as np
from transformers import PreTrainedTokenizerBase

from saelens_ext.analysis.labels_examples import ExampleRows, Made
from saelens_ext.analysis.logit_lens import LensResult
from saelens_ext.host.tokens import bare, token_strings

N_TOKENS = 5


class PromotedLabels(Made):
    """The most promoted tokens of each latent; a label fits an activation by how soon one of them follows it."""

    name = "promoted"

    def __init__(self, rows: ExampleRows, lens: LensResult, tokenizer: PreTrainedTokenizerBase):
        self._following = rows.contexts[:, rows.contexts.shape[1] // 2 + 1 :]
        self._ids = lens.promoted_ids[:, :N_TOKENS].numpy()
        unique = np.unique(self._ids)
        strings = dict(zip(unique.tolist(), token_strings(tokenizer, unique.tolist())))
        self.texts = [" / ".join(dict.fromkeys(bare(strings[token]) for token in row)) for row in self._ids.tolist()]

    def scores(self, latent: int, rows: np.ndarray) -> np.ndarray:
        """One over the distance, in tokens, of the first that follows; 0 where none does within the context."""
        hits = np.isin(self._following[rows], self._ids[latent])
        return np.where(hits.any(axis=1), 1 / (1 + hits.argmax(axis=1)), 0.0) if hits.size else np.zeros(len(rows))
