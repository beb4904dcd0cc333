"""The command ``saelens-ext``: options, output and errors of its subcommands.

Belongs here: turning arguments into one call and its result into lines. Does not: anything that a script would want
too. Light modules (main, commands, errors, options, output, parser) import nothing slow; the others are imported when
their command runs.
"""
