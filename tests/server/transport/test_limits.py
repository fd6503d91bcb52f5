"""Limits of config.json on a running server: each refusal is clear and affects no other client."""

import asyncio
import contextlib
import json
import re
import secrets
import struct
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from harness import Copy, Running, farewell, hello, make_data, serving, until
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from lattice_remote.protocol.messages import Put, Refused, Reply, Run, Welcome, decode_server_frame, encode
from lattice_remote.server.config import Config, LimitSettings
from lattice_remote.server.tokens import TokenFile
from lattice_remote.server.transport.websocket import SendBudget


@contextlib.asynccontextmanager
async def limited(tmp_path: Path, *, proxies: tuple[str, ...] = (), **limits: int) -> AsyncIterator[Running]:
    """A server with these limits and a stopped clock."""
    config = Config(limits=LimitSettings(**limits), trusted_proxies=list(proxies))
    async with serving(*make_data(tmp_path / "data"), config=config) as running:
        running.registry.admission.clock = lambda: 0.0
        yield running


async def refused(running: Running, **options: Any) -> tuple[int, str, str | None]:
    """Return status, code and Retry-After of a connection that is refused before the upgrade."""
    with pytest.raises(InvalidStatus) as caught:
        async with running.connected(**options):
            pass
    response = caught.value.response
    assert response.body is not None
    return response.status_code, json.loads(response.body)["error"]["code"], response.headers.get("Retry-After")


async def test_connections_of_a_token(tmp_path: Path) -> None:
    async with limited(tmp_path, connections_per_token=2) as running:
        _, other = TokenFile(running.data.tokens).create(projects=["web"], actor="human:ben", act_as=[])
        async with running.connected(), running.connected():
            assert await refused(running) == (429, "REMOTE_BUSY", "10")
            async with running.connected(other):
                pass
        await until(lambda: not running.registry.admission._by_token)
        async with running.connected():
            pass


async def test_connections_of_an_address(tmp_path: Path) -> None:
    async with limited(tmp_path, connections_per_address=2) as running:
        async with running.connected(), running.connected():
            assert await refused(running) == (429, "REMOTE_BUSY", "10")
        await until(lambda: not running.server.server_state.connections)
        async with running.connected():
            pass


async def test_plans_that_are_too_large(tmp_path: Path) -> None:
    plan = f"plans/task_{'0' * 26}.md"
    async with limited(tmp_path, text_bytes=100_000) as running, running.connected() as client:
        copy = Copy()
        await copy.greet(client)
        await copy.sync()
        assert copy.replica.welcome is not None and copy.replica.welcome.limits.max_text_bytes == 100_000
        for base, text in ((b"", b"x" * 100_001), (b"x" * 100_001, b"")):
            id_ = secrets.token_hex(16)
            await copy.send(Put(id_, plan, base, text))
            answer = await copy.answer(id_)
            assert isinstance(answer, Refused) and answer.code == "REMOTE_TOO_LARGE"


async def test_new_connections_of_an_address(tmp_path: Path) -> None:
    async with limited(tmp_path, new_connections_per_second=1) as running:
        for _ in range(10):
            async with running.connected():
                pass
        assert await refused(running, token="no token") == (429, "REMOTE_BUSY", "1")
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 429 ")
        writer.close()
        async with running.connected():
            pass  # a request with a valid token counts for the token


async def test_requests_with_a_token_are_not_those_of_its_address(tmp_path: Path) -> None:
    async with limited(tmp_path, new_connections_per_second=1, messages_per_second=10) as running:
        asked: Counter[bytes] = Counter()
        request = f"GET /projects/web HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {running.token}\r\n\r\n".encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        for _ in range(400):
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            asked[head[9:12]] += 1
            if asked[b"429"]:
                break
            await reader.readexactly(int(re.search(rb"content-length: (\d+)", head, re.I)[1]))  # type: ignore[index]
        assert asked[b"200"] >= 40 and asked[b"429"] == 1
        assert (await reader.read()).startswith(b'{"ok":false,"error":{"code":"REMOTE_BUSY"')
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 200)
        answered = await reader.read()
        assert (answered.count(b"HTTP/1.1 200"), answered.count(b"HTTP/1.1 429")) == (9, 1), (
            "strangers go at their pace"
        )
        writer.close()


async def test_connections_without_a_token_of_an_address(tmp_path: Path) -> None:
    async with limited(tmp_path, waiting_connections_per_address=2) as running, running.connected() as client:
        silent = [await asyncio.open_connection("127.0.0.1", running.port) for _ in range(2)]
        await until(lambda: len(running.registry.admission.unauthenticated) == 2)
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 429 Too Many Requests\r\n")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "REMOTE_BUSY"
        for one in (writer, *(writer for _, writer in silent)):
            one.close()
        await until(lambda: not running.registry.admission.unauthenticated)
        await (await client.ping())
        async with running.connected():
            pass


async def test_a_stranger_that_waits_longest_makes_room(tmp_path: Path) -> None:
    async with limited(tmp_path, waiting_connections=3) as running:
        streams = [await asyncio.open_connection("127.0.0.1", running.port) for _ in range(3)]
        await until(lambda: len(running.registry.admission.unauthenticated) == 3)
        async with running.connected() as client:
            with contextlib.suppress(ConnectionResetError):
                assert await streams[0][0].read() == b""
            await client.send(hello())
            assert isinstance(decode_server_frame(await client.recv()), Welcome)
        for _, writer in streams:
            writer.close()


async def test_logins_that_fail(tmp_path: Path) -> None:
    async with limited(tmp_path, failed_logins_per_minute=3) as running:
        for _ in range(3):
            assert await refused(running, token="ltr_wrong") == (401, "REMOTE_UNAUTHORIZED", None)
        assert await refused(running, token="ltr_wrong") == (429, "REMOTE_BUSY", "20")
        async with running.connected():  # a failed login does not block a valid token of the same address
            pass


async def test_behind_a_proxy_the_header_says_who_asks(tmp_path: Path) -> None:
    async with limited(tmp_path, proxies=("127.0.0.1",), failed_logins_per_minute=1) as running:
        for host in ("192.0.2.1", "192.0.2.2", "2001:db8::1"):
            wrong = {"token": "ltr_wrong", "headers": {"X-Forwarded-For": f"192.0.2.77, {host}"}}
            assert (await refused(running, **wrong))[0] == 401
            assert (await refused(running, **wrong))[0] == 429


async def test_requests_of_a_connection_and_of_a_token(tmp_path: Path) -> None:
    async with (
        limited(tmp_path, requests_per_connection=3, requests_per_token=4) as running,
        running.connected() as one,
        running.connected() as two,
    ):
        for client in (one, two):
            await client.send(hello(follow=False))
            await client.recv()
        for client, taken, limit in (
            (one, 3, "3 requests are in flight on this connection"),
            (two, 1, "4 requests of this token are in flight"),
        ):
            for _ in range(4):
                await client.send(encode(Run(secrets.token_hex(16), ["wait", "release"])))
            for _ in range(4 - taken):
                refusal = decode_server_frame(await client.recv())
                assert isinstance(refusal, Refused) and refusal.message == limit
        (running.tree / "release").touch()
        for client, taken in ((one, 3), (two, 1)):
            for _ in range(taken):
                assert isinstance(decode_server_frame(await client.recv()), Reply)
        copy = Copy(follow=False)
        async with running.connected() as client:
            await copy.greet(client)
            assert isinstance(await copy.run("put", "a", "x"), Reply)


async def test_the_bytes_of_a_request(tmp_path: Path) -> None:
    async with limited(tmp_path, request_bytes=4 * 1024 * 1024) as running, running.connected() as client:
        await client.send(hello(follow=False))
        welcome = decode_server_frame(await client.recv())
        assert isinstance(welcome, Welcome)
        assert welcome.limits.max_frame_bytes == 4 * 1024 * 1024
        # The head of a frame alone: the declared size is refused before any of its bytes arrive.
        client.transport.write(struct.pack(">BBQ", 0x82, 0xFF, 4 * 1024 * 1024 + 1) + b"mask")
        assert (await farewell(client))[1] == 1009


@pytest.mark.parametrize("fragment", [0, 1_000_000], ids=["one frame", "fragments"])
async def test_messages_that_do_not_end(tmp_path: Path, fragment: int) -> None:
    """Unfinished messages of one token are bounded; small ones are not affected."""
    limit, piece = 32 * 1024 * 1024, b"\0" * 1_000_000
    async with limited(tmp_path, unfinished_bytes_per_token=limit) as running, contextlib.AsyncExitStack() as stack:
        greedy = [await stack.enter_async_context(running.connected(close_timeout=0.1)) for _ in range(2)]
        good = await stack.enter_async_context(running.connected())
        copy = Copy(follow=False)
        await copy.greet(good)
        for client in greedy:
            await client.send(hello(follow=False))
            await client.recv()
            if not fragment:
                client.transport.write(struct.pack(">BBQ", 0x82, 0xFF, 30_000_000) + b"mask")
        for number in range(20):
            for client in greedy:
                if fragment:
                    opcode = 0x00 if number else 0x02
                    client.transport.write(struct.pack(">BBQ", opcode, 0xFF, fragment) + b"\0\0\0\0")
                client.transport.write(piece)
        admission = running.registry.admission
        await until(lambda: admission._by_token.total() == 2)
        await until(lambda: admission.held_by_token.total() >= 19_000_000)
        assert admission.held_by_token.total() <= limit
        assert isinstance(await copy.run("put", "a", "x"), Reply)
    await until(lambda: not admission.held_by_token)


async def test_messages_a_second(tmp_path: Path) -> None:
    async with limited(tmp_path, messages_per_second=10) as running, running.connected() as good:
        copy = Copy(follow=False)
        await copy.greet(good)
        async with connect(
            running.url(),
            additional_headers={"Authorization": f"Bearer {running.token}"},
            subprotocols=["lattice.v1"],  # type: ignore[list-item]
        ) as bad:
            with pytest.raises(ConnectionClosed):
                async with asyncio.timeout(60):
                    for _ in range(1000):
                        await bad.ping()
                    await bad.recv()
            assert bad.close_code == 1012
            assert "messages a second" in (bad.close_reason or "")
        assert isinstance(await copy.run("put", "a", "x"), Reply)


async def test_answers_that_are_not_read_are_bounded_for_all_connections_of_a_token(tmp_path: Path) -> None:
    """A reader that would exceed the bound is refused with a retry; the answer stays in the journal."""
    async with limited(tmp_path) as running:
        budget = running.registry.send_budget = SendBudget(10_000_000)
        token_file = TokenFile(running.data.tokens)
        token_id = token_file.read()[0].id
        _, other = token_file.create(projects=["web"], actor="human:ben", act_as=[])
        request = encode(Run(secrets.token_hex(16), ["print", "8000000"]))
        async with running.connected(max_queue=1) as stalled:
            await stalled.send(hello(follow=False))
            await stalled.recv()
            stalled.transport.pause_reading()
            await stalled.send(request)
            await until(lambda: budget.held(token_id) > 8_000_000)
            async with running.connected() as second:
                await second.send(hello(follow=False))
                await second.send(request)
                bye, code = await farewell(second)
                assert bye is not None and (bye.code, code) == ("REMOTE_BUSY", 1012)
            async with running.connected(other) as client:
                await client.send(hello(follow=False))
                await client.recv()
                await client.send(encode(Run(secrets.token_hex(16), ["print", "8000000"])))
                assert isinstance(decode_server_frame(bytes(await client.recv())), Reply)
            assert budget.held(token_id) > 8_000_000
            stalled.transport.abort()
        await until(lambda: not budget.held(token_id))
        async with running.connected() as client:
            await client.send(hello(follow=False))
            await client.recv()
            await client.send(request)
            assert isinstance(decode_server_frame(bytes(await client.recv())), Reply)
        await until(lambda: not budget.held(token_id))
