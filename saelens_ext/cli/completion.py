"""Completion of commands and options in a shell."""

import argparse

import shtab

from saelens_ext.cli.commands import COMMANDS
from saelens_ext.cli.output import PROGRAM
from saelens_ext.cli.parser import parser_of

SHELLS = tuple(shtab.SUPPORTED_SHELLS)
_PLACES = {"FILE": shtab.FILE, "FOLDER": shtab.DIRECTORY, "PATH": shtab.FILE}


def completion(shell: str) -> str:
    """A script for the shell, which completes what the parsers of all commands know."""
    program = argparse.ArgumentParser(PROGRAM)
    program.add_argument("--version", action="store_true", help="show the version")
    commands = program.add_subparsers()
    for command in COMMANDS.values():
        known = parser_of(command)
        known._preprocessing()
        known.format_help()  # hides the options that mean nothing here
        for action in known._actions:
            if place := _PLACES.get(str(action.metavar)):
                vars(action)["complete"] = place
        commands.add_parser(command.name, help=command.summary, parents=[known], add_help=False)
    return shtab.complete(program, shell)
