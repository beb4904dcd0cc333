"""``convert``, ``push``, ``pull``, ``list`` and ``demo``."""

import logging
import time
from pathlib import Path
from typing import Any

from saelens_ext.cli import opening
from saelens_ext.cli.errors import UsageError
from saelens_ext.cli.options import ConvertOptions, DemoOptions, ListOptions, PullOptions, PushOptions
from saelens_ext.cli.output import Context, Result, shown, table
from saelens_ext.cli.tour.tour import run_demo
from saelens_ext.hub.listing import list_on_hub
from saelens_ext.hub.share import pull_from_hub, push_to_hub
from saelens_ext.published.convert import MAX_BYTES, PUBLISHED_REVISION, convert_published_dictionary

logger = logging.getLogger(__name__)


def convert(options: ConvertOptions, context: Context) -> Result:
    """Convert a published dictionary."""
    opening.check_writable(options.output_path, "output_path")
    defaults = {"revision": options.revision or PUBLISHED_REVISION, "max_bytes": options.max_bytes or MAX_BYTES}
    how = {name: value for name, value in vars(options).items() if name not in ("source", "output_path")} | defaults
    found = convert_published_dictionary(options.source, options.output_path, progress=context.progress, **how)
    data = {"path": options.output_path, **found.summary()}
    what = f"{shown(data['n_regions'])} regions of {data['hook_name']} of {data['model_name']}"
    return Result(data=data, text=f"{what} at threshold {shown(data['threshold'])}: {options.output_path}")


def push(options: PushOptions, context: Context) -> Result:
    """Put a saved dictionary on the Hub."""
    opening.refuse_file(options.dictionary)
    names = ("report", "base_model", "license", "private", "revision", "token")
    how: dict[str, Any] = {name: getattr(options, name) for name in names} | {"commit_message": options.message}
    info = push_to_hub(Path(options.dictionary), options.repo_id, options.sae_id, **how)
    data = {"repo_id": options.repo_id, "sae_id": options.sae_id, "commit": info.oid, "url": str(info)}
    return Result(data=data, text=f"Pushed: {info}")


def pull(options: PullOptions, context: Context) -> Result:
    """Copy a dictionary from the Hub."""
    opening.check_writable(options.output_path, "output_path")
    path = pull_from_hub(
        options.repo_id, options.sae_id, options.output_path, revision=options.revision, token=options.token
    )
    files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    data = {"path": path, "repo_id": options.repo_id, "sae_id": options.sae_id, "files": files}
    return Result(data=data, text=f"Pulled into {path}: {', '.join(files)}")


def listed(options: ListOptions, context: Context) -> Result:
    """List the dictionaries of a repository."""
    found = list_on_hub(options.repo_id, revision=options.revision, token=options.token).reset_index().astype(object)
    rows: list[Any] = found.where(found.notna(), None).to_dict("records")
    return Result(
        data={"repo_id": options.repo_id, "dictionaries": rows},
        text=table(rows) if rows else f"{options.repo_id} holds no dictionary that SAELens loads.",
    )


def demo(options: DemoOptions, context: Context) -> Result:
    """Run the demo."""
    if options.max_tokens < 1:
        raise UsageError(f"--max_tokens must be at least 1, got {options.max_tokens}.")
    opening.check_writable(options.output_path, "output_path")
    start = time.perf_counter()

    def say(line: str) -> None:
        logger.info("%.0f s: %s", time.perf_counter() - start, line)

    about_dictionaries, about_audit = run_demo(Path(options.output_path), options.max_tokens, say)
    found = {"report": about_dictionaries.resolve(), "audit_report": about_audit.resolve()}
    text = f"The report on the dictionaries: {found['report']}\nThe report on the audit: {found['audit_report']}"
    return Result(data=found | {"output_path": options.output_path}, text=text)
