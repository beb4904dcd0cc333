"""A hub cache on disk that was never downloaded, so that harnesses which load by name find what is to be tested.

Nothing here imports more than the standard library: the scripts beside it run in environments of their own.
"""

import os
from pathlib import Path

REVISION = "0123456789abcdef0123456789abcdef01234567"


def use_only(home: Path) -> None:
    """Make this process read ``home`` as its hub cache and nothing else; call it before a Hugging Face package is
    imported.
    """
    os.environ.update(HF_HOME=str(home), HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")


def snapshot_of(home: Path, repo_id: str) -> Path:
    """The folder that holds the files of a model repo at its only revision; made when it is not there."""
    repo = home / "hub" / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / REVISION
    snapshot.mkdir(parents=True, exist_ok=True)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / "main").write_text(REVISION)
    return snapshot


def know_to_transformer_lens(name: str) -> None:
    """Add a model to the names that ``HookedTransformer.from_pretrained`` takes, for this process."""
    from transformer_lens import loading_from_pretrained

    if name not in loading_from_pretrained.OFFICIAL_MODEL_NAMES:
        loading_from_pretrained.OFFICIAL_MODEL_NAMES.append(name)
