"""Options from a YAML file, as the command line would write them, so that both are checked alike.

simple-parsing's own ``config_path`` sets defaults past the conversion and the checks of options: a misspelt name or a
value of another kind would go unnoticed.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from saelens_ext.cli.errors import UsageError


def with_config(arguments: Sequence[str], kinds: Sequence[type]) -> list[str]:
    """Arguments with ``--config=FILE`` replaced by what the file says and the other arguments do not."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?", const="")
    found, rest = parser.parse_known_args(arguments)
    if found.config is None:
        return list(arguments)
    if not found.config:
        raise UsageError("--config needs a value: --config=FILE.")
    try:
        content = yaml.safe_load(Path(found.config).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"--config={found.config} cannot be read: {error}.") from error
    if not isinstance(content, Mapping):
        raise UsageError(f"--config={found.config} holds {content!r:.60}; a mapping of options to values is expected.")
    given = {argument.partition("=")[0].replace("-", "_") for argument in rest}
    options = [option for kind in kinds for option in _options(content, kind)]
    known = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    options += [(f"--{name}", value) for name, value in content.items() if name not in known]
    return [f"{name}={_written(value)}" for name, value in options if name.replace("-", "_") not in given] + rest


def _options(content: Mapping[Any, Any], kind: type, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(kind)
    for name in (field.name for field in dataclasses.fields(kind) if field.name in content):
        value, hint = content[name], hints[name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            yield from _options(value, hint, f"{prefix}{name}.")
            names = {field.name for field in dataclasses.fields(hint)}
            yield from ((f"{prefix}{name}.{inner}", value[inner]) for inner in value if inner not in names)
        else:
            yield f"{prefix}{name}", value


def _written(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)
