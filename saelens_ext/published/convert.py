"""Exemplar partitions that the method's author published as pickles, converted to this package's format.

The published files (Hugging Face dataset ``J-RUM/exemplar-partitioning``) are Python pickles, which run what they say
when they are opened the usual way. They are never opened that way here: :mod:`saelens_ext.published.restricted_pickle`
reads them as data. What leaves this module is safetensors and JSON.

Both sides measure alike: directions are (x - c) / |x - c|, distances 1 - cosine, and an activation belongs to the
nearest exemplar. Nothing is rescaled, so assignments are the same up to ties within rounding.

Memory, beyond the result: reading takes about as much as the file is large, since all its arrays are held as bytes
until the wanted ones are copied. Most of the published bytes are reservoir vectors: up to 5.6 of 6 GB, needed while
reading even where they are not asked for.
"""

import hashlib
import logging
import mmap
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from tqdm.auto import tqdm

from saelens_ext import _checks, _files
from saelens_ext.dictionaries.exemplar_partition import ExemplarPartition
from saelens_ext.ops.modes import standard_modes
from saelens_ext.published.dictionary import PublishedDictionary, first_of_each
from saelens_ext.published.regions import Regions, RegionStatistics, check_separation, read_regions
from saelens_ext.published.restricted_pickle import Limits, load
from saelens_ext.published.stand_ins import UnsafePickleError

logger = logging.getLogger(__name__)

PUBLISHED_REPO = "J-RUM/exemplar-partitioning"
"""The author's dataset on the Hugging Face Hub."""
PUBLISHED_REVISION = "0ec26618db2bd64cdbf00a9a1b0eb23fffdea12a"
"""The commit of it that is read unless another is named."""
MAX_BYTES = 8 * 2**30
"""Largest pickle that is read by default; the largest published one has about 6 GB."""

_MAX_METADATA_BYTES = 64 * 2**20
_BUILD = re.compile(r"(?P<model>[\w.-]+)_L(?P<layer>\d+)_p(?P<percentile>\d+(?:\.\d+)?)(?:/(?P<file>[\w.-]+\.pkl))?")
_FILE = re.compile(r"(?P<model>[\w.-]+)_layer(?P<layer>\d+)\.pkl")


def read_published_dictionary(
    path: str | Path,
    *,
    metadata: Mapping[str, Any] | str | Path | None = None,
    sha256: str | None = None,
    max_bytes: int = MAX_BYTES,
    reservoir: bool = False,
    hook_name: str | None = None,
    model_name: str | None = None,
    percentile: float | int | None = None,
    progress: bool = False,
) -> PublishedDictionary:
    """Read a pickled exemplar partition of the author's as data, without running it.

    Args:
        path: the ``.pkl`` file.
        metadata: its metadata file, or what it holds; by default ``<name>_metadata.json`` beside it, if there is one.
        sha256: checksum that the file must have, 64 hexadecimal digits.
        max_bytes: refuse larger files.
        reservoir: read the sampled members too. They are most of the file, and are held in memory.
        hook_name: where the activations came from; by default as the metadata say, or the residual stream behind the
            layer that the file is named after.
        model_name: which model; by default as the metadata or the file's name say.
        percentile: of the threshold; by default as the metadata or the folder's name say.
        progress: show a progress bar.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the checksum differs; the metadata are no JSON object; or the pickle is refused (an
            ``UnsafePickleError``): too large, damaged, with anything in it but a published dictionary's plain data, or
            against the method's own rules (unit directions, exemplars farther apart than the threshold, …).

    Source: arXiv 2605.14347 and its repository, for what the fields mean.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give the .pkl file of a published dictionary.")
    beside = path.with_name(f"{path.stem}_metadata.json")
    build = _read_metadata((beside if beside.exists() else {}) if metadata is None else metadata)
    try:
        with _mapped(path, _checks.positive(max_bytes, "max_bytes")) as data:
            digest = _checked_digest(data, sha256, path)
            with tqdm(
                total=len(data), unit="B", unit_scale=True, desc=f"read {path.name}", disable=not progress
            ) as bar:
                root, n_items = load(data, Limits.of_size(len(data)), lambda at: bar.update(at - bar.n))
            regions = read_regions(root, len(data), n_items, reservoir=reservoir)
            check_separation(regions.exemplars, regions.threshold)
            source = {"file": path.name, "bytes": len(data), "sha256": digest}
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{path} is refused: {error}.") from None
    if regions.ignored:
        logger.warning("%s holds attributes that are not known and were left out: %s", path, ", ".join(regions.ignored))
    options = {"hook_name": hook_name, "model_name": model_name, "percentile": percentile}
    return _published(regions, build, source, _settings(path, build.get("discovery_config", {}), options))


@standard_modes()
def convert_published_dictionary(
    source: str | Path,
    output: str | Path,
    *,
    hook_name: str | None = None,
    model_name: str | None = None,
    percentile: float | int | None = None,
    repo_id: str = PUBLISHED_REPO,
    revision: str = PUBLISHED_REVISION,
    sha256: str | None = None,
    max_bytes: int = MAX_BYTES,
    reservoir: bool = False,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> PublishedDictionary:
    """Convert a published dictionary, a local file or one of the author's dataset, into a directory of ours.

    The directory then loads with ``SAE.load_from_disk``; everything else that the pickle said is beside the dictionary,
    in ``published.json`` and ``published.safetensors``, which :meth:`PublishedDictionary.load` reads.

    Args:
        source: a local ``.pkl`` file, or a build of the dataset, "gemma-2-2b_L12_p10" or
            "gemma-2-2b_L12_p10/gemma-2-2b_layer12.pkl".
        output: directory to write.
        hook_name: as for :func:`read_published_dictionary`, as the two that follow.
        model_name: which model.
        percentile: of the threshold.
        repo_id: dataset to download from.
        revision: a commit of it, 40 hexadecimal digits; a branch or tag may change behind your back and is refused.
        sha256: checksum of the pickle. Without it a downloaded file is held to the one that the hub states for it at
            that commit.
        max_bytes: refuse larger files, before they are downloaded.
        reservoir: convert the sampled members too.
        cache_dir: where downloads are kept; by default the hub client's cache.
        progress: show progress bars.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: ``source`` is neither a file nor named like a build.
        ValueError: as :func:`read_published_dictionary`; or the revision is no commit, or the hub states no checksum.
        huggingface_hub.errors.HfHubHTTPError: the hub has no such file, or cannot be reached.
    """
    options = {"hook_name": hook_name, "model_name": model_name, "percentile": percentile, "max_bytes": max_bytes}
    options |= {"reservoir": reservoir, "progress": progress}
    if Path(source).is_file():
        published = read_published_dictionary(source, sha256=sha256, **options)
    else:
        path, digest = _download(str(source), repo_id, revision, sha256, max_bytes, cache_dir)
        published = read_published_dictionary(path, sha256=digest, **options)
        origin = {"repo_id": repo_id, "revision": revision}
        published.source.update(origin)
        published.dictionary.cfg.metadata.published |= origin
    published.save(output)
    return published


# --- the file ---


@contextmanager
def _mapped(path: Path, max_bytes: int) -> Iterator[mmap.mmap]:
    size = path.stat().st_size
    if not 0 < size <= max_bytes:
        raise UnsafePickleError(f"it has {size} bytes, and 1 to {max_bytes} are read; raise max_bytes if you trust it")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def _checked_digest(data: mmap.mmap, sha256: str | None, path: Path) -> str:
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"sha256 must be 64 hexadecimal digits, got {sha256!r}.")
    digest = hashlib.sha256(data).hexdigest()
    if sha256 is not None and digest != sha256.lower():
        raise ValueError(f"{path} has SHA-256 {digest}, not {sha256}: it is damaged or another file. Fetch it again.")
    return digest


def _named_by(path: Path) -> dict[str, Any]:
    """What the published names of a file and its folder say."""
    settings: dict[str, Any] = {}
    if match := _FILE.fullmatch(path.name):
        settings |= {"model_name": match["model"], "hook_name": f"blocks.{match['layer']}.hook_resid_post"}
    if match := _BUILD.fullmatch(path.absolute().parent.name):
        settings |= {"percentile": float(match["percentile"])}
    return settings


def _read_metadata(metadata: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """The author's settings and figures, without the growth curve."""
    if not isinstance(metadata, Mapping):
        path = Path(metadata)
        if path.exists() and path.stat().st_size > _MAX_METADATA_BYTES:
            raise ValueError(f"{path} is too large: a metadata file has at most {_MAX_METADATA_BYTES} bytes.")
        metadata = _files.read_json(path)
    build = {key: metadata[key] for key in ("discovery_config", "discovery") if isinstance(metadata.get(key), Mapping)}
    return _files.json_safe(
        build | {key: metadata[key] for key in ("n_forward_passes", "n_prompts", "n_tokens") if key in metadata}
    )


# --- the result ---


def _settings(path: Path, config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Hook, model and percentile: the options, else as the metadata say, else as the names of file and folder say."""
    layer = config.get("layer")
    recorded = {
        "hook_name": config.get("hook_name") or (f"blocks.{layer}.hook_resid_post" if isinstance(layer, int) else None),
        "model_name": config.get("model"),
        "percentile": config.get("percentile"),
    }
    kinds = {"hook_name": str, "model_name": str, "percentile": (int, float)}
    wrong = [key for key, value in recorded.items() if value is not None and not isinstance(value, kinds[key])]
    if wrong:
        names = ", ".join(wrong)
        raise ValueError(f"The metadata of {path} hold something else than names and a number for {names}.")
    known = [{key: value for key, value in source.items() if value is not None} for source in (recorded, options)]
    return _named_by(path) | known[0] | known[1]


def _published(
    regions: Regions, build: dict[str, Any], source: dict[str, Any], settings: dict[str, Any]
) -> PublishedDictionary:
    figures = build.get("discovery", {})
    disagreements = {
        key: {"metadata": figures[key], "file": value}
        for key, value in {"n_partitions": len(regions.counts), "threshold": regions.threshold}.items()
        if key in figures and figures[key] != value
    }
    if disagreements:
        logger.warning("%s and its metadata disagree, the file is followed: %s", source["file"], disagreements)
    metadata = _sae_metadata(settings, build.get("discovery_config", {}), int(regions.counts.sum())) | {
        "published": dict(source)
    }
    dictionary = ExemplarPartition.from_regions(
        regions.exemplars,
        regions.means,
        regions.center,
        regions.threshold,
        percentile=float(settings["percentile"]) if "percentile" in settings else None,
        metadata=metadata,
    )
    return PublishedDictionary(
        dictionary=dictionary,
        source=source | {"disagreements": disagreements, "ignored": list(regions.ignored)},
        build=build,
        exemplar_indices=first_of_each(regions.members),
        **{field.name: getattr(regions, field.name) for field in fields(RegionStatistics)},
    )


def _sae_metadata(settings: Mapping[str, Any], config: Mapping[str, Any], n_seen: int) -> dict[str, Any]:
    """What SAELens and this package record of a build, as far as the author's code and settings tell."""
    metadata = {key: settings[key] for key in ("model_name", "hook_name") if key in settings}
    if isinstance(config.get("context_length"), int):
        # The author's texts of that many tokens are tokenised again with BOS before them.
        metadata["context_size"] = config["context_length"] + 1
    if isinstance(config.get("seed"), int):
        metadata["seed"] = config["seed"]
    return metadata | {
        "prepend_bos": True,
        "n_seen": n_seen,
        "dataset_path": "monology/pile-uncopyrighted",
        # The author builds with HookedTransformer.from_pretrained_no_processing in bfloat16.
        "model_class_name": "HookedTransformer",
        "compatibility_mode": None,
        "writing_weights_centered": False,
    }


# --- the hub ---


def _download(
    source: str, repo_id: str, revision: str, sha256: str | None, max_bytes: int, cache_dir: str | Path | None
) -> tuple[Path, str]:
    """Fetch a build and its metadata; return where the pickle is and the checksum that it must have."""
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(f"revision must be a commit, 40 hexadecimal digits, got {revision!r}: others can change.")
    match = _BUILD.fullmatch(source)
    if match is None:
        raise FileNotFoundError(f"{source} is neither a file nor a build of {repo_id} such as 'gemma-2-2b_L12_p10'.")
    file = source if match["file"] else f"{source}/{match['model']}_layer{match['layer']}.pkl"
    if sha256 is None:
        sha256 = _stated_checksum(file, repo_id, revision, max_bytes)
    fetch = {"repo_id": repo_id, "repo_type": "dataset", "revision": revision, "cache_dir": cache_dir}
    try:
        hf_hub_download(filename=f"{file.removesuffix('.pkl')}_metadata.json", **fetch)
    except EntryNotFoundError as error:
        logger.warning("%s has no metadata of %s (%s).", repo_id, file, type(error).__name__)
    return Path(hf_hub_download(filename=file, **fetch)), sha256


def _stated_checksum(file: str, repo_id: str, revision: str, max_bytes: int) -> str:
    paths = HfApi().get_paths_info(repo_id, [file], revision=revision, repo_type="dataset")
    if not paths:
        raise FileNotFoundError(f"huggingface.co/datasets/{repo_id}/tree/{revision} has no {file}.")
    stored = getattr(paths[0], "lfs", None)
    if stored is None:
        raise ValueError(f"The hub states no SHA-256 for {file} of {repo_id}; pass sha256= as its author gives it.")
    if stored.size > max_bytes:
        raise ValueError(f"{file} has {stored.size} bytes, more than max_bytes={max_bytes}; raise it to download it.")
    return stored.sha256
