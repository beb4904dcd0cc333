"""What went wrong with the Hub, in a sentence that says what to do.

The client's errors are many, are nested, and change their base classes between versions. Here each becomes one of
Python's own: FileNotFoundError, PermissionError, ConnectionError, OSError or ValueError.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of the HTTP client that this version uses
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

_SIGN_IN = "Sign in with `hf auth login`, or pass token=, with a token that may {what} it."


@contextmanager
def clear_errors(repo_id: str, what: str, lost: str) -> Iterator[None]:
    """Translate the errors of a block that reads from the Hub or writes to it (``what``: "read" or "write").

    ``lost`` says what a broken connection means for what was being done.

    Raises:
        FileNotFoundError: no such repository, revision or file, or none that this token may see.
        PermissionError: it may not be read or written, or a local directory may not be written.
        ConnectionError: the Hub was not reached, or the connection broke.
        OSError: no space on the disk, or another answer of the Hub that means failure.
        ValueError: the repository's name is not one.
    """
    try:
        yield
    except Exception as error:
        translated = _translate(error, repo_id, what, lost)
        if translated is None:
            raise
        raise translated from error


def is_unreachable(error: BaseException) -> bool:
    """Whether an error means that no answer came from the Hub."""
    return any(
        isinstance(link, ConnectionError) or (isinstance(link, HTTPError) and getattr(link, "response", None) is None)
        for link in _chain(error)
    )


def status(error: BaseException) -> int | None:
    """The HTTP status behind an error, if any."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(link, HTTPError) and response is not None:
            return int(response.status_code)
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it, as far as that was said."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _translate(error: Exception, repo_id: str, what: str, lost: str) -> Exception | None:
    chain = list(_chain(error))
    for find in (_of_the_disk, _of_the_repository):
        for link in chain:
            if (found := find(link, repo_id, what)) is not None:
                return found
    code = status(error)
    if code is not None:
        asked = f"{constants.ENDPOINT} answered {code} when asked to {what} {repo_id!r}"
        return OSError(f"{asked}: {_last_line(error)} {lost}")
    if is_unreachable(error):
        reason = next((str(link) for link in reversed(chain) if str(link)), type(error).__name__)
        return ConnectionError(f"The connection to {constants.ENDPOINT} failed ({reason}). {lost}")
    if isinstance(error, LocalEntryNotFoundError):
        absent = f"{repo_id!r} is not in the cache ({_last_line(error)})"
        return ConnectionError(f"{constants.ENDPOINT} was not reached, and {absent}. {lost}")
    return None


def _of_the_disk(error: BaseException, repo_id: str, what: str) -> Exception | None:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or (isinstance(error, SafetensorError) and "os error 28" in str(error)):
        place = f"the cache, {constants.HF_HUB_CACHE}" if what == "read" else "the directory for temporary files"
        remedy = "HF_HUB_CACHE" if what == "read" else "TMPDIR"
        return OSError(
            errno.ENOSPC,
            f"The disk is full ({place}): {repo_id!r} was not {'loaded' if what == 'read' else 'pushed'}. Free some "
            f"space, or set {remedy} to a directory of another disk, and try again",
        )
    if isinstance(error, PermissionError) and error.filename is not None:
        return PermissionError(
            f"{error.filename} may not be written: {error.strerror}. Change its permissions, or set HF_HUB_CACHE "
            "(downloads) or TMPDIR (uploads) to a directory that you may write."
        )
    return None


def _of_the_repository(error: BaseException, repo_id: str, what: str) -> Exception | None:
    sign_in = _SIGN_IN.format(what=what)
    if isinstance(error, GatedRepoError):
        return PermissionError(f"{repo_id!r} is gated: ask for access on {constants.ENDPOINT}/{repo_id}. {sign_in}")
    if isinstance(error, RepositoryNotFoundError):
        private = "or it is private and this token may not see it"
        return FileNotFoundError(f"There is no model repository {repo_id!r}, {private}. {sign_in}")
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(
            f"{repo_id!r} has no such revision. Its branches and tags are those of "
            f"huggingface_hub.list_repo_refs({repo_id!r}); a commit hash must have all its 40 digits."
        )
    if isinstance(error, HFValidationError):
        allowed = "'name' or 'owner/name' of letters, digits, '-', '_' and '.'"
        return ValueError(f"repo_id must be {allowed}, got {repo_id!r}: {error}")
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return FileNotFoundError(f"A file of {repo_id!r} is not there any more: {_last_line(error)} Try again.")
    code = status(error) if isinstance(error, HfHubHTTPError) else None
    if code in (401, 403):
        return PermissionError(f"This token may not {what} {repo_id!r}: {_last_line(error)} {sign_in}")
    return None


def _last_line(error: BaseException) -> str:
    """What the Hub itself said, which the client puts behind its own words."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    said = getattr(error, "server_message", None) or headers.get("X-Error-Message")
    said = said or (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return said if said.endswith(".") else f"{said}."
