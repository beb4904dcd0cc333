"""The files of one dictionary in a repository of the Hub: which there are, reading them, and checking them."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens import __version__ as sae_lens_version
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.util import str_to_dtype
from safetensors import SafetensorError, safe_open

from saelens_ext import _checks, _files
from saelens_ext.analysis.labels import FORMAT as LABELS
from saelens_ext.analysis.labels import Labels
from saelens_ext.analysis.profile import FORMAT as PROFILE
from saelens_ext.analysis.profile import DictionaryProfile
from saelens_ext.dictionaries import hierarchy
from saelens_ext.dictionaries.architecture_names import plain_name
from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from saelens_ext.dictionaries.fit_result import FORMAT as FIT
from saelens_ext.dictionaries.fit_result import ExemplarFitResult
from saelens_ext.dictionaries.hierarchy import HierarchicalSNMF
from saelens_ext.dictionaries.snmf import SNMFDictionary
from saelens_ext.dictionaries.snmf_fit_result import SNMFFitResult
from saelens_ext.report.evidence_section import BESIDE_FILENAME

REPORT_FILENAME = "report.html"
SAE_FILENAMES = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME)
HIERARCHY_FILENAME = hierarchy.FORMAT.names[0]
# A level of a hierarchy is a folder of its own.
_SIDECARS = (*hierarchy.FORMAT.names, *FIT.names, *PROFILE.names, *LABELS.names, RUNNER_CFG_FILENAME, SPARSITY_FILENAME)
_SIDECARS += (REPORT_FILENAME, BESIDE_FILENAME)
_OF_A_LEVEL = (*SAE_FILENAMES, *PROFILE.names, *LABELS.names)
_LEVEL_FILES, _OTHERS = ("|".join(map(re.escape, names)) for names in (_OF_A_LEVEL, _SIDECARS))
_KNOWN = re.compile(rf"(level_\d+/)?({_LEVEL_FILES})|{_OTHERS}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Contents:
    """What the files of one dictionary hold."""

    dictionary: SAE[Any] | HierarchicalSNMF
    """The dictionary, or the hierarchy of them."""
    fit: ExemplarFitResult | SNMFFitResult | None = None
    """Statistics of the fit."""
    profile: DictionaryProfile | None = None
    """What the latents respond to."""
    labels: Labels | None = None
    """What the latents could be called."""
    runner_config: dict[str, Any] | None = None
    """The config of the run that built it."""
    report: Path | None = None
    """A page about it."""
    levels: tuple["Contents", ...] = ()
    """The levels of a hierarchy, the finest first, each with its profile and labels."""
    evidence: dict[str, dict[str, Any]] | None = None
    """By kind of evaluation, its "title", "verdict" and "figures"."""

    @property
    def sae(self) -> SAE[Any]:
        """The dictionary, of a hierarchy the finest one."""
        whole = self.dictionary
        return whole.dictionaries[0] if isinstance(whole, HierarchicalSNMF) else whole


def known_names(names: Iterable[str]) -> list[str]:
    """Those of the names, relative to a dictionary's folder, that belong to it."""
    return sorted(name for name in names if _KNOWN.fullmatch(name))


def folders_with_dictionaries(paths: Iterable[str]) -> list[str]:
    """The folders of a repository that hold a dictionary; the levels of a hierarchy are part of it."""
    paths = set(paths)
    hierarchies = {p.removesuffix(f"/{HIERARCHY_FILENAME}") for p in paths if p.endswith(f"/{HIERARCHY_FILENAME}")}
    configs = {p.removesuffix(f"/{SAE_CFG_FILENAME}") for p in paths if p.endswith(f"/{SAE_CFG_FILENAME}")}
    whole = {folder for folder in configs if f"{folder}/{SAE_WEIGHTS_FILENAME}" in paths}
    return sorted(hierarchies | {folder for folder in whole if folder.rpartition("/")[0] not in hierarchies})


def files_in(folder: Path) -> dict[str, Path]:
    """The known files of a folder by their names relative to it."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: found[name] for name in known_names(found)}


def read_folder(folder: Path, device: str = "cpu", dtype: str | None = None) -> Contents:
    """Read a dictionary and what lies beside it.

    Raises:
        FileNotFoundError: it holds no dictionary.
        ValueError: an architecture that is not known; files that are damaged, newer than this package or do not belong
            together.
    """
    names = set(files_in(folder))
    if HIERARCHY_FILENAME in names:
        dictionary: SAE[Any] | HierarchicalSNMF = HierarchicalSNMF.load(folder, device=device)
        if dtype is not None:
            for level in dictionary.dictionaries:
                level.to(dtype=str_to_dtype(dtype))
        levels = tuple(_level(folder, names, number, sae) for number, sae in enumerate(dictionary.dictionaries))
        return Contents(dictionary=dictionary, levels=levels, **_sidecars(folder, names, None))
    missing = [name for name in SAE_FILENAMES if name not in names]
    if missing:
        raise FileNotFoundError(f"{folder} holds no SAELens dictionary: it lacks {' and '.join(missing)}.")
    sae = _load_sae(folder, device, dtype)
    fit = _load_fit(folder, sae) if names.issuperset(FIT.names) else None
    return Contents(dictionary=sae, fit=fit, **_sidecars(folder, names, sae))


def _level(folder: Path, names: set[str], number: int, sae: SAE[Any]) -> Contents:
    own = {name.removeprefix(f"level_{number}/") for name in names if name.startswith(f"level_{number}/")}
    return Contents(dictionary=sae, **_sidecars(folder / f"level_{number}", own, sae))


def _sidecars(folder: Path, names: set[str], sae: SAE[Any] | None) -> dict[str, Any]:
    return {
        "profile": DictionaryProfile.load(folder, sae) if names.issuperset(PROFILE.names) else None,
        "labels": Labels.load(folder) if names.issuperset(LABELS.names) else None,
        "runner_config": _files.read_json(folder / RUNNER_CFG_FILENAME) if RUNNER_CFG_FILENAME in names else None,
        "report": folder / REPORT_FILENAME if REPORT_FILENAME in names else None,
        "evidence": _files.read_json(folder / BESIDE_FILENAME) if BESIDE_FILENAME in names else None,
    }


def _load_sae(folder: Path, device: str, dtype: str | None) -> SAE[Any]:
    # Configs from before SAELens named architectures have none, and mean its first.
    named = _files.read_json(folder / SAE_CFG_FILENAME).get("architecture", "standard")
    if not isinstance(named, str) or named not in SAE_CLASS_REGISTRY:
        known = [name for name in SAE_CLASS_REGISTRY if plain_name(name) == name]
        raise ValueError(
            f"{folder / SAE_CFG_FILENAME} is of architecture {named!r}, which is not registered with SAELens "
            f"{sae_lens_version} here.{_checks.near_matches(str(named), known)} Import the package that defines it and "
            f"load again, or upgrade (`pip install -U saelens-ext sae-lens`). Registered are {', '.join(known)}."
        )
    try:
        with safe_open(folder / SAE_WEIGHTS_FILENAME, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{folder / SAE_WEIGHTS_FILENAME} is not a whole safetensors file ({error}).") from error
    return SAE_CLASS_REGISTRY[named][0].load_from_disk(folder, device=device, dtype=dtype)


def _load_fit(folder: Path, sae: SAE[Any]) -> ExemplarFitResult | SNMFFitResult | None:
    """The statistics beside a dictionary, with that very dictionary in them."""
    for kind, result in ((ExemplarPartition, ExemplarFitResult), (SNMFDictionary, SNMFFitResult)):
        if isinstance(sae, kind):
            return replace(result.load(folder), dictionary=sae)
    return None


# --- whole and unchanged ---


def digest(path: Path, lfs: bool) -> str:
    """What the Hub calls a file by: its SHA-256 where it is stored as a large file, else the id git gives it."""
    checksum = hashlib.sha256() if lfs else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while block := file.read(2**22):
            checksum.update(block)
    return checksum.hexdigest()


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """JSON as it is written to files; what JSON cannot hold is a ValueError."""
    try:
        return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()
    except TypeError as error:
        raise ValueError(f"runner_config must hold texts, finite numbers, lists and dictionaries: {error}.") from error
