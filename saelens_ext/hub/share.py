"""Dictionaries on the Hugging Face Hub: a model repository with one folder per dictionary and a card that says what is
there.

A folder holds ``cfg.json`` and ``sae_weights.safetensors``, as SAELens wants them, and beside them what the fit and
the profile saved. ``SAE.from_pretrained(repo_id, sae_id)`` loads it once ``saelens_ext`` is imported.
"""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from sae_lens import SAE
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME
from sae_lens.util import dtype_to_str

from saelens_ext import _files
from saelens_ext.analysis.labels import Labels
from saelens_ext.analysis.profile import DictionaryProfile
from saelens_ext.dictionaries.architecture_names import plain_name, written_name
from saelens_ext.dictionaries.fit_result import ExemplarFitResult
from saelens_ext.dictionaries.hierarchy import HierarchicalSNMF
from saelens_ext.dictionaries.snmf_fit_result import SNMFFitResult
from saelens_ext.host.devices import chosen_device
from saelens_ext.hub import contents as hub_files
from saelens_ext.hub.card_section import describe, results, tags
from saelens_ext.hub.contents import Contents
from saelens_ext.hub.errors import clear_errors, status
from saelens_ext.hub.fetch import check_names, fetch, paths, within
from saelens_ext.hub.model_card import FrontMatter, hub_model_name, write_card
from saelens_ext.ops.modes import standard_modes

logger = logging.getLogger(__name__)

Pushable = SAE[Any] | ExemplarFitResult | SNMFFitResult | HierarchicalSNMF | str | Path

_CARD = "README.md"
# Times that someone else may commit between our reading the card and our writing it.
_ATTEMPTS = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class HubDictionary(Contents):
    """A dictionary from the Hub, and what lies beside it there; None what does not."""

    repo_id: str
    """The repository."""
    sae_id: str
    """The folder in it."""
    commit: str
    """Hash of the commit that was read; as ``revision`` it gives the same files for ever."""
    path: Path
    """The local folder with the files."""


@standard_modes()
def push_to_hub(
    dictionary: Pushable,
    repo_id: str,
    sae_id: str,
    *,
    profile: DictionaryProfile | Sequence[DictionaryProfile] | None = None,
    labels: Labels | Sequence[Labels] | None = None,
    runner_config: Mapping[str, Any] | str | Path | None = None,
    report: str | Path | None = None,
    metrics: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    license: str | None = None,
    private: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Put a dictionary into a model repository of the Hub, in one commit together with the card.

    The repository is made if it does not exist. Other dictionaries in it, and text in the card that was not written
    here, stay. A folder of that name is replaced as a whole: what lay beside the old dictionary and is not given again
    (its profile, its statistics) is removed, since it describes another one.

    Args:
        dictionary: any SAELens SAE; a fit, whose statistics are pushed too; a hierarchy, whose levels become folders;
            or the directory that one of them was saved into, with whatever lies beside it.
        repo_id: "owner/name" or, for your own account, "name".
        sae_id: the folder, such as "blocks.6.hook_resid_post/percentile_2".
        profile: what the latents respond to; of a hierarchy one for each level, the finest first.
        labels: what the latents could be called, likewise; needs no profile beside it.
        runner_config: the config of the run that built it, or a JSON file of it.
        report: an HTML page about it.
        metrics: further numbers for the card, such as those of ``run_evals``; those of the fit are there anyway.
        base_model: the model's name on the Hub; by default from the dictionary's metadata, where that is sure.
        license: for the card, such as "mit"; by default the one which is there.
        private: whether a repository that has to be made is private.
        revision: the branch, made from "main" if it does not exist.
        token: by default the one of ``hf auth login``.
        commit_message: by default it names the dictionary.

    Returns:
        The commit: its URL as a string, ``.oid`` its hash.

    Raises:
        FileNotFoundError: a file to push is not there.
        PermissionError: the token may not write.
        ConnectionError: the Hub was not reached, or the connection broke; the repository is then as before.
        ValueError: a name that is none, a profile of another dictionary, files that do not belong together, a card
            whose front matter is not readable, or ``private`` for a repository that is public.
        OSError: no disk space, or another refusal by the Hub.
    """
    check_names(repo_id, sae_id)
    if revision is not None and constants.REGEX_COMMIT_OID.fullmatch(revision):
        raise ValueError(f"revision must be a branch, got the commit {revision!r}; nothing can be added to a commit.")
    api = HfApi(token=token)
    lost = "Nothing was published: the repository is as before. Push again; what had arrived is not sent twice."
    with TemporaryDirectory(prefix="saelens_ext_") as staging:
        with clear_errors(repo_id, "write", lost):
            contents, files = _stage(dictionary, Path(staging), profile, labels, runner_config, report)
            additions = [CommitOperationAdd(f"{sae_id}/{name}", file) for name, file in files.items()]
            repo_id = _ensure_branch(api, repo_id, private, revision)
            section = describe(contents, repo_id, sae_id, metrics, revision)
            front = FrontMatter(
                tags=tags(contents),
                base_model=base_model or hub_model_name(contents.sae.cfg.metadata.model_name),
                license=license,
                results=results(contents, sae_id, metrics),
            )

            def card_for(info: ModelInfo) -> str:
                folders = hub_files.folders_with_dictionaries(paths(info))
                return write_card(_read_card(api, info, Path(staging)), repo_id, section, front, folders)

            return _commit(api, repo_id, sae_id, additions, card_for, revision, commit_message or f"Push {sae_id}")


@standard_modes()
def load_from_hub(
    repo_id: str,
    sae_id: str,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    token: str | bool | None = None,
) -> HubDictionary:
    """Load a dictionary from the Hub with what lies beside it: any that SAELens' own format holds.

    Downloaded files are compared with the checksums of the Hub. Without a connection, files in the cache are used.

    Args:
        repo_id: "owner/name".
        sae_id: the folder in it.
        revision: a branch, a tag or a commit hash; by default "main".
        device: where to put it: "auto" (CUDA where there is one, else MPS, else the CPU) or a device of torch.
        dtype: for example "bfloat16"; by default the one it was saved in.
        token: by default the one of ``hf auth login``.

    Raises:
        FileNotFoundError: no such repository (or not for this token), revision or dictionary; the message lists what is
            there.
        PermissionError: the repository is gated, or the cache cannot be written.
        ConnectionError: the Hub was not reached, or the connection broke; what had arrived is kept for the next
            attempt.
        ValueError: a file that is not the one the Hub holds, even after another download; an unknown architecture; a
            newer ``format_version``; files that are damaged or do not belong together.
        OSError: no disk space, or another refusal by the Hub.
    """
    device = chosen_device(device)
    folder, commit = fetch(repo_id, sae_id, revision, token)
    dtype = dtype_to_str(dtype) if isinstance(dtype, torch.dtype) else dtype
    contents = hub_files.read_folder(folder, device, dtype)
    return HubDictionary(**vars(contents), repo_id=repo_id, sae_id=sae_id, commit=commit, path=folder)


def pull_from_hub(
    repo_id: str, sae_id: str, destination: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> Path:
    """Copy a dictionary from the Hub into a directory, where ``SAE.load_from_disk`` and the ``load`` methods read it.

    Nothing in the directory changes until every file has arrived and was compared with its checksum.

    Args:
        repo_id: "owner/name", and ``sae_id`` the folder in it.
        destination: the directory, which is returned; made if missing.
        revision: a branch, a tag or a commit hash; by default "main".
        token: by default the one of ``hf auth login``.

    Raises:
        FileExistsError: the directory holds a dictionary's files which are not among those to be copied, and would not
            belong to it.
        FileNotFoundError, PermissionError, ConnectionError, ValueError, OSError: as :func:`load_from_hub`.
    """
    folder, _ = fetch(repo_id, sae_id, revision, token)
    files, destination = hub_files.files_in(folder), Path(destination)
    strangers = sorted(set(hub_files.files_in(destination)) - set(files)) if destination.is_dir() else []
    if strangers:
        raise FileExistsError(
            f"{destination} holds {', '.join(strangers)}, which would not belong to {sae_id!r}. Give an empty or a new "
            "directory."
        )
    _files.write_together({destination / name: partial(shutil.copyfile, source) for name, source in files.items()})
    return destination


# --- pushing ---


def _stage(
    pushed: Pushable,
    staging: Path,
    profile: DictionaryProfile | Sequence[DictionaryProfile] | None,
    labels: Labels | Sequence[Labels] | None,
    runner_config: Mapping[str, Any] | str | Path | None,
    report: str | Path | None,
) -> tuple[Contents, dict[str, Path | bytes]]:
    """What is pushed and, by their names in the folder, the files or their bytes."""
    folder = staging / "dictionary"
    if isinstance(pushed, str | Path):
        folder = Path(pushed)
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no directory {pushed}; give the one a dictionary was saved into.")
        contents = hub_files.read_folder(folder)
    elif isinstance(pushed, SAE):
        pushed.save_model(folder)
        contents = Contents(dictionary=pushed)
    else:
        pushed.save(folder)
        levels = isinstance(pushed, HierarchicalSNMF)
        contents = Contents(dictionary=pushed) if levels else Contents(dictionary=pushed.dictionary, fit=pushed)
    files: dict[str, Path | bytes] = dict(hub_files.files_in(folder))
    if profile is not None or labels is not None:
        contents = _with_sidecars(contents, profile, labels, staging / "beside")
        files |= hub_files.files_in(staging / "beside")
    if runner_config is not None:
        config = _files.read_json(runner_config) if isinstance(runner_config, str | Path) else dict(runner_config)
        files[RUNNER_CFG_FILENAME] = hub_files.json_bytes(config)
        contents = replace(contents, runner_config=config)
    if report is not None:
        if not Path(report).is_file():
            raise FileNotFoundError(f"There is no report {report}; give the file that write_dictionary_report wrote.")
        files[hub_files.REPORT_FILENAME] = Path(report)
        contents = replace(contents, report=Path(report))
    configs = [name for name in files if name.rpartition("/")[2] == SAE_CFG_FILENAME]
    return contents, files | {name: _published(files[name]) for name in configs}


def _with_sidecars(
    contents: Contents,
    profile: DictionaryProfile | Sequence[DictionaryProfile] | None,
    labels: Labels | Sequence[Labels] | None,
    folder: Path,
) -> Contents:
    """The contents with profiles and labels, which are saved to a folder; ValueError for those of another."""
    whole = contents.dictionary
    if not isinstance(whole, HierarchicalSNMF):
        if isinstance(profile, Sequence) or isinstance(labels, Sequence):
            raise ValueError("Several profiles or labels are those of a hierarchy; give one for one dictionary.")
        return _with_own(contents, profile, labels, folder)
    saes = whole.dictionaries
    parts = contents.levels or tuple(Contents(dictionary=sae) for sae in saes)
    columns = (_per_level(profile, len(saes), "profile"), _per_level(labels, len(saes), "labels"))
    found = zip(parts, *columns, strict=True)
    return replace(contents, levels=tuple(_with_own(*one, folder / f"level_{n}") for n, one in enumerate(found)))


def _per_level(given: Any, n: int, name: str) -> Sequence[Any]:
    if given is None:
        return [None] * n
    if not isinstance(given, Sequence) or len(given) != n:
        got = len(given) if isinstance(given, Sequence) else "one"
        raise ValueError(
            f"A hierarchy of {n} levels takes {name} as a list of {n}, the finest level first, got {got}; give one for "
            "each, or push its level by itself."
        )
    return given


def _with_own(contents: Contents, profile: DictionaryProfile | None, labels: Labels | None, folder: Path) -> Contents:
    sae = contents.dictionary
    assert not isinstance(sae, HierarchicalSNMF)
    if profile is not None:
        profile.save(folder)
        DictionaryProfile.load(folder, sae)
        contents = replace(contents, profile=profile)
    if labels is not None:
        if len(labels) != sae.cfg.d_sae:
            raise ValueError(f"The labels are of {len(labels)} latents, and not of the dictionary that is pushed.")
        labels.save(folder)
        contents = replace(contents, labels=labels)
    return contents


def _published(config: Path | bytes) -> bytes:
    """A ``cfg.json`` as it goes out: its architecture says how to load it, and it names no device of this machine."""
    content = _files.read_json(config) if isinstance(config, Path) else json.loads(config)
    if isinstance(name := plain_name(content.get("architecture")), str):
        content["architecture"] = written_name(name)
    return hub_files.json_bytes(content | {"device": "cpu"})


def _ensure_branch(api: HfApi, repo_id: str, private: bool, revision: str | None) -> str:
    """Make repository and branch where they are missing; the repository's full name."""
    # A name without owner is in the token's own account, which only the creation resolves.
    info = _info(api, repo_id) if "/" in repo_id else None
    if info is None:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        info = api.model_info(repo_id)
    if private and info.private is False:
        raise ValueError(
            f"{repo_id!r} exists and is public; private=True is for a repository that has to be made. Make it private "
            "on the Hub first, push to another one, or leave private out."
        )
    if revision is not None and _info(api, repo_id, revision) is None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def _info(api: HfApi, repo_id: str, revision: str | None = None) -> ModelInfo | None:
    try:
        return api.model_info(repo_id, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None


def _read_card(api: HfApi, info: ModelInfo, staging: Path) -> str:
    if _CARD not in paths(info):
        return ""
    # Into the staging directory: the reader's cache is no place for half a snapshot.
    path = api.hf_hub_download(info.id, _CARD, revision=info.sha, local_dir=staging / f"card_{info.sha}")
    return Path(path).read_text(encoding="utf-8")


def _commit(
    api: HfApi,
    repo_id: str,
    sae_id: str,
    additions: list[CommitOperationAdd],
    card_for: Any,
    revision: str | None,
    message: str,
) -> CommitInfo:
    """One commit on top of the card that was read; when someone else was faster, again on top of theirs."""
    for attempt in range(_ATTEMPTS):
        info = api.model_info(repo_id, revision=revision)
        new = {addition.path_in_repo for addition in additions}
        old = {f"{sae_id}/{name}" for name in hub_files.known_names(within(paths(info), sae_id))}
        card = CommitOperationAdd(_CARD, card_for(info).encode())
        operations = [*additions, card, *(CommitOperationDelete(path, is_folder=False) for path in sorted(old - new))]
        where: dict[str, Any] = {"revision": revision, "parent_commit": info.sha}
        try:
            return api.create_commit(repo_id, operations, commit_message=message, **where)
        except HfHubHTTPError as error:
            # 412: the branch is not where it was when the card was read.
            if status(error) != 412 or attempt == _ATTEMPTS - 1:
                raise
            logger.info("Someone else has committed to %s meanwhile; pushing on top of that.", repo_id)
    raise AssertionError("unreachable")
