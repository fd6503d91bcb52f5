"""Local lattice projects with something of everything in them, and packs of them."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from lattice_remote.protocol.bundle import END, MAGIC, head_of
from lattice_remote.protocol.messages import Entry
from preloaded_programs import warm

__all__ = ["ANA", "HOOKS", "add_hooks", "entry_of", "lattice", "pack_of", "sample_project"]

ANA = ("--actor", "human:ana")
_QUIET = ("--no-setup-claude", "--no-setup-agents")
HOOKS = {"on": {"task_created": "touch /nowhere/at/all"}}


def lattice(root: Path, *argv: str, env: Mapping[str, str] | None = None) -> str:
    """Run ``lattice`` in a directory, which must succeed, and return its output."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LATTICE", "PYTHON"))}
    done = warm().run("lattice", argv, cwd=root, env={**kept, **(env or {})})
    assert done.returncode == 0, (argv, done.stdout, done.stderr)
    return done.stdout


def sample_project(root: Path, env: Mapping[str, str] | None = None) -> Path:
    """Make a project with tasks, plans, notes, comments, artifacts, an archive, resources and sessions."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "report.txt").write_bytes(b"measured\n" * 1000)
    for line in (
        ["init", "--project-code", "OWN", "--project-name", "ours", "--no-seed", *_QUIET, *ANA],
        ["create", "Write the parser", *ANA],
        ["create", "Test the parser", *ANA],
        ["create", "Something old", *ANA],
        ["link", "OWN-2", "depends_on", "OWN-1", *ANA],
        ["comment", "OWN-1", "größer 🙂", *ANA],
        ["attach", "OWN-1", "report.txt", *ANA],
        ["resource", "create", "gpu", *ANA],
        ["resource", "acquire", "gpu", *ANA],
        ["session", "start", "--name", "Argus", "--model", "m", "--framework", "f"],
        ["archive", "OWN-3", *ANA],
    ):
        lattice(root, *line, env=env)
    directory = root / ".lattice"
    for plan in sorted((directory / "plans").glob("task_*.md")):
        plan.write_bytes(b"# A plan\r\n\r\nwithout a last line break")
        (directory / "notes" / plan.name).write_bytes("# Notes\n\nschön\n".encode())
    return directory


def add_hooks(directory: Path) -> None:
    """Give a project hooks, which would be shell commands on the server."""
    config = json.loads((directory / "config.json").read_text())
    text = json.dumps({**config, "hooks": HOOKS}, sort_keys=True, indent=2) + "\n"
    (directory / "config.json").write_text(text)


def entry_of(path: str, data: bytes) -> Entry:
    return Entry(path, len(data), hashlib.sha256(data).digest())


def pack_of(files: Mapping[str, bytes]) -> bytes:
    """Return the pack of these files, which may be invalid."""
    body = b"".join(head_of(entry_of(path, files[path])) + files[path] for path in sorted(files))
    return MAGIC + body + END
