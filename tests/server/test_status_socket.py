"""Status socket of a server that runs, stops, or cannot answer."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from test_server import make_data
from typer.testing import CliRunner

from lattice_remote.errors import StorageError
from lattice_remote.server import status
from lattice_remote.server.cli import app


@contextlib.contextmanager
def saying(directory: Path, answers: list[bytes]) -> Iterator[None]:
    """A server that gives these answers, and then stops."""
    listener = status.listen(directory)
    assert listener is not None
    listener.setblocking(True)

    def serve() -> None:
        for answer in answers:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(answer)
        listener.close()

    thread = threading.Thread(target=serve)
    thread.start()
    yield
    thread.join(10)
    assert not thread.is_alive()


def test_a_server_that_stops_during_the_request_counts_as_stopped(tmp_path: Path) -> None:
    listener = status.listen(tmp_path)
    assert listener is not None
    asked: list[bytes | None] = []
    thread = threading.Thread(target=lambda: asked.append(status.ask(tmp_path)))
    listener.setblocking(True)
    thread.start()
    connection, _ = listener.accept()
    listener.close()
    connection.close()
    thread.join(10)
    assert asked == [None]


def test_a_truncated_answer_is_requested_again(tmp_path: Path) -> None:
    with saying(tmp_path, [b'{"running": tr', b'{"running": true}']):
        assert status.ask(tmp_path) == b'{"running": true}'


def test_a_server_that_cannot_answer_is_reported_in_one_line(tmp_path: Path) -> None:
    with saying(tmp_path, [b"", b""]), pytest.raises(StorageError, match="could not answer; look at its log"):
        status.ask(tmp_path)


async def test_a_temporary_error_of_the_system_does_not_stop_the_listener(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def document() -> bytes:
        return b"{}"

    monkeypatch.setattr(status, "_PAUSE_S", 0.01)
    loop, tried = asyncio.get_running_loop(), asyncio.Event()
    accept = loop.sock_accept

    async def refusing(listener: socket.socket) -> tuple[socket.socket, object]:
        if not tried.is_set():
            tried.set()
            raise OSError(24, "Too many open files")
        return await accept(listener)

    monkeypatch.setattr(loop, "sock_accept", refusing)
    listener = status.listen(tmp_path)
    assert listener is not None
    telling = asyncio.create_task(status.answer(listener, document))
    await tried.wait()
    assert await asyncio.to_thread(status.ask, tmp_path) == b"{}"
    telling.cancel()
    listener.close()


@contextlib.asynccontextmanager
async def telling(directory: Path, document: bytes) -> AsyncIterator[asyncio.Task[None]]:
    """Serve this status, as a server does."""

    async def said() -> bytes:
        return document

    listener = status.listen(directory)
    assert listener is not None
    task = asyncio.create_task(status.answer(listener, said))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})
        listener.close()
        status.remove(directory)


async def ask(directory: Path) -> bytes | None:
    return await asyncio.to_thread(status.ask, directory)


async def test_a_stale_socket_and_a_link_are_replaced(tmp_path: Path) -> None:
    place, other = tmp_path / "status.sock", tmp_path / "other"
    other.write_text("somebody else's")
    place.symlink_to(other)
    for _ in range(2):
        async with telling(tmp_path, b"{}"):
            assert place.is_socket()
            assert place.stat().st_mode & 0o777 == 0o600
            assert await ask(tmp_path) == b"{}"
        assert await ask(tmp_path) is None
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(place))
        assert await ask(tmp_path) is None, "nobody listens there any more"
    assert other.read_text() == "somebody else's"


async def test_a_server_runs_without_a_status_socket(tmp_path: Path) -> None:
    (tmp_path / "status.sock").mkdir()
    assert status.listen(tmp_path) is None
    status.remove(tmp_path)
    assert (tmp_path / "status.sock").is_dir()


async def test_a_path_may_exceed_the_length_limit_of_sockets(tmp_path: Path) -> None:
    directory = tmp_path / ("x" * 120)
    directory.mkdir()
    before = Path.cwd()
    async with telling(directory, b"{}"):
        assert await ask(directory) == b"{}"
    assert Path.cwd() == before


async def test_a_client_that_does_not_read_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "_TIMEOUT_S", 0.2)
    large = b"{%b}" % (b" " * 4_000_000)
    async with telling(tmp_path, large):
        with socket.socket(socket.AF_UNIX) as lazy:
            lazy.connect(str(tmp_path / "status.sock"))
            await asyncio.to_thread(lazy.recv, 1)  # its turn has begun
            monkeypatch.setattr(status, "_TIMEOUT_S", 5.0)  # of the one behind it
            assert await ask(tmp_path) == large


def test_an_unexpected_answer_of_a_server_is_reported_in_one_line(tmp_path: Path) -> None:
    """It may be of an older version."""
    data = make_data(tmp_path / "data")
    with saying(data.path, [b'{"running": 1}']):
        done = CliRunner().invoke(app, ["--data", str(data.path), "status", "--json"])
    assert "unexpected response from the server" in str(done.exception), done.output
