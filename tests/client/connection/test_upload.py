"""Upload of a file in parts: resumed at the server's offset, or failed with the reason."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from lattice_remote.client.connection import upload as module
from lattice_remote.client.connection.upload import Source, upload
from lattice_remote.errors import ConnectionFailed, Rejected, RemoteError, StorageError
from lattice_remote.protocol.messages import Refused, Request, Response, Upload, Uploaded

PIECE = 4


class Store:
    """A server that stores parts that arrive without a gap."""

    def __init__(self, have: bytes = b"") -> None:
        self.content = have
        self.frames: list[Upload] = []
        self.answer: Callable[[Upload], Response | None] = lambda _: None
        """Returns another answer, None for the usual one."""

    async def send_request(self, frame: Request) -> Response:
        assert isinstance(frame, Upload)
        self.frames.append(frame)
        await asyncio.sleep(0)
        if (answer := self.answer(frame)) is not None:
            return answer
        if frame.offset == len(self.content):
            self.content += frame.data
        return Uploaded(frame.id, len(self.content))

    def refuses(self, times: int, code: str) -> None:
        left = times

        def refuse(frame: Upload) -> Response | None:
            nonlocal left
            left -= 1
            return Refused(frame.id, code, "why") if left >= 0 else None

        self.answer = refuse


TEXT = bytes(range(50))


@pytest.fixture
async def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Source]:
    monkeypatch.setattr(module, "_PIECE_BYTES", PIECE)
    monkeypatch.setattr(module, "_BUSY_DELAY_S", 0.0)
    (tmp_path / "file").write_bytes(TEXT)
    descriptor = os.open(tmp_path / "file", os.O_RDWR)
    yield await Source.of(descriptor)
    os.close(descriptor)


@pytest.mark.parametrize("have", [0, 17, len(TEXT)])
async def test_only_parts_missing_on_the_server_are_sent(source: Source, have: int) -> None:
    store, progress = Store(TEXT[:have]), list[tuple[int, int]]()
    await upload(store, source, purpose="project", on_progress=lambda *at: progress.append(at))
    assert store.content == TEXT
    assert b"".join(frame.data for frame in store.frames) == TEXT[have:]
    assert sum(not frame.data for frame in store.frames) == 1, "it is asked once how much is there"
    assert all((frame.digest, frame.size, frame.purpose) == (source.digest, 50, "project") for frame in store.frames)
    assert len({frame.id for frame in store.frames}) == len(store.frames)
    assert progress[0] == (have, 50) and progress[-1] == (50, 50) and progress == sorted(progress)


async def test_parts_that_the_server_has_lost_are_sent_again(source: Source) -> None:
    store, lost = Store(), [20, 12]

    def lose(frame: Upload) -> Response | None:
        if lost and frame.offset >= lost[0]:
            store.content = store.content[: lost.pop() // 2]
        return None

    store.answer = lose
    await upload(store, source)
    assert store.content == TEXT and not lost


async def test_an_upload_to_a_server_that_keeps_losing_parts_fails(source: Source) -> None:
    store = Store()
    store.answer = lambda frame: Uploaded(frame.id, 0)
    with pytest.raises(ConnectionFailed, match="keeps losing what is sent"):
        await upload(store, source)
    assert len(store.frames) <= 2 + (module._MAX_SETBACKS + 1) * module._WINDOW


async def test_a_busy_server_is_retried_and_its_last_answer_returned(source: Source) -> None:
    store = Store()
    store.refuses(module._BUSY_ATTEMPTS - 1, "REMOTE_BUSY")
    await upload(store, source)
    assert store.content == TEXT
    store.refuses(module._BUSY_ATTEMPTS, "REMOTE_BUSY")
    with pytest.raises(Rejected) as error:
        await upload(store, source)
    assert error.value.code == "REMOTE_BUSY"


async def test_a_content_of_another_digest_is_sent_once_more(source: Source) -> None:
    """The earlier parts may be from an older version of the file."""
    store = Store()
    store.refuses(1, "REMOTE_PROTOCOL")
    await upload(store, source)
    assert store.content == TEXT
    store.refuses(2, "REMOTE_PROTOCOL")
    with pytest.raises(StorageError, match="changes while it is read"):
        await upload(store, source)


async def test_a_refusal_is_passed_on(source: Source) -> None:
    store = Store()
    store.refuses(1, "REMOTE_TOO_LARGE")
    with pytest.raises(Rejected, match="why") as error:
        await upload(store, source)
    assert error.value.code == "REMOTE_TOO_LARGE" and len(store.frames) == 1


@pytest.mark.parametrize("answer", [Uploaded("0" * 32, 51), Refused("0" * 32, "REMOTE_STORAGE", "full")])
async def test_an_invalid_answer_ends_the_upload(source: Source, answer: Response) -> None:
    store = Store()
    store.answer = lambda _: answer
    with pytest.raises(RemoteError) as error:
        await upload(store, source)
    assert error.value.message == ("full" if isinstance(answer, Refused) else "unexpected response from the server")


async def test_a_truncated_or_unreadable_file_is_reported(source: Source, tmp_path: Path) -> None:
    os.truncate(source.descriptor, 33)
    with pytest.raises(StorageError, match="was cut short"):
        await upload(Store(), source)
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(StorageError, match="cannot read the file that is to be sent: Is a directory"):
            await upload(Store(), Source(folder, 50, source.digest))
    finally:
        os.close(folder)


async def test_a_cancelled_upload_leaves_no_part_in_flight(source: Source) -> None:
    store, before = Store(), len(asyncio.all_tasks())
    never = asyncio.Event()
    began = asyncio.Event()

    async def send_request(frame: Request) -> Response:
        assert isinstance(frame, Upload)
        if frame.data:
            began.set()
            await never.wait()
        return Uploaded(frame.id, 0)

    store.send_request = send_request  # type: ignore[method-assign]
    running = asyncio.create_task(upload(store, source))
    await began.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert len(asyncio.all_tasks()) == before
