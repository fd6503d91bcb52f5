"""What a change says of how it came about: one bounded line for people, without secrets.

The content of attached files is no part of a command line. What can be in one, and would give somebody access, is
struck out: tokens of this server, and passwords in addresses.
"""

import shlex
from collections.abc import Collection, Sequence

import click

from lattice_remote.server.data.masking import masked

__all__ = ["command_words", "describe_call", "describe_command", "describe_edit", "describe_paths"]

MAX_CHARS = 200
_MAX_PATHS = 5
_LOOKED_AT_CHARS = 8 * MAX_CHARS


def describe_command(argv: Sequence[str]) -> str:
    """Return a command line as it could be typed, cut to ``MAX_CHARS``."""
    line = ""
    for argument in argv:
        line += (" " if line else "") + shlex.quote(argument[:_LOOKED_AT_CHARS])
        if len(line) > _LOOKED_AT_CHARS:  # an argument may have a megabyte; what is cut off need not be looked at
            break
    return _cut(masked(line[:_LOOKED_AT_CHARS]))


def command_words(cli: click.Group, argv: Sequence[str]) -> str:
    """Return the words of the command that a line begins with, as ``resource acquire``: no option and no value."""
    words: list[str] = []
    command: click.Command | None = cli
    for word in argv:
        command = command.commands.get(word) if isinstance(command, click.Group) else None
        if command is None:
            break
        words.append(word)
    return " ".join(words)


def describe_call(label: str) -> str:
    """Return what is said of an operation of a surface."""
    return _cut(masked(label))


def describe_edit(path: str) -> str:
    """Return what is said of a plan or notes that a client has sent."""
    return f"edit {path}"


def describe_paths(paths: Collection[str]) -> str:
    """Return what is said of files that were found changed: the first of them, and how many there are."""
    shown = ", ".join(list(paths)[:_MAX_PATHS])
    more = len(paths) - _MAX_PATHS
    if more <= 0:
        return _cut(f"changed {shown}")
    tail = f", and {more} more"
    return f"changed {shown}"[: MAX_CHARS - len(tail)] + tail


def _cut(line: str) -> str:
    return line if len(line) <= MAX_CHARS else line[: MAX_CHARS - 1] + "…"
