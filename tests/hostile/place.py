"""A place for hostile commands: a data directory with protected neighbours, each with a canary."""

import hashlib
import json
import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

from worker_process import WorkerProcess, make_project

from lattice_remote.server.worker.caller import OWNERS_FILE

__all__ = ["CANARY", "OBSERVED_WORKER", "Place"]

CANARY = "canary-c41e5b0d"
"""Content of every file that no command may access; it must never appear in another place."""
OBSERVED_WORKER = (sys.executable, "-P", "-X", "utf8", str(Path(__file__).with_name("observed_worker.py")))
_LONG_AGO = (1_000_000_000, 1_000_000_001)
"""Access and modification time of the canaries: relatime records a later access."""


@dataclass(frozen=True)
class _Seen:
    mode: int
    size: int
    times: tuple[int, int]
    digest: str


class Place:
    """A data directory below ``root`` with the projects ``web`` (under attack) and ``other``, a home, and a desk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.project = make_project(root / "data/projects/web")
        self.lattice = self.project / ".lattice"
        make_project(root / "data/projects/other")
        self.other_task = "task_01M8173J64RGGH4YR2NPR2ZZZZ"
        canaries = {
            **dict.fromkeys(("data/tokens.json", "data/config.json", "home/.ssh/id", "desk/notes.md"), CANARY),
            "home/.config/lattice/tokens.json": json.dumps({"https://example.org": CANARY}),
            f"data/projects/other/.lattice/tasks/{self.other_task}.json": json.dumps({"title": CANARY}),
            "data/projects/other/.lattice/sessions/Ana-1.json": json.dumps({"name": CANARY}),
            "data/projects/web/config.json": CANARY,
            "desk/click.py": f"raise SystemExit({CANARY!r})",
        }
        for path, content in canaries.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(content)
        self.report = root / "report"
        self.report.write_bytes(b"")
        spelled = f"{root.parent}//{root.name}"  # distinguishes a client's text from the server's own
        self.outside = [f"{spelled}/{path}" for path in canaries] + [f"../../../{path}" for path in canaries]
        self.outside += [
            self.other_task,
            "../../other/.lattice/config",
            f"{spelled}/data/projects/web/.lattice/config.json",
        ]
        self._look()  # sets the times
        self._before = self._look()

    def forget_code(self) -> None:
        """Give the project's tasks short ids only through ``backfill-ids``; call before a worker starts."""
        path = self.lattice / "config.json"
        config = json.loads(path.read_text())
        del config["project_code"]
        path.write_text(json.dumps(config, sort_keys=True, indent=2) + "\n")

    def worker(self, *, unguarded: bool = False) -> WorkerProcess:
        """Start an observed worker in the place's desk and home."""
        return WorkerProcess(
            self.project,
            command=OBSERVED_WORKER,
            environment=self.environment(unguarded=unguarded),
            cwd=self.root / "desk",
        )

    def environment(self, *, unguarded: bool = False) -> dict[str, str]:
        """Return additions to the worker's environment that tempt a command."""
        home = self.root / "home"
        return {
            "HOME": str(home),
            "XDG_CONFIG_HOME": str(home / ".config"),
            "HOSTILE_REPORT": str(self.report),
            "HOSTILE_UNGUARDED": "1" if unguarded else "",
            "LATTICE_TOKEN": CANARY,
            "LATTICE_ACTOR": "human:root",
            "_LATTICE_COMPLETE": "bash_source",
        }

    def check(self) -> None:
        """Fail if anything outside the project was read, written, created or removed since the place was created."""
        told = self.report.read_text()
        assert told == "", f"accesses to what is no command's business:\n{told}"
        after = self._look()
        differing = sorted(
            path for path in self._before.keys() | after.keys() if self._before.get(path) != after.get(path)
        )
        assert not differing, f"changed or read: {differing}"

    def _look(self) -> dict[str, _Seen]:
        """Return everything outside the project's own directories, and reset its times."""
        own = {str(self.project / name) for name in (".lattice", "journal", "tmp", OWNERS_FILE)} | {str(self.report)}
        found: dict[str, _Seen] = {}
        for folder, folders, files in os.walk(self.root):
            folders[:] = [name for name in folders if os.path.join(folder, name) not in own]
            for path in (os.path.join(folder, name) for name in files):
                if path not in own:
                    found[path] = self._look_at(path)
            found[folder] = _Seen(os.lstat(folder).st_mode, 0, (0, 0), "")
        return found

    @staticmethod
    def _look_at(path: str) -> _Seen:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode):
            return _Seen(status.st_mode, 0, (0, 0), "")
        times = int(status.st_atime), int(status.st_mtime)
        with open(path, "rb") as file:
            seen = _Seen(status.st_mode, status.st_size, times, hashlib.sha256(file.read()).hexdigest())
        os.utime(path, _LONG_AGO)
        return seen
