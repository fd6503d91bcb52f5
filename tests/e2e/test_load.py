"""Many clients on one server, in small: ``make load`` does the same with hundreds, and prints the figures."""

import asyncio

import pytest

from light import Light
from memory_client import MemoryClient
from sandbox import Sandbox, tree_of
from scenarios import BY, a_busy_log, greed, grow_log, stalled_clients, storm, writers_at_once

pytestmark = pytest.mark.e2e


def test_stalled_clients_delay_no_write_and_catch_up(sandbox: Sandbox) -> None:
    done = stalled_clients(sandbox, clients=40, stalled=2, seconds=2.5, until_cut=False)
    assert done.during.per_second > 0.4 * done.before.per_second  # I10
    assert done.mib_growth < 60


def test_of_many_that_write_at_once_nobody_is_left_behind(sandbox: Sandbox) -> None:
    assert writers_at_once(sandbox, clients=25, seconds=2.5).slowest_share > 0.6


def test_a_client_with_hundreds_of_requests_under_way_does_not_starve_another(sandbox: Sandbox) -> None:
    alone, beside = greed(sandbox, in_flight=200, seconds=1.5)
    assert beside.p50_ms < 80 * alone.p50_ms  # in the order of arrival it would be 200 times


def test_all_clients_come_back_by_themselves_after_a_crash(sandbox: Sandbox) -> None:
    assert storm(sandbox, clients=40, kill=True).last_s < 20


async def test_a_large_log_arrives_though_it_grows_all_the_time(sandbox: Sandbox) -> None:
    server = sandbox.server()
    server.project()
    server.start()
    token = server.token("human:ana", "agent:*")
    async with Light(server.url, token) as client:
        await client.ok("create", "One", *BY)
    await asyncio.to_thread(server.stop)
    grow_log(server.lattice_dir(), 12)
    await asyncio.to_thread(server.start)
    copy = MemoryClient(server.url, token)
    async with a_busy_log(server, token) as pace:
        while len(pace) < 8:  # noqa: ASYNC110 - they write
            await asyncio.sleep(0.01)
        copy.start()
        await copy.current(timeout_s=30)
        assert copy.received_bytes("events/") < 2 * 12 * 1024 * 1024, "it came in one pass, or nearly"
    await copy.link.changed.until(lambda: copy.files == tree_of(server.lattice_dir()), 20)
    assert copy.files == tree_of(server.lattice_dir())
    await copy.close()
