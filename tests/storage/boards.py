"""Boards for the tests of the storage: sample events, and a check of the project after writes."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

from click.testing import CliRunner
from lattice.cli.main import cli  # type: ignore[import-untyped]
from lattice.core.events import create_event, create_resource_event  # type: ignore[import-untyped]
from lattice.core.ids import generate_resource_id, generate_task_id  # type: ignore[import-untyped]

from lattice_remote.storage.events import Snapshot, StorageBackend, Written
from sandbox import tree_of

ANA = "human:ana"


def event(kind: str, task: Snapshot | str, data: dict[str, Any], **more: Any) -> dict[str, Any]:
    task_id = task if isinstance(task, str) else task["id"]
    made: dict[str, Any] = create_event(kind, task_id, more.pop("actor", ANA), data, **more)
    return made


def of_resource(kind: str, resource: Snapshot | str, data: dict[str, Any], **more: Any) -> dict[str, Any]:
    resource_id = resource if isinstance(resource, str) else resource["id"]
    made: dict[str, Any] = create_resource_event(kind, resource_id, more.pop("actor", ANA), data, **more)
    return made


def beginning(title: str = "A task", **data: Any) -> dict[str, Any]:
    fields = {"title": title, "status": "backlog", "type": "task", "priority": "medium", **data}
    return event("task_created", generate_task_id(), fields)


def made(board: StorageBackend, title: str = "A task", **data: Any) -> Snapshot:
    first = beginning(title, **data)
    written = board.write_task(first["task_id"], [first], None)
    assert isinstance(written, Written), written
    return written.content


def added(board: StorageBackend, task: Snapshot, kind: str, data: dict[str, Any], **more: Any) -> Snapshot:
    written = board.write_task(task["id"], [event(kind, task, data, **more)], task["last_event_id"])
    assert isinstance(written, Written), written
    return written.content


def made_resource(board: StorageBackend, name: str, **data: Any) -> Snapshot:
    fields = {"name": data.pop("called", name), "max_holders": 1, "ttl_seconds": 300, **data}
    first = of_resource("resource_created", generate_resource_id(), fields)
    written = board.write_resource(name, [first], None)
    assert isinstance(written, Written), written
    return written.content


def require_sound(lattice_dir: Path, scratch: Path) -> None:
    """Check that the project passes ``lattice doctor`` and that ``lattice rebuild --all`` reproduces it."""
    root = scratch / "examined"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(lattice_dir, root / ".lattice", ignore=shutil.ignore_patterns("locks", "remote.json"))
    (root / ".lattice" / "locks").mkdir()
    env = {"LATTICE_ROOT": str(root)}
    with mock.patch("lattice.storage.fs.os.fsync"):  # a temporary copy needs no durability
        _require_sound(root, env)


def _require_sound(root: Path, env: dict[str, str]) -> None:
    doctor = CliRunner().invoke(cli, ("doctor", "--json"), env=env)
    assert json.loads(doctor.stdout)["data"]["findings"] == [], doctor.stdout
    before = tree_of(root / ".lattice")
    rebuilt = CliRunner().invoke(cli, ("rebuild", "--all"), env=env)
    assert (rebuilt.exit_code, rebuilt.stderr) == (0, "")
    after = tree_of(root / ".lattice")
    assert {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)} == set()
