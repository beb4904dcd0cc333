"""What the command prints: results on stdout, all else on stderr."""

import csv
import json
import logging
import math
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd

from saelens_ext._files import json_safe

PROGRAM = "saelens-ext"
_UNLIMITED = 100_000  # columns where no terminal limits them
_NOT_IN_CSV = re.compile("[\0\ud800-\udfff]")


@dataclass(kw_only=True)
class Result:
    """What a command found."""

    data: Mapping[str, Any]
    """For ``--json``."""
    text: str
    """For people."""


@dataclass(kw_only=True)
class Context:
    """What a command is told besides its options, and what it says of itself while it runs."""

    progress: bool = False
    """Whether to show progress bars."""
    kept: list[str] = field(default_factory=list)
    """What Ctrl-C would leave by now, in sentences."""


def print_result(result: Result, as_json: bool) -> None:
    """Print a result; a reader that has gone away is no error."""
    text = json.dumps(json_safe(result.data), allow_nan=False) if as_json else result.text
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python would try to flush again at its exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows under the names of their columns, numbers to the right; on a terminal, cells fold to fit its width."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return ""
    found = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style=None)
    for name in rows[0]:
        numbers = all(row.get(name) is None or isinstance(row.get(name), (int, float)) for row in rows)
        found.add_column(Text(name), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        found.add_row(*(Text(shown(row.get(name))) for name in rows[0]))
    on_terminal = sys.__stdout__ is not None and sys.__stdout__.isatty()
    width = shutil.get_terminal_size().columns if on_terminal else _UNLIMITED
    written = StringIO()
    Console(file=written, width=width, color_system=None, force_terminal=False).print(found)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines())


def shown(value: Any) -> str:
    """A value for people: four significant digits, thousands apart, a dash for nothing."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


@contextmanager
def all_else_to_stderr(level: int) -> Iterator[None]:
    """Within it, what libraries print goes to stderr, and so do log lines and warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line())
    if level > logging.DEBUG:
        # A dozen lines on each attempt to reach a server; the error says it once.
        handler.addFilter(lambda record: not record.name.startswith("huggingface_hub.utils._http"))
    root, own = logging.getLogger(), logging.getLogger("saelens_ext")
    before = own.level
    root.addHandler(handler)
    own.setLevel(level)
    show = warnings.showwarning
    warnings.showwarning = _show_warning
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        root.removeHandler(handler)
        own.setLevel(before)
        warnings.showwarning = show


class _Line(logging.Formatter):
    """One line for each record; what it is only where it is more than information."""

    def format(self, record: logging.LogRecord) -> str:
        kind = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return f"{PROGRAM}: {kind}{' '.join(record.getMessage().split())}"


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Warnings for users, and none about the code of libraries."""
    if not issubclass(category, (DeprecationWarning, FutureWarning, PendingDeprecationWarning)):
        print(f"{PROGRAM}: warning: {' '.join(str(message).split())}", file=sys.stderr)


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table whose texts may hold anything.

    Texts are quoted, since an unquoted carriage return ends a row for many readers. NUL and lone surrogates, which no
    CSV file can hold, become U+FFFD.
    """

    def clean(value: Any) -> Any:
        return _NOT_IN_CSV.sub("\ufffd", value) if isinstance(value, str) else value

    texts = table.select_dtypes(include=["object", "string"]).columns
    columns = {name: table[name].map(clean) for name in texts}
    table.assign(**columns).to_csv(path, index=False, quoting=csv.QUOTE_NONNUMERIC)
