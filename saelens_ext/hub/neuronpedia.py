"""Dictionaries on Neuronpedia: what its client uploads, made from a profile, and its labels for released SAEs.

Its client sends features in batches: their density, the tokens that their direction promotes and suppresses, examples
with a value for every token, and labels, which it calls explanations.
"""

import hashlib
import io
import json
import logging
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import torch
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from saelens_ext import _files
from saelens_ext.analysis.examples import Examples
from saelens_ext.analysis.labels import FIGURES, Labels, chosen_latents
from saelens_ext.analysis.logit_lens import LensResult
from saelens_ext.analysis.profile import DictionaryProfile
from saelens_ext.host.tokens import token_strings

logger = logging.getLogger(__name__)

SITE = "https://www.neuronpedia.org"
STATE_FILENAME = "neuronpedia.json"
BATCH = 128
"""Features that the client sends at once, at most."""
N_BINS = 5
_SOURCE = re.compile(r"(\d+)-\S+")
_TIMEOUT, _WAITS = 120, (1, 4, 15)


class NeuronpediaError(RuntimeError):
    """Neuronpedia refused, failed or did not answer."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What was sent."""

    url: str
    """The page of the source."""
    n_features: int
    """Latents in all batches."""
    n_batches: int
    """Batches in all."""
    n_sent: int
    """Batches sent or written now; the others had arrived before."""


def push_to_neuronpedia(
    profile: DictionaryProfile,
    tokenizer: PreTrainedTokenizerBase,
    model_id: str,
    source: str,
    *,
    lens: LensResult | None = None,
    labels: Labels | None = None,
    latents: Sequence[int] | None = None,
    state: str | Path | None = None,
    dry_run: str | Path | None = None,
    api_key: str | None = None,
    progress: bool = False,
) -> Upload:
    """Upload a profiled dictionary to Neuronpedia with its own client, or write what would be sent.

    The strongest examples of each latent go with their value at every token. Where the profile has random ones they
    follow, in equal intervals of the largest value, with the share of them that each interval holds. Of labels, those
    that their held-out score tells from chance are sent. Latents that were never active go with a density of 0.

    A batch whose sending fails for a reason that may pass is sent again after 1, 4 and 15 seconds. Batches that have
    arrived are noted in ``state``, by their content, so that after a failure the same call sends the rest.

    Args:
        profile: of any dictionary, with values for every token (profiles of early versions have none).
        tokenizer: the model's.
        model_id: the model's name there, such as "gpt2-small".
        source: "<layer>-<set>", such as "6-res-ep"; the set must exist there (``neuronpedia.SourceSet.new``).
        lens: the logit lens of the directions.
        labels: of the same dictionary.
        latents: which, by default all.
        state: folder of the file that notes what has arrived, usually the dictionary's; None notes nothing.
        dry_run: a folder; batches are written there as JSON, and nothing is sent.
        api_key: by default the environment's ``NEURONPEDIA_API_KEY``.
        progress: show a progress bar.

    Raises:
        ImportError: the client is not installed.
        ValueError: names of another form, a source of another layer than the profile's, no such latent, labels or a
            lens of another dictionary, or a profile without values.
        NeuronpediaError: no key, or it refused, failed or did not answer; says how much has arrived.
    """
    _check_names(profile, model_id, source)
    profile.check_sizes(labels, lens)
    if profile.top.token_values is None:
        raise ValueError(
            "This profile has no value for every token, which Neuronpedia shows: make it again, with "
            "profile_dictionary or `saelens-ext profile`."
        )
    chosen = chosen_latents(latents, profile.d_sae)
    batches = [chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH)]
    sender = _sender(None if dry_run is None else Path(dry_run), None if state is None else Path(state), api_key)
    for number, batch in enumerate(tqdm(batches, desc="Neuronpedia", unit="batch", disable=not progress)):
        features = [_feature(profile, tokenizer, latent, model_id, source, lens, labels) for latent in batch]
        try:
            sender.upload_batch(model_id, source, features)
        except NeuronpediaError as error:
            raise NeuronpediaError(f"{error} {number} of {len(batches)} batches had arrived.") from error
    url = f"{SITE}/{model_id}/{source}"
    return Upload(url=url, n_features=len(chosen), n_batches=len(batches), n_sent=sender.n_sent)


def neuronpedia_labels(sae: SAE[Any], *, site: str = SITE) -> Labels:
    """The labels that Neuronpedia has for a released SAE; without scores, since what made them is not known here.

    Args:
        sae: one whose ``cfg.metadata.neuronpedia_id`` says which it is there, "model/source", as SAELens' releases
            have it.
        site: where Neuronpedia runs.

    Raises:
        ValueError: the SAE has no such name.
        NeuronpediaError: no answer, one that is none, or no labels.
    """
    name = sae.cfg.metadata.neuronpedia_id
    if not isinstance(name, str) or name.count("/") != 1:
        raise ValueError(
            f"This SAE does not say which it is on Neuronpedia: cfg.metadata.neuronpedia_id is {name!r}. Set it to "
            "'MODEL/SOURCE', such as 'gpt2-small/6-res-jb'."
        )
    model_id, source = name.split("/")
    try:
        response = requests.get(
            f"{site}/api/explanation/export", params={"modelId": model_id, "saeId": source}, timeout=_TIMEOUT
        )
        response.raise_for_status()
        rows = [(int(row["index"]), str(row["description"] or ""), row.get("typeName")) for row in response.json()]
    except (requests.RequestException, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NeuronpediaError(f"Neuronpedia gave no labels of {name} ({type(error).__name__}: {error}).") from error
    d_sae, texts = int(sae.cfg.d_sae), {}
    for latent, text, _ in rows:
        if not 0 <= latent < d_sae:
            raise NeuronpediaError(f"Neuronpedia's {name} has a latent {latent}, this SAE has {d_sae}: another SAE.")
        texts.setdefault(latent, text.strip())  # of several for a latent, the one that is listed first
    if not any(texts.values()):
        raise NeuronpediaError(f"Neuronpedia has no labels of {name}.")
    kinds = sorted({str(kind) for _, _, kind in rows if kind})
    unknown = {figure: torch.full((d_sae,), torch.nan, dtype=torch.float64) for figure in FIGURES}
    return Labels(
        method=f"Neuronpedia ({', '.join(kinds)})" if kinds else "Neuronpedia",
        hook_name=str(sae.cfg.metadata.hook_name),
        texts=tuple(texts.get(latent, "") for latent in range(d_sae)),
        outputs=(),
        sentences=(),
        n_members=torch.zeros(d_sae, dtype=torch.int64),
        n_others=torch.zeros(d_sae, dtype=torch.int64),
        settings={"neuronpedia_id": name},
        **unknown,
    )


# --- features ---


def _check_names(profile: DictionaryProfile, model_id: str, source: str) -> None:
    match = _SOURCE.fullmatch(source)
    if not model_id or "/" in model_id or match is None or "/" in source:
        raise ValueError(
            f"model_id and source must be names such as 'gpt2-small' and '6-res-ep' (layer and set), got {model_id!r} "
            f"and {source!r}."
        )
    layers = {found[1] for name in profile.hook_aliases if (found := re.match(r"blocks\.(\d+)\.", name))}
    if layers and match[1] not in layers:
        raise ValueError(f"The source {source!r} is of layer {match[1]}, the profile of {profile.hook_name}.")


def _feature(
    profile: DictionaryProfile,
    tokenizer: PreTrainedTokenizerBase,
    latent: int,
    model_id: str,
    source: str,
    lens: LensResult | None,
    labels: Labels | None,
) -> Any:
    """One latent in the client's own class."""
    from neuronpedia.np_explanation import Explanation
    from neuronpedia.np_feature import Feature, Logit

    place = {"modelId": model_id, "source": source, "index": latent}
    ends: list[Any] = [None, None]
    if lens is not None:
        pairs = (lens.promoted_ids, lens.promoted_logits), (lens.suppressed_ids, lens.suppressed_logits)
        ends = [
            [Logit(*pair) for pair in zip(token_strings(tokenizer, ids[latent]), logits[latent].tolist())]
            for ids, logits in pairs
        ]
    explanations = []
    if labels is not None and labels[latent].text and labels[latent].distinguishes:
        explanations = [Explanation(**place, text=labels[latent].text, method=f"saelens-ext {labels.method}")]
    return Feature(
        **place,
        density=int(profile.counts[latent]) / max(profile.n_activations, 1),
        top_logits=ends[0],
        bottom_logits=ends[1],
        explanations=explanations,
        activations=list(_activations(profile, tokenizer, latent, place)),
    )


def _activations(
    profile: DictionaryProfile, tokenizer: PreTrainedTokenizerBase, latent: int, place: dict[str, Any]
) -> Iterator[Any]:
    """The strongest examples, then the random ones by interval, the highest first."""
    from neuronpedia.np_activation import Activation

    for tokens, values, _ in _examples(profile.top, tokenizer, latent):
        yield Activation(**place, tokens=tokens, values=values)
    if profile.random is None or profile.random.token_values is None:
        return
    largest = float(profile.max_activation[latent])
    drawn = [
        (min(int(N_BINS * code / largest), N_BINS - 1), tokens, values)
        for tokens, values, code in _examples(profile.random, tokenizer, latent)
        if code > 0 and largest > 0
    ]
    for part in reversed(range(N_BINS)):
        within = [(tokens, values) for number, tokens, values in drawn if number == part]
        for tokens, values in within:
            limits: dict[str, Any] = {
                "quantileMin": largest * part / N_BINS,
                "quantileMax": largest * (part + 1) / N_BINS,
            }
            limits["quantileFraction"] = len(within) / len(drawn)
            yield Activation(**place, tokens=tokens, values=values, **limits)


def _examples(
    examples: Examples, tokenizer: PreTrainedTokenizerBase, latent: int
) -> Iterator[tuple[list[str], list[float], float]]:
    """Tokens, the code at each, and the code of the example itself."""
    assert examples.token_values is not None
    for ids, values in zip(examples.contexts[latent], examples.token_values[latent].float()):
        there = ids >= 0
        if bool(there.any()):
            yield token_strings(tokenizer, ids[there]), _rounded(values[there]), float(values[len(values) // 2])


def _rounded(values: Tensor) -> list[float]:
    """As text float16 needs no more than five digits; tokens that were not read count as 0."""
    return [float(f"{value:.5g}") for value in values.nan_to_num(0.0).tolist()]


# --- sending ---


def _sender(dry_run: Path | None, state: Path | None, api_key: str | None) -> Any:
    """The client, whose batches are sent with patience and once, or written."""
    try:
        from neuronpedia.requests.base_request import (
            NPInvalidResponseError,
            NPKeyMissingError,
            NPRateLimitError,
            NPUnauthorizedError,
        )
        from neuronpedia.requests.feature_request import FeatureRequest
    except ImportError as error:
        raise ImportError("Neuronpedia needs its client: pip install 'saelens-ext[neuronpedia]'") from error
    noted = None if state is None or dry_run is not None else state / STATE_FILENAME

    class Sender(FeatureRequest):
        """Sends or writes each batch."""

        n_sent, n_seen = 0, 0
        arrived = (
            [] if noted is None or not noted.exists() else list(_files.read_json(noted, 1, ("batches",))["batches"])
        )

        def send_request(self, uri: str = "", method: str = "POST", **options: Any) -> Any:
            digest = hashlib.sha256(json.dumps(options["json"], sort_keys=True).encode()).hexdigest()
            number, self.n_seen = self.n_seen, self.n_seen + 1
            if digest in self.arrived:
                return None
            if dry_run is not None:
                _files.write_json(dry_run / f"batch_{number:04d}.json", options["json"])
            else:
                self._send(uri, method, options)
            self.n_sent += 1
            self.arrived.append(digest)
            if noted is not None:
                _files.write_json(noted, {"format_version": 1, "batches": self.arrived})
            return None

        def _send(self, uri: str, method: str, options: dict[str, Any]) -> None:
            for wait in (*_WAITS, None):
                try:
                    with redirect_stdout(io.StringIO()):  # the client prints every call
                        super().send_request(uri, method, timeout=_TIMEOUT, **options)
                    return
                except NPUnauthorizedError as error:
                    raise NeuronpediaError("Neuronpedia refused the key (NEURONPEDIA_API_KEY).") from error
                except (NPRateLimitError, NPInvalidResponseError, requests.RequestException) as error:
                    refused = isinstance(error, requests.HTTPError) and "Server error" not in str(error)
                    if refused or wait is None:
                        raise NeuronpediaError(f"Neuronpedia did not take a batch: {error}") from error
                    logger.warning("Neuronpedia: %s; trying again in %d s", error, wait)
                    time.sleep(wait)

    try:
        return Sender(api_key="none" if dry_run is not None else api_key)
    except NPKeyMissingError as error:
        raise NeuronpediaError(
            "Uploading to Neuronpedia needs a key: set NEURONPEDIA_API_KEY (neuronpedia.org, account settings)."
        ) from error
