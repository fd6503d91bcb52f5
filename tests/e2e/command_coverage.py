"""Coverage of lattice-tracker's own command table: every command, option, format, success and failure."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import click

__all__ = ["Ran", "commands_of", "gaps", "ran"]


@dataclass(frozen=True)
class Ran:
    """One command line that was run: its command's words, the names of its parameters, its exit code."""

    path: str
    given: frozenset[str]
    exit_code: int

    @property
    def format(self) -> str:
        """The output format: for people, for programs, or minimal."""
        if self.given & {"output_json", "as_json"}:
            return " with --json"
        return " with --quiet" if "quiet" in self.given else ""


def commands_of(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """Yield every command that can be run in a group and its subgroups."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands_of(command, (*words, name))
        if not isinstance(command, click.Group) or command.invoke_without_command:
            yield " ".join((*words, name)), command


def ran(cli: click.Group, line: Sequence[str], exit_code: int) -> Ran | None:
    """Parse a line as Click does; return None if it runs no command (usage error or help)."""
    command: click.Command = cli
    words: list[str] = []
    rest = list(line)
    while isinstance(command, click.Group):
        if not rest or rest[0] not in command.commands:
            return None
        words.append(rest[0])
        command = command.commands[rest.pop(0)]
    if exit_code == click.UsageError.exit_code:
        return None
    _, _, order = command.make_parser(click.Context(command)).parse_args(rest)
    given = frozenset(parameter.name or "" for parameter in order)
    return None if "help" in given else Ran(" ".join(words), given, exit_code)


def gaps(cli: click.Group, all_ran: Collection[Ran], exceptions: Collection[str]) -> list[str]:
    """Return entries neither run nor excepted, and exceptions that match nothing."""
    missing = {gap for path, command in commands_of(cli) for gap in _gaps_of(path, command, all_ran)}
    excepted = {gap for gap in missing if gap in exceptions or gap.partition(":")[0] in exceptions}
    idle = {f"the exception {name!r} is of no use" for name in exceptions if not _excepts(name, excepted)}
    return sorted(missing - excepted) + sorted(idle)


def _excepts(name: str, excepted: Collection[str]) -> bool:
    return any(gap == name or gap.partition(":")[0] == name for gap in excepted)


def _gaps_of(path: str, command: click.Command, all_ran: Collection[Ran]) -> Iterator[str]:
    mine = [one for one in all_ran if one.path == path]
    names = {parameter.name for parameter in command.params}
    succeeded = {one.format for one in mine if one.exit_code == 0}
    failed = {one.format for one in mine if one.exit_code != 0}
    has_json = bool(names & {"output_json", "as_json"})
    wanted = ["", *([" with --json"] if has_json else []), *([" with --quiet"] if "quiet" in names else [])]
    yield from (f"{path}: succeeds{form}" for form in wanted if form not in succeeded)
    yield from (f"{path}: fails{form}" for form in wanted if form != " with --quiet" and form not in failed)
    given = frozenset[str]().union(*(one.given for one in mine))
    yield from (f"{path}: option {name}" for name in names if name not in given)
