"""The entry: find the command, run it, and say in one line what went wrong."""

import logging
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version

from saelens_ext.cli.commands import COMMANDS, Command
from saelens_ext.cli.errors import UsageError, near, one_line
from saelens_ext.cli.output import PROGRAM, Context, all_else_to_stderr, print_result

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``saelens-ext``, by default with the arguments of the process, and give its exit status.

    0, 1 for a failure, 2 for a command line that is not understood, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = any(argument in ("--debug", "--debug=true") for argument in arguments)
    command, context = _named(arguments), Context()
    if "--version" in arguments[:2]:
        command, arguments = None, ["--version"]
    try:
        return _general(arguments) if command is None else _run(command, arguments, context, debug)
    except SystemExit as ending:  # after --help
        return int(ending.code or 0)
    except KeyboardInterrupt as error:
        said = [str(error), *context.kept] if command is not None else []
        kept = " ".join(sentence for sentence in said if sentence) or (command.kept if command is not None else "")
        return _fail(f"Interrupted. {kept}", INTERRUPTED, debug)
    except UsageError as error:
        return _fail(one_line(error), 2, debug)
    except Exception as error:
        return _fail(one_line(error), 1, debug)


def _named(arguments: Sequence[str]) -> Command | None:
    """The command that the first words name."""
    return next((COMMANDS[name] for n in (2, 1) if (name := " ".join(arguments[:n])) in COMMANDS), None)


def _general(arguments: Sequence[str]) -> int:
    """What is asked of the program itself."""
    from saelens_ext.cli.parser import overview

    first = arguments[0] if arguments else None
    if first in ("-h", "--help", "help"):
        print(overview())
    elif first == "--version":
        print(f"{PROGRAM} {version('saelens-ext')}")
    elif first is not None and first.partition("=")[0] == "--print-completion":
        from saelens_ext.cli.completion import SHELLS, completion

        shell = first.partition("=")[2] or next(iter(arguments[1:]), "")
        if shell not in SHELLS:
            raise UsageError(f"--print-completion takes {' or '.join(SHELLS)}, got {shell!r}.")
        print(completion(shell))
    elif first is None:
        raise UsageError(f"No command was given; there are {', '.join(COMMANDS)}. See {PROGRAM} --help.")
    elif first.startswith("-"):
        raise UsageError(f"The command comes first, before {first}: {PROGRAM} COMMAND [OPTIONS]. See {PROGRAM} --help.")
    else:
        raise UsageError(
            f"There is no command {first}; there are {', '.join(COMMANDS)}.{near(first, COMMANDS)} See {PROGRAM} "
            "--help."
        )
    return 0


def _run(command: Command, arguments: Sequence[str], context: Context, debug: bool) -> int:
    from saelens_ext.cli.parser import parse

    try:
        options, output = parse(command, arguments[len(command.name.split()) :])
    except ValueError as error:
        raise UsageError(one_line(error)) from error
    context.progress = not output.quiet and sys.stderr.isatty()
    with all_else_to_stderr(logging.DEBUG if output.debug else logging.WARNING if output.quiet else logging.INFO):
        from saelens_ext.cli.bars import progress_bars

        with progress_bars(context.progress):
            result = command.function()(*options, context)
    print_result(result, output.json)
    return 0


def _fail(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    kind = "" if status == INTERRUPTED else "error: "
    print(f"{PROGRAM}: {kind}{message.strip()}", file=sys.stderr)
    return status
