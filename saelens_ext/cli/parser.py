"""Command lines made from dataclasses, with a help that can be read and errors of one sentence."""

import argparse
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, NoneType
from typing import Any, NoReturn, cast, get_args, get_type_hints

import simple_parsing
from simple_parsing import ArgumentGenerationMode, NestedMode
from simple_parsing.wrappers.field_metavar import get_metavar

from saelens_ext import _checks
from saelens_ext.cli.commands import COMMANDS, Command
from saelens_ext.cli.config_file import with_config
from saelens_ext.cli.errors import UsageError, near
from saelens_ext.cli.options import OutputOptions
from saelens_ext.cli.output import PROGRAM

_METAVARS = {"bool": "true|false", "str": "TEXT", "int": "N", "float": "X", "float|int": "X", "int|float": "X"}
_IN_WORDS = {"true|false": "true or false", "TEXT": "a text", "N": "a whole number", "X": "a number"}
# SAELens explains few of its own; those that mean nothing here are not shown.
_OF_THE_LOGGER = {
    "log_to_wandb": "Log to Weights & Biases.",
    "log_weights_to_wandb": "Put the weights into the artifact, beside the config.",
    "wandb_project": "Project of the runs.",
    "wandb_entity": "Account or team; by default yours.",
    "run_name": "Name of the run; with several runs, the beginning of their names.",
    "wandb_id": "Id of the run; with several runs, the beginning of their ids.",
    "wandb_log_frequency": "Log every so many times that there are new figures.",
}
_MISSING = object()
_NO_DEFAULT = (None, argparse.SUPPRESS, "", (), [], (None,))


def parse(command: Command, arguments: Sequence[str]) -> tuple[list[Any], OutputOptions]:
    """The option objects of a command, one for each of its classes, and how to print.

    Raises:
        UsageError: an option that is not known, a value that is none, or a place left empty.
        ValueError: what a config refuses.
        SystemExit: after ``--help``.
    """
    parser, kinds = parser_of(command), command.option_classes()
    if command.takes_config:
        arguments = with_config(arguments, kinds)
    found = parser.parse_args(_spelled_out(arguments, [*kinds, OutputOptions]))
    return [getattr(found, f"part_{number}") for number in range(len(kinds))], found.output


def parser_of(command: Command) -> "CommandParser":
    """The parser of a command."""
    parser = CommandParser(
        prog=f"{PROGRAM} {command.name}",
        description=f"{command.summary[0].upper()}{command.summary[1:]}.",
        nested_mode=NestedMode.WITHOUT_ROOT,
        argument_generation_mode=ArgumentGenerationMode.NESTED,
        add_config_path_arg=False,
        allow_abbrev=False,
        formatter_class=_Formatter,
        epilog=f"example:\n  {PROGRAM} {command.example}" + (f"\n\n{command.note}" if command.note else ""),
    )
    for number, kind in enumerate(command.option_classes()):
        parser.add_arguments(kind, dest=f"part_{number}")
        parser.empty_values = {**parser.empty_values, **_empty_values(kind)}
    parser.add_arguments(OutputOptions, dest="output")
    if command.takes_config:
        parser.add_argument("--config", metavar="FILE", help="YAML file of options; those given here override it.")
    return parser


def overview() -> str:
    """The help of the program itself."""
    width = max(map(len, COMMANDS))
    lines = [f"  {command.name.ljust(width)}  {command.summary}" for command in COMMANDS.values()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [OPTIONS]",
            "",
            "Feature dictionaries made from observed activations, as SAELens SAEs: build, inspect, compare and share "
            "them.",
            "",
            "commands:",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help lists the options of a command. Each is written --name=value.",
            "",
            "options:",
            "  -h, --help  show this help",
            "  --version   show the version",
            "  --print-completion=SHELL",
            "              print what makes bash, zsh, fish, … complete commands and options",
            "",
            "of every command:",
            "  --json      print the result as one JSON object",
            "  --quiet     only warnings and errors on stderr",
            "  --debug     show where an error comes from",
            "",
            "Results go to stdout, all else to stderr. Exit status: 0 done, 1 failed, 2 not understood, 130 "
            "interrupted.",
            "",
            "example (without a model hub; SmolLM2-135M-Instruct and Python's documentation):",
            f"  {PROGRAM} exemplars --model_name=demo --dataset_path=demo --hook_name=blocks.15.hook_out "
            "--training_tokens=20000",
        ]
    )


class CommandParser(simple_parsing.ArgumentParser):
    """A parser that raises UsageError with one sentence."""

    empty_values: Mapping[str, Any] = MappingProxyType({})
    """What ``none`` and ``null``, as a sweep agent writes them, mean for the options that may be left empty."""

    def _preprocessing(self, args: Sequence[str] = (), namespace: Any = None) -> None:
        """The parser's own, after which an option that may be left out still needs a value where it is given."""
        super()._preprocessing(args, namespace)
        for action in self._actions:
            if action.type is not None and (empty := self.empty_values.get(_option(action), _MISSING)) is not _MISSING:
                action.metavar, action.type = _metavar(action), _or_empty(action.type, empty)
            if action.nargs == argparse.OPTIONAL and action.option_strings and _metavar(action) != _METAVARS["bool"]:
                action.nargs = None

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with an option, and where its options are explained."""
        if unknown := re.fullmatch(r"unrecognized arguments: (.*)", message, re.DOTALL):
            message = self._unknown(unknown[1])
        stop = "" if message.endswith((".", "?")) else "."
        raise UsageError(f"{message[0].upper()}{message[1:]}{stop} See {self.prog} --help.")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        # argparse names the function that failed; what the option takes says more.
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            takes = _IN_WORDS.get(_metavar(action), _metavar(action))
            raise argparse.ArgumentError(action, f"takes {takes}, got {arg_string!r}") from error

    def format_usage(self) -> str:
        """One line, whatever the number of options."""
        return f"usage: {self._short_usage()}\n"

    def format_help(self) -> str:
        """The help, with the options of each dataclass under a heading of their own."""
        self.usage = self._short_usage()
        for group in self._action_groups:
            _, _, path = (group.title or "").partition(" ['")
            root, _, nested = path.removesuffix("']").partition(".")
            if root:
                group.title = nested or {"output": "output", "part_0": "options"}.get(root, "settings")
        for action in self._actions:
            name = _option(action).partition("--logger.")[2]
            if name:
                action.help = _OF_THE_LOGGER.get(name, argparse.SUPPRESS)
        self._optionals.title, self._optionals.description = "help", None
        self._action_groups.sort(key=lambda group: (group.title == "output") + 2 * (group.title == "help"))
        return super().format_help()

    def _short_usage(self) -> str:
        places = [str(action.metavar) for action in self._actions if not action.option_strings]
        return " ".join([self.prog, *places, "[OPTIONS]"])

    def _unknown(self, rest: str) -> str:
        option = re.match(r"--?[A-Za-z][^\s=]*", rest)
        if option is None:
            return f"{rest!r} is not expected here; options are written --name=value."
        names = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        return f"There is no option {option[0]}.{near(option[0], names)}"


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Options with the name and kind of their value, explanations with the default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=120)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return str(action.metavar)
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        return f"{_option(action)} {_metavar(action)}"

    def _get_help_string(self, action: argparse.Action) -> str:
        text = re.sub(r"``|\s*<__TEMP__>|\s*\(default: %\(default\)s\)", "", action.help or "").strip()
        if action.default not in _NO_DEFAULT and action.option_strings:
            text += f" (default: {_written(action.default)})"
        return text.strip().replace("%", "%%")


def _option(action: argparse.Action) -> str:
    """The name of an option that is shown: not that of its negation, not its letter."""
    names = [name for name in action.option_strings if name.startswith("--")]
    return names[0] if names else str(action.metavar)


def _metavar(action: argparse.Action) -> str:
    if action.choices:
        return "|".join(map(str, action.choices))
    found = action.metavar or (get_metavar(cast(type, action.type)) if action.type is not None else "str")
    return _METAVARS.get(str(found).strip("[]"), str(found))


def _written(value: Any) -> str:
    """A default as it would be given."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _spelled_out(arguments: Sequence[str], kinds: Sequence[type]) -> list[str]:
    """``--model-name=x`` as ``--model_name=x``; ``--json``, which else takes the next word, as ``--json=true``."""
    options = [field for kind in kinds for field in dataclasses.fields(kind)]
    switches = {f"--{field.name}" for field in options if field.type in (bool, "bool")}
    found = []
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        name, separator, value = argument.partition("=")
        name = f"--{name[2:].replace('-', '_')}" if name.startswith("--") else name
        given = separator or following.lower() in ("true", "false", "yes", "no")
        found.append(f"{name}=true" if name in switches and not given else f"{name}{separator}{value}")
    return found


def _empty_values(kind: type, prefix: str = "--") -> dict[str, Any]:
    """By option, None where the field may be None, and the empty text where that is the default."""
    hints, found = get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        name, hint = f"{prefix}{field.name}", hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found |= _empty_values(hint, f"{name}.")
        elif NoneType in get_args(hint):
            found[name] = None
        elif field.default == "":
            found[name] = ""
    return found


def _or_empty(convert: Any, empty: Any) -> Callable[[str], Any]:
    """A conversion that also takes the words for None."""
    converted = lambda text: empty if _checks.is_none(text) else convert(text)  # noqa: E731
    return functools.wraps(convert, updated=())(converted)
