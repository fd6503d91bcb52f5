"""The queue in front of one client: order, sharing, bounds, and when the client is cut."""

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
from harness import until
from websockets.frames import Frame, Opcode

from lattice_remote.server.transport.websocket import SendQueue, websocket_frame


class Pipe(asyncio.Protocol):
    """A transport with an outbox on one end, and a socket that reads only on request on the other."""

    outbox: SendQueue
    lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self.outbox.close()

    def pause_writing(self) -> None:
        self.outbox.pause()

    def resume_writing(self) -> None:
        self.outbox.resume()


class Broken(asyncio.Transport):
    def write(self, data: bytes | bytearray | memoryview) -> None:
        raise RuntimeError("the handler is closed")

    def get_write_buffer_size(self) -> int:
        return 0


@pytest.fixture
async def pipe() -> AsyncIterator[tuple[Pipe, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    _, pipe = await asyncio.get_running_loop().create_connection(Pipe, sock=ours)
    pipe.outbox = SendQueue(pipe.transport, "test", max_bytes=1_000_000, stall_deadline_s=0.3)
    yield pipe, theirs
    pipe.transport.abort()
    await until(lambda: pipe.lost)
    theirs.close()


async def received(theirs: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += await asyncio.get_running_loop().sock_recv(theirs, 65536)
    return data


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 200_000])
def test_a_frame_is_what_the_library_would_write(size: int) -> None:
    payload = b"x" * size
    assert websocket_frame(payload) == Frame(Opcode.BINARY, payload).serialize(mask=False)


async def test_frames_arrive_in_order_and_a_tick_is_one_write(pipe: tuple[Pipe, socket.socket]) -> None:
    end, theirs = pipe
    for i in range(100):
        end.outbox.push(b"%03d" % i)
    await asyncio.sleep(0)
    assert await asyncio.get_running_loop().sock_recv(theirs, 65536) == b"".join(b"%03d" % i for i in range(100))


async def test_a_slow_reader_gets_everything(pipe: tuple[Pipe, socket.socket]) -> None:
    end, theirs = pipe
    frames = [bytes([i]) * 20_000 for i in range(40)]
    for frame in frames:
        end.outbox.push(frame)
    assert await received(theirs, 800_000) == b"".join(frames)
    assert (end.outbox.take_written(), end.outbox.take_written()) == (800_000, 0)
    await end.outbox.room()
    assert end.outbox.pending_bytes == 0


async def test_one_frame_may_be_larger_than_the_bound(pipe: tuple[Pipe, socket.socket]) -> None:
    end, theirs = pipe
    end.outbox.push(b"x" * 3_000_000)
    assert len(await received(theirs, 3_000_000)) == 3_000_000
    assert not end.lost


async def test_over_the_bound_the_client_is_cut(pipe: tuple[Pipe, socket.socket]) -> None:
    end, _ = pipe
    for _ in range(12):
        end.outbox.push(b"x" * 100_000)
    assert end.outbox.pending_bytes == 0
    await until(lambda: end.lost)


async def test_a_client_that_takes_nothing_is_cut_by_its_deadline(pipe: tuple[Pipe, socket.socket]) -> None:
    end, _ = pipe
    end.outbox.push(b"x" * 500_000)
    waiting = asyncio.create_task(end.outbox.room())
    await until(lambda: end.lost)
    await asyncio.wait_for(waiting, 60.0)


async def test_a_client_that_takes_a_little_now_and_then_is_kept(pipe: tuple[Pipe, socket.socket]) -> None:
    end, theirs = pipe
    end.outbox._deadline_s = 4.0
    end.outbox.push(b"x" * 800_000)
    loop = asyncio.get_running_loop()
    began = loop.time()
    while loop.time() - began < 4.5:  # longer than the deadline
        await asyncio.sleep(0.05)
        await loop.sock_recv(theirs, 4096)
    assert not end.lost


async def test_finish_delivers_everything_and_accepts_nothing_further(pipe: tuple[Pipe, socket.socket]) -> None:
    end, theirs = pipe
    for _ in range(5):
        end.outbox.push(b"x" * 100_000)
    end.outbox.finish()
    end.outbox.push(b"late")
    assert len(await received(theirs, 500_000)) == 500_000
    assert end.outbox.pending_bytes == 0


async def test_bytes_in_the_transport_are_pending_until_the_end(pipe: tuple[Pipe, socket.socket]) -> None:
    queue = pipe[0].outbox
    queue.push(b"x" * 500_000)
    await until(pipe[0].transport.get_write_buffer_size)
    assert queue.pending_bytes > 100_000
    queue.close()
    assert queue.pending_bytes == 0


async def test_a_connection_that_ended_while_it_was_paused_is_not_cut_again(
    pipe: tuple[Pipe, socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    queue = pipe[0].outbox
    queue.push(b"x" * 500_000)
    await until(lambda: queue._paused)
    queue.close()
    queue._check_progress()
    assert queue._check is None and not caplog.records


async def test_a_client_that_stalls_with_little_unread_costs_no_processor_time(
    pipe: tuple[Pipe, socket.socket],
) -> None:
    end, theirs = pipe
    transport, queue = end.transport, end.outbox
    low, high = transport.get_write_buffer_limits()
    while transport.get_write_buffer_size() <= low:
        queue.push(b"x" * 4096)
        await asyncio.sleep(0)
    assert transport.get_write_buffer_size() <= high, "the transport has not paused"
    flushes: list[None] = []
    queue.flush = lambda: flushes.append(None) or SendQueue.flush(queue)  # type: ignore[method-assign, func-returns-value]
    await asyncio.wait_for(queue.room(), 20)
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(flushes) <= 1
    await received(theirs, queue.take_written())


@pytest.mark.parametrize("is_first", [True, False])
async def test_a_transport_that_fails_delays_no_other_client(
    pipe: tuple[Pipe, socket.socket], caplog: pytest.LogCaptureFixture, is_first: bool
) -> None:
    end, theirs = pipe
    broken = SendQueue(Broken(), "broken")
    for queue in (broken, end.outbox) if is_first else (end.outbox, broken):
        queue.push(b"change")
    assert await received(theirs, 6) == b"change"
    await until(lambda: caplog.records)
    assert "cannot write to a client" in caplog.text
    caplog.clear()


async def test_all_queues_of_a_tick_are_flushed_by_one_callback(pipe: tuple[Pipe, socket.socket]) -> None:
    end, theirs = pipe
    callbacks: list[object] = []
    loop = asyncio.get_running_loop()
    queues = [SendQueue(end.transport, str(number)) for number in range(10)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "call_soon", lambda call, *rest: callbacks.append((call, rest)))
        for queue in queues:
            queue.push(b"one")
            queue.push(b"two")
    [(call, rest)] = callbacks
    call(*rest)
    assert await received(theirs, 60) == b"onetwo" * 10
