"""How a server is asked how it is, when it is about to end, or can't say."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lattice_remote.errors import StorageError
from lattice_remote.server.monitoring import statussocket


@contextlib.contextmanager
def saying(directory: Path, answers: list[bytes]) -> Iterator[None]:
    """A server that gives these answers, and ends."""
    listener = statussocket.listen(directory)
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


def test_one_that_ends_while_it_is_asked_is_one_that_does_not_run(tmp_path: Path) -> None:
    listener = statussocket.listen(tmp_path)
    assert listener is not None
    asked: list[bytes | None] = []
    thread = threading.Thread(target=lambda: asked.append(statussocket.ask(tmp_path)))
    listener.setblocking(True)
    thread.start()
    connection, _ = listener.accept()
    listener.close()
    connection.close()
    thread.join(10)
    assert asked == [None]


def test_an_answer_that_was_cut_is_asked_for_again(tmp_path: Path) -> None:
    with saying(tmp_path, [b'{"running": tr', b'{"running": true}']):
        assert statussocket.ask(tmp_path) == b'{"running": true}'


def test_one_that_can_not_answer_is_one_line(tmp_path: Path) -> None:
    with saying(tmp_path, [b"", b""]), pytest.raises(StorageError, match="could not answer; look at its log"):
        statussocket.ask(tmp_path)


async def test_what_the_system_refuses_for_a_moment_is_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def document() -> bytes:
        return b"{}"

    monkeypatch.setattr(statussocket, "_PAUSE_S", 0.01)
    loop, tried = asyncio.get_running_loop(), asyncio.Event()
    accept = loop.sock_accept

    async def refusing(listener: socket.socket) -> tuple[socket.socket, object]:
        if not tried.is_set():
            tried.set()
            raise OSError(24, "Too many open files")
        return await accept(listener)

    monkeypatch.setattr(loop, "sock_accept", refusing)
    listener = statussocket.listen(tmp_path)
    assert listener is not None
    telling = asyncio.create_task(statussocket.tell(listener, document))
    await tried.wait()
    assert await asyncio.to_thread(statussocket.ask, tmp_path) == b"{}"
    telling.cancel()
    listener.close()
