"""Concurrent edits of one line of a plan: both texts must exist afterwards, each once."""

import contextlib
import fcntl
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from sandbox import Client

__all__ = ["Conflict", "conflict_copies_in", "edit_at_once"]

Conflict = tuple[str, str]
"""The two words that were written into the same line."""


def edit_at_once(one: Client, other: Client, words: Conflict, *, but: set[str]) -> str | None:
    """Let both replace the first line of a plan, from the same text; return the plan's name.

    None when there is none in which this is sure: not in ``but``, equal for both, and edited by neither.
    """
    with _locked(one), _locked(other):
        for plan in sorted((one.lattice_dir / "plans").glob("task_*.md")):
            copies = [client.lattice_dir / "plans" / plan.name for client in (one, other)]
            if plan.name not in but and _is_one_text(copies):
                rest = plan.read_text().partition("\n")[2]
                for copy, word in zip(copies, words, strict=True):
                    scratch = copy.with_name(f".{copy.name}.swp")
                    scratch.write_text(f"# {word}\n{rest}")
                    scratch.replace(copy)
                return plan.name
    return None


def _is_one_text(copies: list[Path]) -> bool:
    bases = [copy.parent.parent / ".remote/base/plans" / copy.name for copy in copies]
    try:
        return len({path.read_bytes() for path in (*copies, *bases)}) == 1
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _locked(client: Client) -> Iterator[None]:
    """Keep other processes from storing into a cache."""
    with (client.lattice_dir / ".remote/lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def conflict_copies_in(client: Client) -> list[Counter[str]]:
    """Count the words of each conflict copy of a client."""
    copies = (client.lattice_dir / ".remote/conflicts").glob("*/*.md")
    return [Counter(copy.read_text().split()) for copy in copies]
