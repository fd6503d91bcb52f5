"""Large files between real processes: transfers cut or killed midway resume, in both directions."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from faultproxy import FaultProxy
from preloaded_programs import warm
from sandbox import Client, Sandbox, Server, differences, wait_for

pytestmark = pytest.mark.e2e

MIB = 1 << 20
SIZE = 8 * MIB
ANA = ("--actor", "human:ana")


@dataclass
class Place:
    """One server, and two machines that connect through a proxy each."""

    server: Server
    ana: Client
    to_ana: FaultProxy
    ben: Client
    to_ben: FaultProxy

    @property
    def uploads(self) -> Path:
        return self.server.data / "projects/board/uploads"

    def payloads(self, client: Client | None = None) -> set[str]:
        directory = self.server.lattice_dir() if client is None else client.lattice_dir
        return {path.name for path in (directory / "artifacts/payload").iterdir()}

    def file(self, size: int = SIZE, name: str = "big.bin") -> Path:
        path = self.ana.dir / name
        path.write_bytes(os.urandom(size))
        return path

    def part(self, directory: Path) -> int:
        """Return the size of the largest file in the directory: the progress of a transfer."""
        return max((path.stat().st_size for path in directory.glob("*")), default=0)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with Sandbox(warm()) as sandbox:
        server = sandbox.started_server()
        with FaultProxy(server.port) as to_ana, FaultProxy(server.port) as to_ben:
            clients = []
            for person, proxy in (("ana", to_ana), ("ben", to_ben)):
                client = sandbox.client(person)
                token = server.token(f"human:{person}")
                client.ok("remote", "add", "origin", proxy.url, "--project", "board", "--token", token)
                clients.append(client)
            ana, ben = clients
            ana.ok("create", "One", *ANA)
            ben.ok("remote", "config", "payloads", "on-demand")
            yield Place(server, ana, to_ana, ben, to_ben)
            sandbox.end()


@pytest.fixture(autouse=True)
def calm(place: Place) -> Iterator[None]:
    """Reset the network after each test."""
    yield
    for proxy in (place.to_ana, place.to_ben):
        proxy.flow()


def artifacts(client: Client) -> list[str]:
    found = json.loads(client.ok("show", "LAT-1", "--json"))["data"]["evidence_refs"]
    return [one["id"] for one in found if one["source_type"] == "artifact"]


def agent_pid(client: Client) -> int:
    return int(json.loads(client.ok("remote", "status", "--json"))["data"]["agent"]["pid"])


def attach(place: Place, path: Path) -> str:
    return place.ana.ok("attach", "LAT-1", str(path), *ANA, "--quiet").strip()


def test_a_hundred_megabytes_are_attached_and_available_locally_at_once(place: Place) -> None:
    """They delay no command of another client."""
    path = place.ana.dir / "hundred.bin"
    path.write_bytes(os.urandom(MIB) * 100)
    artifact = attach(place, path)
    payload = place.ana.lattice_dir / f"artifacts/payload/{artifact}.bin"
    assert payload.read_bytes() == path.read_bytes(), "on the machine that has attached it"
    assert place.to_ana.to_clients < 20 * MIB, "which did not download it"
    assert not differences(place.server.lattice_dir(), place.ana.lattice_dir)
    assert not list(place.uploads.iterdir())
    place.ben.ok("comment", "LAT-1", "small", "--actor", "human:ben")
    status = json.loads(place.ben.ok("remote", "status", "--json"))["data"]
    assert status["current"] and status["payloads"]["deferred"] == 1
    assert status["payloads"]["deferred_bytes"] == 100 * MIB
    verified = json.loads(place.ben.ok("remote", "verify", "--json"))["data"]
    assert verified["equal"] and verified["deferred"] == [f"artifacts/payload/{artifact}.bin"]
    assert "hundred.bin" in place.ben.ok("show", "LAT-1"), "what is told of it is here"
    payload.unlink()
    path.unlink()


def test_one_byte_over_the_limit_is_refused_before_anything_is_sent(place: Place) -> None:
    path = place.ana.dir / "over.bin"
    with path.open("wb") as file:
        file.truncate(100 * MIB + 1)
    before = place.to_ana.to_server
    done = place.ana.run("attach", "LAT-1", str(path), *ANA, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == "REMOTE_TOO_LARGE"
    assert "attachment_bytes" in json.loads(done.stdout)["error"]["message"]
    assert place.to_ana.to_server - before < MIB


def test_an_upload_that_is_cut_repeatedly_resumes(place: Place) -> None:
    path, before = place.file(), place.to_ana.to_server
    known = set(artifacts(place.ana))
    place.to_ana.cut_after(3 * MIB)
    attaching = place.ana.popen("attach", "LAT-1", str(path), *ANA)
    wait_for(lambda: place.to_ana.to_server - before > 3 * MIB - 64 * 1024, "the first cut")
    place.to_ana.cut_after(3 * MIB)
    out, err = attaching.communicate(timeout=60)
    assert attaching.returncode == 0, out + err
    [artifact] = set(artifacts(place.ana)) - known
    assert (place.server.lattice_dir() / f"artifacts/payload/{artifact}.bin").read_bytes() == path.read_bytes()
    assert place.to_ana.to_server - before < 1.9 * SIZE, "not from the beginning each time"


@pytest.mark.parametrize("victim", ["agent", "server", "worker"])
def test_an_upload_takes_effect_once_after_a_kill_of_either_side(place: Place, victim: str) -> None:
    """I6."""
    path, before = place.file(), place.to_ana.to_server
    known = set(artifacts(place.ana))
    agent = agent_pid(place.ana)
    place.to_ana.delay(0.003)
    attaching = place.ana.popen("attach", "LAT-1", str(path), *ANA)
    wait_for(lambda: place.part(place.uploads) > 2 * MIB, "a part of it to be there")
    if victim == "agent":
        os.kill(agent, signal.SIGKILL)
    elif victim == "server":
        place.server.kill()
        place.server.start()
    else:
        for pid in place.server.worker_pids():
            os.kill(pid, signal.SIGKILL)
    place.to_ana.delay(0)
    out, err = attaching.communicate(timeout=60)
    assert attaching.returncode == 0, out + err
    [artifact] = set(artifacts(place.ana)) - known
    assert (place.server.lattice_dir() / f"artifacts/payload/{artifact}.bin").read_bytes() == path.read_bytes()
    assert place.to_ana.to_server - before < 1.6 * SIZE, "what was there is not sent again"
    wait_for(lambda: not list(place.uploads.iterdir()), "nothing to be left over")


def test_an_interrupted_upload_leaves_nothing_and_the_next_resumes(place: Place) -> None:
    path, known = place.file(), artifacts(place.ana)
    place.to_ana.delay(0.003)
    attaching = place.ana.popen("attach", "LAT-1", str(path), *ANA)
    wait_for(lambda: place.part(place.uploads) > 2 * MIB, "a part of it to be there")
    attaching.send_signal(signal.SIGINT)
    attaching.communicate(timeout=30)
    assert attaching.returncode != 0
    place.to_ana.delay(0)
    assert artifacts(place.ana) == known
    before = place.to_ana.to_server
    attach(place, path)
    assert place.to_ana.to_server - before < 0.8 * SIZE
    assert len(artifacts(place.ana)) == len(known) + 1


@pytest.mark.parametrize("how", ["cut", "agent", "server"])
def test_a_download_resumes_where_it_stopped(place: Place, how: str) -> None:
    artifact = attach(place, place.file())
    path = f"artifacts/payload/{artifact}.bin"
    wait_for((place.ben.lattice_dir / f"artifacts/meta/{artifact}.json").exists, "ben to know of it")
    agent, before = agent_pid(place.ben), place.to_ben.to_clients
    if how == "cut":
        place.to_ben.cut_after(4 * MIB)
    else:
        place.to_ben.delay(0.003)
    fetching = place.ben.popen("remote", "fetch", path)
    if how != "cut":
        wait_for(lambda: place.part(place.ben.lattice_dir / ".remote/downloads") > 2 * MIB, "a part of it to be here")
        if how == "agent":
            os.kill(agent, signal.SIGKILL)
        else:
            place.server.kill()
            place.server.start()
        place.to_ben.delay(0)
    fetching.communicate(timeout=60)
    if fetching.returncode:  # it may report a lost connection; the next one resumes
        place.ben.ok("remote", "pull")
        place.ben.ok("remote", "fetch", artifact)
    assert (place.ben.lattice_dir / path).read_bytes() == (place.server.lattice_dir() / path).read_bytes()
    assert place.to_ben.to_clients - before < 1.6 * SIZE
    assert place.part(place.ben.lattice_dir / ".remote/downloads") == 0


def test_a_task_is_fetched_completely_and_a_repeated_fetch_transfers_nothing(place: Place) -> None:
    place.ben.ok("remote", "pull")
    place.ben.ok("remote", "fetch", "LAT-1")
    assert "everything is here" in place.ben.ok("remote", "fetch")
    assert "large files:    all here" in place.ben.ok("remote", "status")
    assert not differences(place.server.lattice_dir(), place.ben.lattice_dir)


def test_files_arrive_in_the_background_while_commands_run(place: Place) -> None:
    place.ben.ok("remote", "config", "payloads", "background")
    try:
        artifact = attach(place, place.file())
        place.ben.ok("comment", "LAT-1", "beside it", "--actor", "human:ben")
        arrived = place.ben.lattice_dir / f"artifacts/payload/{artifact}.bin"
        wait_for(arrived.exists, "it to come by itself")
        assert not differences(place.server.lattice_dir(), place.ben.lattice_dir)
        arrived.write_bytes(b"not by the server")
        wait_for(lambda: not differences(place.server.lattice_dir(), place.ben.lattice_dir), "it to be mended")
    finally:
        place.ben.ok("remote", "config", "payloads", "on-demand")


def test_a_comment_may_come_from_a_large_file_or_a_pipe(place: Place) -> None:
    text = "word " * (3 * MIB // 5)
    path = place.ana.dir / "long.txt"
    path.write_text(text)
    place.ana.ok("comment", "LAT-1", "--file", str(path), *ANA, "--quiet")
    place.ana.ok("comment", "LAT-1", "--file", "/dev/stdin", *ANA, "--quiet", stdin=text)
    assert place.ana.ok("comments", "LAT-1").count(text.strip()) == 2
    assert not differences(place.server.lattice_dir(), place.ana.lattice_dir)


def test_transfers_work_without_the_background_process(place: Place) -> None:
    path = place.file()
    done = place.ana.run("attach", "LAT-1", str(path), *ANA, "--quiet", env={"LATTICE_REMOTE_AGENT": "off"})
    assert done.returncode == 0, done.stderr
    payload = place.ana.lattice_dir / f"artifacts/payload/{done.stdout.strip()}.bin"
    assert payload.read_bytes() == path.read_bytes()
    fetched = place.ben.run("remote", "fetch", env={"LATTICE_REMOTE_AGENT": "off"})
    assert fetched.returncode == 0, fetched.stderr
    wait_for(lambda: not differences(place.server.lattice_dir(), place.ben.lattice_dir), "ben to have all of it")


def test_a_broken_file_on_the_server_is_reported_and_reaches_no_client(place: Place) -> None:
    artifact = attach(place, place.file())
    path = f"artifacts/payload/{artifact}.bin"
    truth = place.server.lattice_dir() / path
    good, status = truth.read_bytes(), truth.stat()
    with truth.open("r+b") as file:  # as a failing disk does: time and size are unchanged
        file.seek(SIZE // 2)
        file.write(b"\xff" * 100 if good[SIZE // 2 : SIZE // 2 + 100] != b"\xff" * 100 else bytes(100))
    os.utime(truth, ns=(status.st_atime_ns, status.st_mtime_ns))
    (place.server.lattice_dir() / "context.md").write_text("# Changed after it\n")
    changed = place.ben.lattice_dir / "context.md"  # the server has checked both, and found one by its times
    wait_for(lambda: changed.exists() and changed.read_text() == "# Changed after it\n", "the server to have looked")
    place.ben.ok("remote", "pull")
    failed = place.ben.run("remote", "fetch", artifact)
    assert failed.returncode == 1 and "its disk may be damaged" in failed.stderr
    assert not (place.ben.lattice_dir / path).exists()
    place.ben.ok("comment", "LAT-1", "goes on", "--actor", "human:ben")
    truth.write_bytes(good)
    place.ben.ok("remote", "pull")
    wait_for(lambda: place.ben.run("remote", "fetch", artifact).returncode == 0, "it to be whole again")
    assert (place.ben.lattice_dir / path).read_bytes() == good
