"""A seeded stream of command lines that covers everything a client may run."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from lattice_remote.protocol.messages import Attachment

__all__ = ["command_lines"]

_ACTORS = ("human:ana", "agent:one", "agent:two")
_STATUSES = ("backlog", "in_planning", "planned", "in_progress", "review", "done", "cancelled", "needs_human")


def command_lines(rng: random.Random, count: int, lattice_dir: Path) -> Iterator[tuple[list[str], list[Attachment]]]:
    """Yield ``count`` command lines with the files that they attach; most of them succeed."""
    yield ["create", "The first", "--actor", "human:ana"], []
    for number in range(count - 1):
        yield _one(rng, number, lattice_dir)


def _one(rng: random.Random, number: int, lattice_dir: Path) -> tuple[list[str], list[Attachment]]:
    by = ["--actor", rng.choice(_ACTORS)]
    if sessions := sorted(path.stem for path in (lattice_dir / "sessions").glob("*-*.json")):
        by = rng.choice([by, ["--name", rng.choice(sessions)]])
    form = rng.choice([[], ["--json"], ["--quiet"]])
    known = sorted(json.loads((lattice_dir / "ids.json").read_text())["map"])
    task, other = rng.choice([*known[:8], "LAT-99"]), rng.choice(known)
    comment = _some_comment(rng, lattice_dir)
    resource = rng.choice(["gpu", "db", "été"])
    word = f"word{number} ünïcödé {'x' * rng.choice([1, 10, 3000])}"
    attached = [
        Attachment(2, rng.choice(["a b.txt", "log", "x.tar.gz", "ü.md"]), rng.randbytes(rng.choice([0, 9, 99])))
    ]
    large = [Attachment(2, "large.bin", rng.randbytes(300_000))]
    lines: list[tuple[list[str], list[Attachment]]] = [
        (["create", f"Task {word}", *by, *form], []),
        (["create", f"Task {number}", "--description", word, "--tags", "a,b", *by, *form], []),
        (["update", task, f"title=New {word}", "custom_fields.k=v", *by, *form], []),
        (["status", task, rng.choice(_STATUSES), "--force", "--reason", "so", *by, *form], []),
        (["status", task, rng.choice(_STATUSES), *by, *form], []),
        (["assign", task, rng.choice(_ACTORS), *by, *form], []),
        (["comment", task, word, *by, *form], []),
        (["comment", task, "--file", "given.txt", *by], [Attachment(3, "given.txt", word.encode())]),
        (["comment-edit", task, comment, f"edited {word}", *by, *form], []),
        (["comment-delete", task, comment, *by, *form], []),
        (["react", task, comment, "thumbsup", *by, *form], []),
        (["unreact", task, comment, "thumbsup", *by, *form], []),
        (["complete", task, "--review", f"good {word}", *by, *form], []),
        (["attach", task, "given", *by, *form], attached),
        (["attach", task, "given", *by, *form], large if number % 7 == 0 else attached),
        (["attach", task, "https://example.org/x", "--title", "a page", *by, *form], []),
        (["attach", task, "--inline", word, *by, *form], []),
        (["event", task, "x_seen", "--data", '{"n": 1}', *by, *form], []),
        (["link", task, "blocks", other, *by, *form], []),
        (["unlink", task, "blocks", other, *by, *form], []),
        (["branch-link", task, f"feature/{number}", *by, *form], []),
        (["branch-unlink", task, "feature/1", *by, *form], []),
        (["archive", task, *by, *form], []),
        (["archive", f"{task},{other}", *by, *form], []),
        (["unarchive", task, *by, *form], []),
        (["backfill-ids"], []),
        (["set-project-code", "LAT"], []),
        (["set-subproject-code", "FE" if number % 2 else "BE", "--force"], []) if number % 40 == 39 else (["next"], []),
        (["next", "--claim", *by], []),
        (["next", *by], []),
        (["resource", "create", resource, *by, *form], []),
        (["resource", "acquire", resource, *by, *form], []),
        (["resource", "release", resource, *by, *form], []),
        (["resource", "heartbeat", resource, *by, *form], []),
        (["session", "start", "--name", "Argus", "--model", "m", "--framework", "f"], []),
        (["session", "end", rng.choice(sessions) if sessions else "Argus-1"], []),
        (["doctor", "--fix"], []),
        (["rebuild", "--all"], []),
        (["rebuild", task], []),
        (["show", task], []),
        (["status", "../x", "done", *by], []),
    ]
    return rng.choice(lines)


def _some_comment(rng: random.Random, lattice_dir: Path) -> str:
    ids: list[str] = []
    for log in sorted((lattice_dir / "events").glob("task_*.jsonl"))[:5]:
        ids += [line.split('"id":"')[1][:29] for line in log.read_text().splitlines() if "comment_added" in line]
    return rng.choice(ids) if ids else "ev_none"
