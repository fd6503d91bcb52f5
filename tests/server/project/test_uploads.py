"""Uploads through a running server, and the commands that refer to them."""

import asyncio
import hashlib
import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from harness import Copy, Running, make_data, serving, tree_of, until
from lattice.core.config import default_config, serialize_config
from lattice.storage.fs import atomic_write, ensure_lattice_dirs

from lattice_remote.client.connection.upload import Source, upload
from lattice_remote.protocol.messages import (
    Attachment,
    Refused,
    Reply,
    Request,
    Response,
    Run,
    Upload,
    Uploaded,
    encode,
)
from lattice_remote.server.config import Config, LimitSettings
from lattice_remote.server.project.worker_process import WORKER_COMMAND
from lattice_remote.server.tokens import TokenFile

ANA = ("--actor", "human:ana")
CONTENT = os.urandom(600_000)
DIGEST = hashlib.sha256(CONTENT).digest()


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    data, token = make_data(tmp_path / "data")
    ensure_lattice_dirs(data.project("web").root)
    config = {**default_config(), "project_code": "LAT"}
    atomic_write(data.project("web").lattice / "config.json", serialize_config(config))
    limits = LimitSettings(attachment_bytes=1_000_000)
    async with serving(data, token, worker=WORKER_COMMAND, config=Config(limits=limits)) as server:
        yield server


class Asking(Copy):
    """A client that can have several requests under way."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.asked: list[Request] = []
        self._turn = asyncio.Lock()

    async def send_request(self, frame: Request) -> Response:
        self.asked.append(frame)
        await self.send(frame)
        async with asyncio.timeout(20):
            while frame.id not in self.answers:
                async with self._turn:
                    if frame.id not in self.answers:
                        await self.pump()
        return self.answers[frame.id]  # type: ignore[return-value]

    async def attach(self, digest: bytes = DIGEST, size: int = len(CONTENT), task: str = "LAT-1") -> Response:
        argv = ["attach", task, "big.bin", *ANA]
        files = [Attachment(2, "big.bin", digest=digest, size=size)]
        return await self.send_request(Run(secrets.token_hex(16), argv, files))


def source(tmp_path: Path, content: bytes = CONTENT) -> Source:
    path = tmp_path / f"{secrets.token_hex(4)}.bin"
    path.write_bytes(content)
    return Source(os.open(path, os.O_RDONLY), len(content), hashlib.sha256(content).digest())


def staged(running: Running) -> list[Path]:
    return list(running.data.project("web").uploads.glob("*"))


async def test_a_command_takes_what_was_uploaded_and_it_is_gone_then(running: Running, tmp_path: Path) -> None:
    copy = Asking()
    async with running.connected() as socket:
        await copy.greet(socket)
        await copy.run("create", "One", *ANA)
        steps: list[tuple[int, int]] = []
        await upload(copy, source(tmp_path), on_progress=lambda have, size: steps.append((have, size)))
        assert steps[0] == (0, len(CONTENT)) and steps[-1] == (len(CONTENT), len(CONTENT))
        reply = await copy.attach()
        assert isinstance(reply, Reply) and reply.exit_code == 0, reply
        await copy.sync()
        [payload] = (running.tree / "artifacts/payload").iterdir()
        assert payload.read_bytes() == CONTENT
        assert copy.tree == tree_of(running.tree)
        await until(lambda: not staged(running))
        assert payload.stat().st_nlink == 1
        gone = await copy.attach()
        assert isinstance(gone, Refused) and gone.code == "REMOTE_NOT_UPLOADED"
        again = await copy.send_request(next(frame for frame in copy.asked if isinstance(frame, Run)))
        assert again == reply, "asked again, a command whose upload is gone has its answer (I6)"


async def test_a_command_that_fails_leaves_it_for_the_next_try(running: Running, tmp_path: Path) -> None:
    copy = Asking()
    async with running.connected() as socket:
        await copy.greet(socket)
        await copy.run("create", "One", *ANA)
        await upload(copy, source(tmp_path))
        failed = await copy.attach(task="LAT-99")
        assert isinstance(failed, Reply) and failed.exit_code == 1
        assert not list((running.tree / "artifacts/payload").iterdir())
        before = len(copy.asked)
        await upload(copy, source(tmp_path))
        assert len(copy.asked) == before + 1, "one question, nothing is sent again"
        reply = await copy.attach()
        assert isinstance(reply, Reply) and reply.exit_code == 0


async def test_an_upload_resumes_after_its_connection_was_cut(running: Running, tmp_path: Path) -> None:
    what = source(tmp_path)
    first, second = Asking(follow=False), Asking(follow=False)
    async with running.connected() as socket:
        await first.greet(socket)
        await first.send_request(Upload(secrets.token_hex(16), DIGEST, len(CONTENT), 0, CONTENT[:300_000]))
    async with running.connected() as socket:
        await second.greet(socket)
        await upload(second, what)
    sent = [frame for frame in second.asked if isinstance(frame, Upload) and frame.data]
    assert min(frame.offset for frame in sent) == 300_000
    assert sum(len(frame.data) for frame in sent) == 300_000


async def test_no_client_uses_the_upload_of_another(running: Running, tmp_path: Path) -> None:
    _, text = TokenFile(running.data.tokens).create(projects=["web"], actor="human:ana", act_as=[])
    copy, other = Asking(), Asking()
    async with running.connected() as socket, running.connected(text) as another:
        await copy.greet(socket)
        await other.greet(another)
        await copy.run("create", "One", *ANA)
        await upload(copy, source(tmp_path))
        refused = await other.attach()
    assert isinstance(refused, Refused) and refused.code == "REMOTE_NOT_UPLOADED"


async def test_a_size_that_is_not_the_contents_is_refused(running: Running, tmp_path: Path) -> None:
    copy = Asking()
    async with running.connected() as socket:
        await copy.greet(socket)
        await copy.run("create", "One", *ANA)
        await upload(copy, source(tmp_path))
        answers = [await copy.attach(size=size) for size in (0, len(CONTENT) + 1, 2**40)]
    assert [getattr(answer, "code", None) for answer in answers] == [
        "REMOTE_NOT_UPLOADED",
        "REMOTE_NOT_UPLOADED",
        "REMOTE_TOO_LARGE",
    ]


async def test_a_project_can_not_be_brought_in_as_a_file_of_a_command(running: Running, tmp_path: Path) -> None:
    copy = Asking()
    large = os.urandom(1_000_001)
    async with running.connected() as socket:
        await copy.greet(socket)
        await copy.run("create", "One", *ANA)
        await upload(copy, source(tmp_path, large), purpose="project")
        refused = await copy.attach(hashlib.sha256(large).digest(), len(large))
    assert isinstance(refused, Refused) and refused.code == "REMOTE_TOO_LARGE"


async def test_sent_faster_than_the_disk_takes_it_is_refused_and_bounded(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that sends without end while the disk hangs fills no memory."""
    import threading

    from lattice_remote.server.project.uploads import Staging

    hanging, take = threading.Event(), Staging.take

    def slow(self: Staging, frame: Upload, token_id: str) -> int:
        hanging.wait(20)
        return take(self, frame, token_id)

    monkeypatch.setattr(Staging, "take", slow)
    copy = Asking()
    size = 60 * 1024 * 1024
    async with running.connected() as socket:
        await copy.greet(socket)
        for number in range(24):
            piece = Upload(f"{number:032x}", DIGEST, size, number << 20, bytes(1 << 20), "project")
            await socket.send(encode(piece))
        while not copy.answers:
            await copy.pump()
        reply = await copy.run("create", "Small", *ANA)
        assert isinstance(reply, Reply) and reply.exit_code == 0, "a command is not held up meanwhile (I10)"
        hanging.set()
        while len(copy.answers) < 25:
            await copy.pump()
    kinds = [type(answer) for answer in copy.answers.values()]
    assert kinds.count(Refused) == 9 and kinds.count(Uploaded) == 15
    assert {answer.code for answer in copy.answers.values() if isinstance(answer, Refused)} == {"REMOTE_BUSY"}


async def test_an_attachment_within_the_command_needs_no_digest(running: Running) -> None:
    copy = Asking()
    async with running.connected() as socket:
        await copy.greet(socket)
        await copy.run("create", "One", *ANA)
        id_ = secrets.token_hex(16)
        file = {"index": 2, "name": "x.txt", "data": b"text"}
        run = {"type": "run", "id": id_, "argv": ["attach", "LAT-1", "x.txt", *ANA], "files": [file]}
        await socket.send(msgspec.msgpack.encode(run))
        reply = await copy.answer(id_)
    assert isinstance(reply, Reply) and reply.exit_code == 0
    [payload] = (running.tree / "artifacts/payload").iterdir()
    assert payload.read_bytes() == b"text"
