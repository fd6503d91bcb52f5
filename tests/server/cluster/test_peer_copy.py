"""A project copied from a node in use to another node, over real sockets, while commands run."""

import asyncio
import contextlib
import os
import random
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from harness import Running, serving, until
from nodes import SECRET, CopyProcess, Requester, command, serve_cluster
from random_commands import command_lines
from worker_process import ANA, WorkerProcess, make_project, tree_of

from lattice_remote.errors import ConnectionFailed, ProtocolError, RemoteError
from lattice_remote.protocol.messages import Bye, Position
from lattice_remote.protocol.operations import digest_of
from lattice_remote.server.cluster import peer_copy
from lattice_remote.server.cluster.peer_access import PeerAccess
from lattice_remote.server.cluster.peer_copy import copy_from, finish_copies
from lattice_remote.server.config import Config, JournalSettings
from lattice_remote.server.datadir import DataDir, ProjectPaths
from lattice_remote.server.ipc import RunCommand
from lattice_remote.server.maintenance.fsck import fsck
from lattice_remote.server.project.project import Project
from lattice_remote.server.project.worker_process import WORKER_COMMAND
from lattice_remote.server.tokens import TokenFile

ACCESS = PeerAccess("b", SECRET)
Digests = dict[str, bytes]


def digests(lattice: Path) -> Digests:
    return {path: digest_of(data) for path, data in tree_of(lattice).items()}


@dataclass(eq=False)
class Source:
    """A node with a project in use, and the digests of its files at each number."""

    running: Running
    project: Project
    at: dict[int, Digests] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.change_committed(self.project.history.head, b"")
        self.project.history.join(self)

    def change_committed(self, seq: int, frame: bytes) -> None:
        del frame
        self.at[seq] = {path: digest for path, (_, digest) in self.project.history.files.items()}

    def end(self, bye: Bye) -> None: ...

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.running.port}"

    async def copy(self, data: DataDir) -> Position:
        return await copy_from(self.url, "web", data.project("web"), ACCESS)

    async def run(self, *argv: str, holder: str = "t") -> None:
        await self._run(command(*argv, holder=holder))

    async def _run(self, request: RunCommand) -> None:
        client = Requester(request.token_id)
        self.project.submit(request, client)
        await until(lambda: client.answers)

    @contextlib.asynccontextmanager
    async def writing(self, seed: int) -> AsyncIterator[None]:
        """Run commands all the time, for three clients."""

        async def write(number: int) -> None:
            rng = random.Random(seed * 10 + number)
            while True:
                lines = command_lines(rng, 1000, self.project.paths.lattice)
                # It reads files that other clients' commands move and replace, so it restarts when one changes.
                with contextlib.suppress(OSError, ValueError, IndexError):
                    while True:
                        argv, files = next(lines)
                        await self._run(msgspec.structs.replace(command(*argv, holder=f"t{number}"), files=files))

        tasks = [asyncio.create_task(write(number)) for number in range(3)]
        try:
            yield
            assert [task.exception() for task in tasks if task.done()] == []
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
async def source(tmp_path: Path) -> AsyncIterator[Source]:
    data, token = _data(tmp_path / "a")
    make_project(data.project("web").root)
    settings = JournalSettings(segment_bytes=64 * 1024)
    async with serving(data, token, worker=WORKER_COMMAND, config=Config(journal=settings)) as running:
        serve_cluster(running.registry)
        project = running.registry.project("web")
        await project.opened()
        source = Source(running, project)
        await source.run("create", "The first", *ANA)
        yield source


def _data(path: Path) -> tuple[DataDir, str]:
    data = DataDir(path)
    data.create()
    _, text = TokenFile(data.tokens).create(projects=["web"], actor="human:ana", act_as=["agent:*"])
    return data, text


def _is_continued(data: DataDir, position: Position) -> None:
    """Check that a worker continues a copy: the same epoch and number, and nothing to repair."""
    with WorkerProcess(data.project("web").root) as worker:
        ready = worker.ready
        assert (ready.epoch, ready.head, ready.mark) == (position.epoch, position.seq, position.mark), ready.notes
        assert ready.notes == []
        assert "No issues found" in worker.ok("doctor")


async def test_a_copy_under_load_is_the_project_at_its_number(source: Source, tmp_path: Path) -> None:
    data, _ = _data(tmp_path / "b")
    async with source.writing(seed=1):
        await until(lambda: source.project.history.head > 30)
        position = await source.copy(data)
        await until(lambda: source.project.history.head > position.seq)
        assert digests(data.project("web").lattice) == source.at[position.seq]
        # The same again: only the differences are sent.
        await until(lambda: source.project.history.head > position.seq + 15)
        position = await source.copy(data)
        assert digests(data.project("web").lattice) == source.at[position.seq]
    report = await asyncio.to_thread(fsck, data, ["web"], repair=False)
    assert [found.line() for found in report.findings] == []
    await asyncio.to_thread(_is_continued, data, position)


async def test_only_differing_files_are_sent(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = _data(tmp_path / "b")
    await source.copy(data)
    sent: list[str] = []
    push = peer_copy._Sender.push

    def noting(sender: peer_copy._Sender, message: object) -> None:
        if isinstance(message, peer_copy._Pieces):
            sent.extend(piece.path for piece in message.pieces if piece.place == "tree")
        push(sender, message)  # type: ignore[arg-type] # as it came

    monkeypatch.setattr(peer_copy._Sender, "push", noting)
    before = digests(data.project("web").lattice)
    altered = data.project("web").lattice / "config.json"
    altered.write_bytes(altered.read_bytes() + b"\n")
    (data.project("web").lattice / "notes" / "extra.md").write_text("not in the project")
    await source.copy(data)
    assert sent == ["config.json"]
    assert digests(data.project("web").lattice) == before


async def test_a_large_file_arrives_whole(source: Source, tmp_path: Path) -> None:
    data, _ = _data(tmp_path / "b")
    large = source.project.paths.lattice / "artifacts" / "payload" / "large.bin"
    large.write_bytes(random.Random(1).randbytes(20 * 1024 * 1024 + 1))
    source.project.files_touched(None)
    await until(lambda: "artifacts/payload/large.bin" in source.project.history.files)
    position = await source.copy(data)
    assert digests(data.project("web").lattice) == source.at[position.seq]


async def test_small_files_are_sent_together(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = _data(tmp_path / "b")
    for number in range(300):
        (source.project.paths.lattice / "notes" / f"{number}.md").write_text("x" * 100)
    source.project.files_touched(None)
    await until(lambda: len(source.project.history.files) > 300)
    sent: list[object] = []
    push = peer_copy._Sender.push
    monkeypatch.setattr(peer_copy._Sender, "push", lambda sender, one: (sent.append(one), push(sender, one)))
    position = await source.copy(data)
    assert digests(data.project("web").lattice) == source.at[position.seq]
    assert len(sent) < 10


class Crash(BaseException):
    """The end of the process."""


async def test_a_crash_at_any_step_leaves_the_old_project_or_the_copy(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = _data(tmp_path / "b")
    await source.copy(data)
    old = digests(data.project("web").lattice)
    await source.run("create", "The second", *ANA)
    new = source.at[source.project.history.head]
    outcomes: list[bool] = []
    for step in range(1, 50):
        _restore(data, tmp_path / "kept")
        calls = 0

        def crash_or(call: Callable[..., object], *args: object, step: int = step, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == step:
                raise Crash
            return call(*args, **options)

        with monkeypatch.context() as patched:
            for module, name in ((os, "rename"), (os, "replace"), (os, "sync"), (shutil, "rmtree")):
                real = getattr(module, name)
                patched.setattr(module, name, lambda *a, real=real, **o: crash_or(real, *a, **o))
            try:
                await source.copy(data)
            except Crash:
                pass
            else:
                break
        finish_copies(data.projects)
        found = digests(data.project("web").lattice)
        assert found in (old, new)
        outcomes.append(found == new)
        assert not (data.project("web").root / "copied").exists()
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {False, True}


def _restore(data: DataDir, kept: Path) -> None:
    """Restore the first state of the copy."""
    if not kept.exists():
        shutil.copytree(data.projects, kept)
    shutil.rmtree(data.projects)
    shutil.copytree(kept, data.projects)


async def test_a_killed_receiver_continues_its_copy(source: Source, tmp_path: Path) -> None:
    data, _ = _data(tmp_path / "b")
    for name in ("a", "b", "c"):
        large = source.project.paths.lattice / "artifacts" / "payload" / f"{name}.bin"
        large.write_bytes(random.Random(name).randbytes(12 * 1024 * 1024))
    source.project.files_touched(None)
    await until(lambda: "artifacts/payload/c.bin" in source.project.history.files)
    with CopyProcess(source.url, data) as receiver:
        collected = data.project("web").root / "copying" / ".lattice" / "artifacts" / "payload"
        await until(lambda: collected.is_dir() and len(list(collected.iterdir())) >= 2)
        receiver.kill()
    assert not data.has_project("web")
    position = await source.copy(data)
    assert digests(data.project("web").lattice) == source.at[position.seq]
    assert not (data.project("web").root / "copying").exists()


@pytest.mark.parametrize(
    ("place", "path"),
    [
        ("tree", "../outside"),
        ("tree", ".remote/x"),
        ("tree", "locks/x"),
        ("journal", "../../outside"),
        ("journal", "lost"),
        ("project", "tokens.json"),
    ],
)
def test_a_file_outside_the_project_is_refused(tmp_path: Path, place: str, path: str) -> None:
    receiver = peer_copy._Receiver(ProjectPaths(tmp_path / "web"))
    receiver.prepare()
    end = peer_copy._End(digest_of(b"x"), 0, 0o644)
    with pytest.raises(ProtocolError):
        receiver.take(peer_copy._Pieces([peer_copy._Piece(place, path, 0, b"x", end)]))  # type: ignore[arg-type] # one
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == []


def test_a_piece_with_another_digest_is_refused(tmp_path: Path) -> None:
    receiver = peer_copy._Receiver(ProjectPaths(tmp_path / "web"))
    receiver.prepare()
    with pytest.raises(ProtocolError, match="digest"):
        end = peer_copy._End(digest_of(b"y"), 0, 0o644)
        receiver.take(peer_copy._Pieces([peer_copy._Piece("tree", "notes/a.md", 0, b"x", end)]))
    receiver.close()


async def test_a_lost_connection_or_an_unknown_project_changes_nothing(source: Source, tmp_path: Path) -> None:
    data, _ = _data(tmp_path / "b")
    await source.copy(data)
    before = digests(data.project("web").lattice)
    with pytest.raises(RemoteError, match="does not have it"):
        await copy_from(source.url, "other", data.project("web"), ACCESS)
    with pytest.raises(ConnectionFailed):
        await copy_from("http://127.0.0.1:1", "web", data.project("web"), ACCESS)
    assert digests(data.project("web").lattice) == before
