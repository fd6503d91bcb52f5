"""Many clients on one server, at a small scale; ``make load`` does the same with hundreds and prints the figures."""

import asyncio
import os
import signal

import pytest
from websockets.asyncio.client import connect

from lattice_remote.protocol.messages import SUBPROTOCOL, Part, Reply, decode_server_frame, encode
from lattice_remote.server.project.queue import QueueLimits
from load_scenarios import BY, grow_log, stalled_clients, storm, writers_at_once
from memory_client import MemoryClient
from request_client import Light, several
from sandbox import Sandbox, Server, tree_of

pytestmark = pytest.mark.e2e


def test_stalled_clients_delay_no_write_and_catch_up(sandbox: Sandbox) -> None:
    done = stalled_clients(sandbox, clients=40, stalled=2, seconds=2, until_cut=False)
    assert done.during.per_second > 0.2 * done.before.per_second  # I10
    assert done.mib_growth < 60


def test_none_of_many_concurrent_writers_starves(sandbox: Sandbox) -> None:
    assert writers_at_once(sandbox, clients=25, seconds=1.5).slowest_share > 0.6


async def test_a_client_with_hundreds_of_pending_requests_does_not_starve_another(sandbox: Sandbox) -> None:
    server = sandbox.started_server()
    async with several(2, server.url, server.token("human:ana", "agent:*")) as (greedy, modest):
        await greedy.ok("create", "One", *BY)
        (worker,) = server.worker_pids()
        os.kill(worker, signal.SIGSTOP)  # wait for all requests: the result must not depend on speed
        try:
            many = [asyncio.create_task(greedy.ok("comment", "LAT-1", "another", *BY)) for _ in range(200)]
            await greedy.reached()
            one = asyncio.create_task(modest.run("comment", "LAT-1", "a comment", *BY))
            await modest.reached()
        finally:
            os.kill(worker, signal.SIGCONT)
        answer = await one
        await asyncio.gather(*many)
    assert isinstance(answer, Reply)
    ahead = answer.seq - 2  # changes: the task, earlier requests, and its own
    assert ahead <= QueueLimits().window + 1  # requests already in the worker, and one turn; not all two hundred


def test_all_clients_reconnect_after_a_crash(sandbox: Sandbox) -> None:
    assert storm(sandbox, clients=40, kill=True).last_s < 60


async def test_a_large_log_arrives_in_one_pass_while_it_grows(sandbox: Sandbox) -> None:
    server = sandbox.started_server()
    token = server.token("human:ana", "agent:*")
    async with Light(server.url, token) as client:
        await client.ok("create", "One", *BY)
    await asyncio.to_thread(server.stop)
    grow_log(server.lattice_dir(), 24)
    await asyncio.to_thread(server.start)
    copy = MemoryClient(server.url, token)
    async with Light(server.url, token) as writer, asyncio.timeout(60), slow_reader(server, token) as socket:
        await socket.send(encode(await copy.hello()))
        while not copy.is_current:
            frame = decode_server_frame(bytes(await socket.recv(decode=False)))
            if isinstance(frame, Part) and frame.size > 20 * 1024 * 1024 and frame.offset == 0:
                await writer.ok("comment", "LAT-1", "while it is on its way", *BY)
            for answer in (await copy.receive([frame])).to_send:
                await socket.send(encode(answer))
    assert copy.received_bytes("events/task_") < 30 * 1024 * 1024
    assert copy.files == tree_of(server.lattice_dir())


def slow_reader(server: Server, token: str) -> connect:
    """Return a connection that reads at most a frame ahead of the system's buffer."""
    return connect(
        f"ws://127.0.0.1:{server.port}/projects/board/ws",
        subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]
        additional_headers={"Authorization": f"Bearer {token}"},
        compression=None,
        max_size=None,
        max_queue=1,
    )
