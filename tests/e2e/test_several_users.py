"""One directory for several users of a machine, with real user ids: it works, or is refused with the reason."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from programs import program
from sandbox import BIN, Sandbox, Server, differences, wait_for

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
GROUP = 54_000


class User:
    """A user of the machine, by id, who works in one directory, in the mount namespace of a process."""

    def __init__(self, place: "Place", name: str, uid: int, umask: int) -> None:
        self.name, self.uid = name, uid
        self._place, self._umask = place, umask
        home, runtime = (place.sandbox.root / f"{kind}-{name}" for kind in ("home", "run"))
        for directory in (home, runtime):
            directory.mkdir(mode=0o700)
            _as_root("chown", str(uid), str(directory))
        self.env = {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(home),
            "LANG": "C.UTF-8",
            "LATTICE_REMOTE_RUNTIME_DIR": str(runtime),
        }

    def run(self, *argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        inside = f"umask {self._umask:o}; cd {shlex.quote(str(self._place.shared))}; exec {shlex.join(argv)}"
        ids = ("--reuid", str(self.uid), "--regid", str(self.uid), "--groups", str(GROUP))
        variables = (f"{name}={value}" for name, value in self.env.items())
        return subprocess.run(
            [
                *(*_ROOT, "nsenter", "--mount", "--target", str(self._place.pid)),
                *("setpriv", *ids, "--inh-caps=-all", "--bounding-set=-all"),
                *("env", "-i", *variables, "sh", "-c", inside),
            ],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )

    def ok(self, *argv: str, stdin: str = "") -> str:
        done = self.run(*argv, stdin=stdin)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout


class Place(NamedTuple):
    """A server, and a directory of a group of this machine.

    Attributes:
        pid: process whose mount namespace shows the interpreter, which may be below another user's home.
    """

    sandbox: Sandbox
    server: Server
    shared: Path
    pid: int


_ROOT = () if os.geteuid() == 0 else ("sudo", "-n")


def _as_root(*argv: str) -> None:
    subprocess.run([*_ROOT, *argv], check=True)


def _readable() -> str:
    """Return commands that mount the interpreter's files and this checkout over homes that others cannot enter."""
    lines = ["mount --make-rprivate /"]
    for needed in {str(Path(sys.base_prefix).resolve()), str(ROOT)}:
        parents = [parent for parent in reversed(Path(needed).parents) if not parent.stat().st_mode & 0o001]
        if not parents:
            continue
        closed = shlex.quote(str(parents[0]))
        lines += [
            "exec 9<" + shlex.quote(needed),
            f"mount --bind {shlex.quote(needed)} /mnt",
            f"mount -t tmpfs -o mode=755 none {closed}",
            f"mkdir -p {shlex.quote(needed)}",
            f"mount --move /mnt {shlex.quote(needed)}",
            "exec 9<&-",
        ]
    return "\n".join(lines)


@pytest.fixture
def place(sandbox: Sandbox) -> Iterator[Place]:
    for needed in ("setpriv", "unshare", "nsenter", *_ROOT[:1]):
        program(needed)
    sandbox.root.chmod(0o755)
    server = sandbox.started_server()
    shared = sandbox.root / "shared"
    shared.mkdir()
    _as_root("chgrp", str(GROUP), str(shared))
    _as_root("chmod", "2775", str(shared))
    script = f"{_readable()}\necho $$\nexec cat"
    with subprocess.Popen(
        [*_ROOT, "unshare", "--mount", "sh", "-ec", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        yield Place(sandbox, server, shared, int(holder.stdout.readline()))
        holder.communicate()  # close its stdin; it exits at end of file
    _as_root("chown", "-R", str(os.geteuid()), str(sandbox.root))


def _log_in(user: User, server: Server) -> None:
    user.ok("lattice", "remote", "login", server.url, stdin=server.token(f"human:{user.name}") + "\n")


def test_users_of_one_group_work_in_one_cache(place: Place) -> None:
    server, shared = place.server, place.shared
    ana, ben = (User(place, name, uid, 0o002) for name, uid in (("ana", 54_001), ("ben", 54_002)))
    for user in (ana, ben):
        _log_in(user, server)
    ana.ok("lattice", "remote", "add", "origin", f"{server.url}/board")
    for number, user in enumerate((ana, ben, ana, ben), start=1):
        user.ok("lattice", "create", f"Number {number}", "--actor", f"human:{user.name}")
    assert ana.ok("lattice", "list") == ben.ok("lattice", "list") and ana.ok("lattice", "list").count("Number") == 4
    assert differences(shared / ".lattice", server.lattice_dir()) == []
    logged = json.loads(ben.ok("lattice", "remote", "log", "--json"))["data"]["entries"]
    assert {entry["token_actor"] for entry in logged} == {"human:ana", "human:ben"}
    for user in (ana, ben):
        assert "No problems found." in user.ok("lattice", "remote", "doctor")
        assert "equal" in user.ok("lattice", "remote", "verify")
    watches = shared / ".lattice" / ".remote" / "watches"
    assert {path.stat().st_uid for path in watches.iterdir()} == {54_001, 54_002}

    ana.ok("lattice", "remote", "agent", "stop")
    text = "echo 'edited by ben' >> $(ls .lattice/plans/*.md | head -1)"
    ben.ok("sh", "-c", text)
    ben.ok("lattice", "remote", "push")
    wait_for(lambda: any("by ben" in p.read_text() for p in (server.lattice_dir() / "plans").iterdir()), "the edit")
    ben.ok("lattice", "remote", "agent", "stop")
    assert list(watches.iterdir()) == []


def test_a_user_with_read_access_only_is_refused_writes_with_the_reason(place: Place) -> None:
    server = place.server
    ana, ben = (User(place, name, uid, 0o022) for name, uid in (("ana", 54_001), ("ben", 54_002)))
    for user in (ana, ben):
        _log_in(user, server)
    ana.ok("lattice", "remote", "add", "origin", f"{server.url}/board")
    ana.ok("lattice", "create", "One", "--actor", "human:ana")
    read = ben.run("lattice", "list")
    assert "One" in read.stdout and "Permission denied, see lattice remote doctor; showing data from" in read.stderr
    write = ben.run("lattice", "create", "Two", "--actor", "human:ben")
    assert write.returncode == 1 and "Permission denied, see lattice remote doctor; nothing was sent" in write.stderr
    doctor = ben.run("lattice", "remote", "doctor")
    assert doctor.returncode == 1
    assert "belongs to the user with id 54001, and this one (54002) cannot write there" in doctor.stdout
    assert f"lattice remote clone {server.url}/board" in doctor.stdout
    assert ana.ok("lattice", "list").count("One") == 1
    for user in (ana, ben):
        user.ok("lattice", "remote", "agent", "stop")


def test_a_user_without_read_access_gets_one_line(place: Place) -> None:
    server, shared = place.server, place.shared
    ana, eve = (User(place, name, uid, 0o077) for name, uid in (("ana", 54_001), ("eve", 54_003)))
    _log_in(ana, server)
    ana.ok("lattice", "remote", "add", "origin", f"{server.url}/board")
    for argv in (("list",), ("create", "Two", "--actor", "human:eve")):
        refused = eve.run("lattice", *argv)
        assert refused.returncode == 1 and refused.stderr.count("\n") == 1, refused.stderr
        assert f"cannot read {shared}/.lattice: permission denied; see: lattice remote doctor" in refused.stderr
    doctor = eve.run("lattice", "remote", "doctor")
    assert doctor.returncode == 1 and "(54003) cannot read it" in doctor.stdout and "clone" in doctor.stdout
    ana.ok("lattice", "remote", "agent", "stop")
