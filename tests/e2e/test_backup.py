"""Backups: a copy of the live data directory serves again, and clients resync without help (I2, I7, I12)."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from backups import Copy, Writers, check_copy, copy_in_order, copy_live, resync
from faults import write_over
from sandbox import Client, Sandbox, differences, wait_for
from sse import Listening

pytestmark = pytest.mark.e2e


def test_copies_of_a_busy_server_are_complete_and_clients_resync(sandbox: Sandbox) -> None:
    server = sandbox.started_server()
    token = server.token("human:ana", "agent:*")
    ana = sandbox.client("ana")
    ana.add_remote(server, token)
    with Writers(server.url, token) as writers:
        wait_for(lambda: len(writers.acknowledged) >= 100 or writers.errors, "writes", 60)
        acknowledged = list(writers.acknowledged)
        copies = [Copy(sandbox, server, "rsync", copy_live), Copy(sandbox, server, "other", copy_in_order)]
        copied = len(writers.acknowledged)
        wait_for(lambda: len(writers.acknowledged) > copied or writers.errors, "the server to be ahead of them", 60)
    for copy in copies:
        check_copy(copy, token, acknowledged)
        assert resync(server, copy, token) == 1, copy.log.read_text()
        copy.stop()
    # The same address, as when a backup replaces a lost disk.
    server.stop()
    copies[0].port = server.port
    copies[0].start()
    wait_for(lambda: not differences(ana.lattice_dir, copies[0].lattice_dir()), "ana to have what the copy has", 40)
    copies[0].stop()


def put_copy_in_place(backup: Path, data: Path) -> None:
    shutil.rmtree(data)
    shutil.copytree(backup, data, symlinks=True)


class Restored:
    """A server with five changes, a backup, and three changes that the backup lacks."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.server = server = sandbox.server()
        server.project()
        server.start()
        self.token = server.token("human:ana", "agent:*")
        self.ana, self.ben = (self._client(sandbox, name) for name in ("ana", "ben"))
        for n in range(5):
            self.ana.ok("create", f"Kept {n}", "--actor", "human:ana")
        server.stop()
        self.backup = sandbox.root / "backup"
        shutil.copytree(server.data, self.backup, symlinks=True)
        server.start()
        for n in range(3):
            self.ana.ok("create", f"Lost {n}", "--actor", "human:ana")
        self.ben.ok("list")
        self.epoch, self.position = self.described()

    def _client(self, sandbox: Sandbox, name: str) -> Client:
        client = sandbox.client(name)
        client.add_remote(self.server, self.token)
        return client

    def described(self) -> tuple[str, str]:
        url = f"{self.server.url}/projects/board"
        found = requests.get(url, headers={"Authorization": f"Bearer {self.token}"}, timeout=30).json()
        return found["epoch"], found["position"]

    def restore(self, put_back: Callable[[Path, Path], None], *, new: int) -> None:
        """Restore the backup while no client is connected, then make new changes from a client without a cache."""
        for client in (self.ana, self.ben):
            client.ok("remote", "agent", "stop")
        self.server.stop()
        put_back(self.backup, self.server.data)
        self.server.start()
        headers = {"Authorization": f"Bearer {self.token}"}
        for n in range(new):
            made = requests.post(
                f"{self.server.url}/projects/board/tasks", json={"title": f"New {n}"}, headers=headers, timeout=30
            )
            assert made.status_code == 201, made.text


def rescued(client: Client) -> list[str]:
    entries = json.loads(client.ok("remote", "rescued", "list", "--json"))["data"]["entries"]
    return [path for entry in entries for path in entry["files"]]


@pytest.mark.parametrize("put_back", [put_copy_in_place, write_over])
def test_changes_missing_from_a_restored_server_are_kept_by_clients(
    sandbox: Sandbox, put_back: Callable[[Path, Path], None]
) -> None:
    """I7: the next command names the lost change, and it can be applied even if its ids were reused."""
    at = Restored(sandbox)
    at.ana.ok("comment", "LAT-1", "lost words", "--actor", "human:ana")
    task = json.loads(at.ana.ok("show", "LAT-2", "--json"))["data"]["id"]
    plan = at.ana.lattice_dir / "plans" / f"{task}.md"
    plan.write_text("# Lost lines\n")
    at.ana.ok("remote", "push")
    at.restore(put_back, new=2)
    at.ben.ok("comment", "LAT-1", "said after it", "--actor", "human:ana")  # proves that the log continued differently
    wait_for(lambda: "were rescued" in at.ana.run("list").stderr or rescued(at.ana), "ana to notice")
    said = at.ana.run("list").stderr
    assert "the server was restored to an earlier state that lacks it" in said and "remote rescued" in said, said
    wait_for(lambda: not differences(at.ana.lattice_dir, at.server.lattice_dir()), "ana to have what was restored", 40)
    assert f"plans/{task}.md" in rescued(at.ana)
    shown = at.ana.ok("list")
    assert "New 1" in shown and "Lost 0" not in shown
    applied = at.ana.run("remote", "rescued", "apply", "--all")
    shown = at.ana.ok("list")
    assert all(f"Lost {n}" in shown for n in range(3)) and "New 1" in shown, applied.stdout + applied.stderr
    comments = at.ana.ok("comments", "LAT-1")
    assert "lost words" in comments and "said after it" in comments, applied.stdout + applied.stderr
    place = next((at.ana.lattice_dir / ".remote/rescued").glob(f"*/files/plans/{task}.md"))
    assert place.read_text() == "# Lost lines\n", "the text stays until the user has compared it"
    wait_for(lambda: not differences(at.ben.lattice_dir, at.server.lattice_dir()), "ben to have all of it", 40)


def test_events_missing_from_a_restored_lattice_directory_are_kept_by_clients(sandbox: Sandbox) -> None:
    """I7: the history continues; for clients the server's files lose events in an ordinary change."""
    at = Restored(sandbox)
    at.ana.ok("comment", "LAT-1", "lost words", "--actor", "human:ana")
    at.ana.ok("archive", "LAT-2", "--actor", "human:ana")
    at.server.stop()
    shutil.rmtree(at.server.lattice_dir())
    shutil.copytree(at.backup / "projects/board/.lattice", at.server.lattice_dir())
    at.server.start()
    wait_for(lambda: not differences(at.ana.lattice_dir, at.server.lattice_dir()), "ana to have what was restored")
    said = at.ana.run("list").stderr
    assert "the server was restored to an earlier state that lacks it" in said and "by another program" not in said
    assert sum(path.startswith("events/task_") for path in rescued(at.ana)) == 4, "LAT-1 and the lost tasks"
    applied = at.ana.run("remote", "rescued", "apply", "--all")
    shown = at.ana.ok("list")
    assert all(f"Lost {n}" in shown for n in range(3)), applied.stdout + applied.stderr
    assert "lost words" in at.ana.ok("comments", "LAT-1"), applied.stdout + applied.stderr


def test_a_client_behind_the_backup_keeps_nothing(sandbox: Sandbox) -> None:
    at = Restored(sandbox)
    at.ben.ok("remote", "agent", "stop")
    before = {path.name for path in at.ben.lattice_dir.iterdir()}
    at.server.stop()
    backup = sandbox.root / "later"
    shutil.copytree(at.server.data, backup, symlinks=True)
    at.server.start()
    at.ana.ok("comment", "LAT-1", "in no backup", "--actor", "human:ana")
    at.backup = backup
    at.restore(put_copy_in_place, new=1)
    assert "rescued" not in at.ben.run("list").stderr and not rescued(at.ben)
    assert before == {path.name for path in at.ben.lattice_dir.iterdir()}
    wait_for(lambda: rescued(at.ana), "ana to keep the comment")
    assert "in no backup" in at.ana.ok("remote", "rescued", "show", "1")


@pytest.mark.parametrize("put_back", [put_copy_in_place, write_over])
@pytest.mark.parametrize("first", ["events", "watch", "a cache"])
def test_a_position_in_an_abandoned_history_is_detected(
    sandbox: Sandbox, put_back: Callable[[Path, Path], None], first: str
) -> None:
    """I7: the restored server has passed the number, so only the change id differs."""
    at = Restored(sandbox)
    at.restore(put_back, new=5)
    assert (at.described()[0] == at.epoch) == (put_back is write_over), "a copy is known as such, a snapshot is not"
    if first == "events":
        for _ in range(2):
            with Listening(at.server.port, at.token, "board", last=at.position) as listening:
                [reset] = listening.take(1)
                assert (reset.kind, reset.data["reason"]) == ("reset", "epoch")
                assert (reset.data["epoch"], reset.id) == at.described() and reset.data["epoch"] != at.epoch
    elif first == "watch":
        watch = at.ben.run("remote", "watch", "--since", at.position, "-n", "1")
        assert watch.returncode == 3, watch.stderr
        assert "that change is not in the project's history" in watch.stderr
    at.ben.ok("list")
    wait_for(lambda: not differences(at.ben.lattice_dir, at.server.lattice_dir()), "ben to have what was restored", 40)
    assert at.described()[0] != at.epoch
    shown = at.ben.ok("list")
    assert "New 4" in shown and "Kept 4" in shown and "Lost 0" not in shown
    at.ana.ok("comment", "LAT-1", "goes on", "--actor", "human:ana")
    wait_for(lambda: not differences(at.ana.lattice_dir, at.server.lattice_dir()), "ana to have it too", 40)
