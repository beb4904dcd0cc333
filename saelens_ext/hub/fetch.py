"""Bringing the files of one dictionary from the Hub into the client's cache, whole and as the Hub holds them."""

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import validate_repo_id
from sae_lens.constants import SAE_CFG_FILENAME

from saelens_ext.hub import contents as hub_files
from saelens_ext.hub.errors import clear_errors, is_unreachable, status

logger = logging.getLogger(__name__)

_SAE_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+@,-]*(/[A-Za-z0-9_][A-Za-z0-9_.=+@,-]*)*")


def check_names(repo_id: str, sae_id: str) -> None:
    """Raise ValueError for names that a repository or a folder cannot have."""
    with clear_errors(repo_id, "read", ""):
        validate_repo_id(repo_id)
    if not _SAE_ID.fullmatch(sae_id):
        raise ValueError(
            f"sae_id must be the path of a folder, of letters, digits and _.=+@,- with / between its parts, such as "
            f"'blocks.6.hook_resid_post/percentile_2', got {sae_id!r}."
        )


def paths(info: ModelInfo) -> list[str]:
    """The files of a repository."""
    return [sibling.rfilename for sibling in info.siblings or []]


def within(names: Iterable[str], folder: str) -> list[str]:
    """Those in a folder, by their names relative to it."""
    return [name.removeprefix(f"{folder}/") for name in names if name.startswith(f"{folder}/")]


def fetch(repo_id: str, sae_id: str, revision: str | None, token: str | bool | None) -> tuple[Path, str]:
    """Bring the files of a dictionary into the cache, whole; their folder and commit."""
    check_names(repo_id, sae_id)
    api = HfApi(token=token)
    with clear_errors(repo_id, "read", "What had arrived is kept; load again to fetch the rest."):
        try:
            info = api.model_info(repo_id, revision=revision, files_metadata=True)
        except Exception as error:
            if not is_unreachable(error) and (status(error) or 0) < 500:
                raise
            cached = _from_cache(repo_id, sae_id, revision)
            if cached is None:
                raise
            said = "The Hub does not answer (%s); using the files of %s in the cache, %s."
            logger.warning(said, error, repo_id, cached[0])
            return cached
        names = hub_files.known_names(within(paths(info), sae_id))
        _check_there(info, sae_id, names, revision)
        # By the revision's name rather than its commit, so that the cache knows it without a connection too.
        pattern = [f"{sae_id}/{name}" for name in names]
        snapshot = Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=pattern))
        if snapshot.name != info.sha:
            info = api.model_info(repo_id, revision=snapshot.name, files_metadata=True)
        _verify(info, snapshot, sae_id, token)
    return snapshot / sae_id, snapshot.name


def _from_cache(repo_id: str, sae_id: str, revision: str | None) -> tuple[Path, str] | None:
    """The files that an earlier call left, if any."""
    for name in (SAE_CFG_FILENAME, hub_files.HIERARCHY_FILENAME):
        found = try_to_load_from_cache(repo_id, f"{sae_id}/{name}", revision=revision)
        if isinstance(found, str):
            folder = Path(found).parent
            return folder, folder.parents[sae_id.count("/")].name
    return None


def _check_there(info: ModelInfo, sae_id: str, names: list[str], revision: str | None) -> None:
    if hub_files.folders_with_dictionaries(f"{sae_id}/{name}" for name in names) == [sae_id]:
        return
    at = f"{info.id!r}" + (f" at {revision!r}" if revision else "")
    there = paths(info)
    if others := hub_files.folders_with_dictionaries(there):
        raise FileNotFoundError(f"{at} holds no dictionary {sae_id!r}. It holds {', '.join(map(repr, others))}.")
    shown = ", ".join(there[:5]) + (f" and {len(there) - 5} more" if len(there) > 5 else "")
    raise FileNotFoundError(
        f"{at} holds no dictionary in SAELens' format, which is a folder with cfg.json and sae_weights.safetensors; it "
        f"holds {shown or 'no files'}. SAEs in other formats may be known to SAELens: SAE.from_pretrained(release, "
        "sae_id, converter=...)."
    )


def _verify(info: ModelInfo, snapshot: Path, sae_id: str, token: str | bool | None) -> None:
    """Compare the files with the checksums of the Hub; fetch again, once, those that differ."""
    ours = {f"{sae_id}/{name}" for name in hub_files.known_names(within(paths(info), sae_id))}
    for sibling in (sibling for sibling in info.siblings or [] if sibling.rfilename in ours):
        path = snapshot / sibling.rfilename
        expected = sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id
        if expected is None or hub_files.digest(path, sibling.lfs is not None) == expected:
            continue
        logger.warning("%s is not the file that the Hub holds; fetching it again.", path)
        hf_hub_download(info.id, sibling.rfilename, revision=snapshot.name, token=token, force_download=True)
        found = hub_files.digest(path, sibling.lfs is not None)
        if found != expected:
            raise ValueError(
                f"{sibling.rfilename} of {info.id!r} has the checksum {found}, the Hub says {expected}: it was damaged "
                f"on the way, or something between here and {constants.ENDPOINT} changes files. It is not used. Load "
                f"again; delete {path} if that does not help."
            )
