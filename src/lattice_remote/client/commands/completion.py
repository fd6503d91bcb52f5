"""What could come next in ``lattice remote ...``: Typer's own answer, for Click's machinery, which asks for it.

The shell asks ``lattice``, which is Click's; the commands below ``remote`` are those of the Click inside Typer.
"""

from collections.abc import Iterator, Sequence

from typer._completion_classes import BashComplete
from typer.main import get_command

from lattice_remote.client.commands.app import app

__all__ = ["completions"]


def completions(before: Sequence[str], incomplete: str) -> Iterator[tuple[str, str, str | None]]:
    """Yield each value that could stand in place of ``incomplete``, its kind in Click's words, and its help."""
    # Which shell's makes no difference: each one only words what all of them find.
    asked = BashComplete(get_command(app), {}, "lattice remote", "_LATTICE_REMOTE_COMPLETE")
    for item in asked.get_completions(list(before), incomplete):
        yield item.value, item.type, item.help
