"""The dictionaries of a repository on the Hub, without their weights."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import HfApi, ModelCard, constants, hf_hub_download
from sae_lens.constants import SAE_CFG_FILENAME

from saelens_ext.dictionaries.architecture_names import plain_name
from saelens_ext.hub.contents import HIERARCHY_FILENAME, folders_with_dictionaries
from saelens_ext.hub.errors import clear_errors
from saelens_ext.hub.fetch import check_names, paths

_FIELDS = {"d_in": "d_in", "d_sae": "d_sae", "percentile": "percentile", "threshold": "threshold", "l1": "l1"}


def list_on_hub(repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> pd.DataFrame:
    """The dictionaries of a repository, any that SAELens loads, with what they say of themselves.

    Only their small ``cfg.json`` and the model card are fetched.

    Args:
        repo_id: "owner/name".
        revision: a branch, a tag or a commit hash; by default "main".
        token: by default the one of ``hf auth login``.

    Returns:
        One row per dictionary, its folder (``sae_id``) as index: architecture, model, hook, ``d_in``, ``d_sae`` and
        settings where it has them, then the figures that the card lists for it. A hierarchy is one row, that of its
        first level.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: as :func:`load_from_hub`.
        ValueError: a name that no repository has, or a file that is damaged.
    """
    check_names(repo_id, "any")
    with clear_errors(repo_id, "read", ""):
        info = HfApi(token=token).model_info(repo_id, revision=revision)
        names = paths(info)

        def fetched(name: str) -> str:
            return Path(hf_hub_download(repo_id, name, revision=info.sha, token=token)).read_text(encoding="utf-8")

        folders = folders_with_dictionaries(names)
        configs = {folder: fetched(_config_of(folder, names)) for folder in folders}
        card = fetched(constants.REPOCARD_NAME) if constants.REPOCARD_NAME in names else ""
    figures = _figures(card)
    rows = [_row(folder, config, repo_id) | figures.get(folder, {}) for folder, config in configs.items()]
    return pd.DataFrame(rows, index=pd.Index(folders, name="sae_id"))


def _config_of(folder: str, names: list[str]) -> str:
    level = "/level_0" if f"{folder}/{HIERARCHY_FILENAME}" in names else ""
    return f"{folder}{level}/{SAE_CFG_FILENAME}"


def _row(folder: str, text: str, repo_id: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
        metadata = config.get("metadata") or {}
        row = {
            "architecture": plain_name(str(config.get("architecture", "standard"))),
            "model_name": metadata.get("model_name", config.get("model_name")),
            "hook_name": metadata.get("hook_name", config.get("hook_name")),
        }
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"The {SAE_CFG_FILENAME} of {folder!r} in {repo_id!r} is damaged: {error}.") from error
    return row | {name: config[key] for name, key in _FIELDS.items() if config.get(key) is not None}


def _figures(card: str) -> dict[str, dict[str, Any]]:
    """By folder, the metrics of a card's front matter; none where it has no readable one."""
    found: dict[str, dict[str, Any]] = {}
    data: Any = ModelCard(card, ignore_metadata_errors=True).data if card else None
    for result in getattr(data, "eval_results", None) or []:
        folder = (result.metric_args or {}).get("sae_id")
        found.setdefault(str(folder), {})[result.metric_type] = result.metric_value
    return found
