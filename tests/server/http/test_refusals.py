"""Refusals before the upgrade, in the greeting and after. All tests share one server."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from harness import Copy, Running, farewell, hello, make_data, parts_in, serving
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from lattice_remote.files import write_atomically
from lattice_remote.protocol.messages import (
    Fetch,
    Hello,
    Manifest,
    Put,
    Refused,
    Reply,
    decode_server_frame,
    encode,
)
from lattice_remote.server.tokens import TokenFile

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with serving(*make_data(tmp_path_factory.mktemp("refusals") / "data")) as server:
        yield server


# --- before the upgrade ---


async def refused(url: str, **headers: str) -> tuple[int, str]:
    with pytest.raises(InvalidStatus) as caught:
        async with connect(url, additional_headers=headers, subprotocols=["lattice.v1"]):  # type: ignore[list-item]
            pass
    response = caught.value.response
    assert response.body is not None
    return response.status_code, json.loads(response.body)["error"]["code"]


async def test_a_refused_client_gets_the_reason_before_the_upgrade(running: Running) -> None:
    good = f"Bearer {running.token}"
    assert await refused(running.url()) == (401, "REMOTE_UNAUTHORIZED")
    assert await refused(running.url(), Authorization="Bearer nope") == (401, "REMOTE_UNAUTHORIZED")
    assert await refused(running.url("other"), Authorization="Bearer nope") == (401, "REMOTE_UNAUTHORIZED")
    assert await refused(running.url("other"), Authorization=good) == (403, "REMOTE_FORBIDDEN")
    assert await refused(running.url("..%2fweb"), Authorization=good) == (403, "REMOTE_FORBIDDEN")
    assert await refused(running.url() + "/more", Authorization=good) == (404, "REMOTE_NOT_FOUND")
    _, text = TokenFile(running.data.tokens).create(projects=["else"], actor="human:eve", act_as=[])
    assert await refused(running.url(), Authorization=f"Bearer {text}") == (403, "REMOTE_FORBIDDEN")
    assert await refused(running.url("else"), Authorization=f"Bearer {text}") == (404, "REMOTE_NOT_FOUND")


async def test_a_client_without_the_subprotocol_is_asked_to_upgrade(running: Running) -> None:
    with pytest.raises(InvalidStatus) as caught:
        async with running.connected(subprotocols=["lattice.v9"]):
            pass
    assert caught.value.response.status_code == 426


# --- files ---


async def test_a_file_that_is_not_there_is_reported_gone(running: Running) -> None:
    async with running.connected() as client:
        await client.send(hello(follow=False))
        await client.send(encode(Fetch(["tasks/none.json", "config.json"])))
        frames = [decode_server_frame(await client.recv()) for _ in range(3)]
        parts = {part.path: part for frame in frames for part in parts_in(frame)}
        assert parts["tasks/none.json"].gone
        assert parts["config.json"].data == b"{}\n"


async def test_only_what_people_edit_can_be_put(running: Running) -> None:
    async with running.connected() as client:
        await client.send(hello(follow=False))
        await client.recv()
        await client.send(encode(Put(secrets.token_hex(16), "config.json", None, b"{}")))
        answer = decode_server_frame(await client.recv())
        assert isinstance(answer, Refused)
        assert answer.code == "REMOTE_UNSUPPORTED"


# --- violations ---


VIOLATIONS = {
    "not msgpack": b"\xc1\xff\xff",
    "an unknown kind": msgspec.msgpack.encode({"type": "nonsense"}),
    "a wrong type": msgspec.msgpack.encode({"type": "run", "id": 5, "argv": ["x"]}),
    "a path that escapes": msgspec.msgpack.encode({"type": "fetch", "paths": ["../../etc/passwd"]}),
    "a second Hello": hello(),
    "deep nesting": b"\x91" * 100_000,
    "an empty frame": b"",
}


@pytest.mark.parametrize("data", VIOLATIONS.values(), ids=VIOLATIONS.keys())
async def test_a_violation_ends_that_connection_and_nothing_else(running: Running, data: bytes) -> None:
    async with running.connected() as good, running.connected() as bad:
        copy = Copy()
        await copy.greet(good)
        await bad.send(hello())
        await bad.recv()
        await bad.send(data)
        bye, code = await farewell(bad)
        assert bye is not None
        assert bye.code == "REMOTE_PROTOCOL"
        assert bye.retry_after_s is None
        assert code == 1002
        assert isinstance(await copy.run("put", "a", "x"), Reply)


@pytest.mark.parametrize(
    ("first", "code"),
    [
        (b"junk", 1002),
        (encode(Manifest()), 1002),
        (b"x" * 100_000, 1009),
        (encode(Hello(versions=[99], client_version="t", lattice_version="t")), 1008),
    ],
    ids=["junk", "not Hello", "too large", "another version"],
)
async def test_a_bad_greeting_ends_the_connection(running: Running, first: bytes, code: int) -> None:
    async with running.connected() as client:
        await client.send(first)
        assert (await farewell(client))[1] == code


async def test_text_messages_are_a_violation(running: Running) -> None:
    async with running.connected() as client:
        await client.send("hello")
        assert (await farewell(client))[1] == 1002


# --- ended tokens ---


async def test_a_revoked_token_ends_its_connections(running: Running) -> None:
    tokens = TokenFile(running.data.tokens)
    token, text = tokens.create(projects=["web"], actor="human:ben", act_as=[])
    async with running.connected(text) as client, running.connected() as other:
        await client.send(hello())
        await client.recv()
        copy = Copy()
        await copy.greet(other)
        await copy.sync()
        tokens.revoke(token.id)
        bye, code = await farewell(client)
        assert bye is not None
        assert bye.code == "REMOTE_UNAUTHORIZED"
        assert code == 1008
        assert isinstance(await copy.run("put", "a", "x"), Reply)


async def test_a_token_that_expires_ends_its_connections(running: Running) -> None:
    tokens, later = TokenFile(running.data.tokens), datetime.now(UTC) + timedelta(hours=1)
    token, text = tokens.create(projects=["web"], actor="human:ben", act_as=[], expires=later)
    async with running.connected(text) as client:
        await client.send(hello())
        await client.recv()
        ends = datetime.now(UTC) + timedelta(seconds=1)
        tokens.edit(token.id, expires=ends)
        bye, code = await farewell(client)
    assert timedelta() <= datetime.now(UTC) - ends < timedelta(seconds=30)
    assert bye is not None
    assert bye.reason.startswith(f"token {token.id} expired at ")
    assert (bye.retry_after_s, code) == (None, 1008)
    assert await refused(running.url(), Authorization=f"Bearer {text}") == (401, "REMOTE_UNAUTHORIZED")


async def test_a_rotated_token_ends_connections_with_its_old_text(running: Running) -> None:
    tokens = TokenFile(running.data.tokens)
    token, old = tokens.create(projects=["web"], actor="human:ben", act_as=[])
    async with running.connected(old) as client:
        await client.send(hello())
        _, new = tokens.rotate(token.id, grace=timedelta(hours=1))
        async with running.connected(new) as other:
            assert running.registry.auth._logins.find(old) is not None
            await client.ping()
            _, newest = tokens.rotate(token.id)
            for gone in (client, other):
                bye, code = await farewell(gone)
                assert bye is not None
                assert "was rotated; use its new text" in bye.reason
                assert code == 1008
    assert await refused(running.url(), Authorization=f"Bearer {new}") == (401, "REMOTE_UNAUTHORIZED")
    async with running.connected(newest):
        pass


async def test_plain_http_makes_the_same_checks(running: Running) -> None:
    tokens = TokenFile(running.data.tokens)
    token, text = tokens.create(projects=["web"], actor="human:ben", act_as=["agent:*"])
    status, answer = await get(running, "/projects/web", text)
    assert status == 200
    assert {key: answer[key] for key in ("project", "actor", "act_as")} == {
        "project": "web",
        "actor": "human:ben",
        "act_as": ["agent:*"],
    }
    assert (await get(running, "/projects/none", text))[0] == 403
    assert (await get(running, "/projects/web", "ltr_nope"))[0] == 401
    tokens.revoke(token.id)
    status, answer = await get(running, "/projects/web", text)
    assert (status, answer["error"]["code"]) == (401, "REMOTE_UNAUTHORIZED")


async def get(running: Running, path: str, token: str) -> tuple[int, Any]:
    """Send a request over plain HTTP; return the status and the JSON of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    head = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {token}\r\n\r\n"
    writer.write(head.encode())
    answer, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return int(answer.split()[1]), json.loads(body)


async def test_broken_tokens_are_logged_once_and_those_before_stay(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    good = running.data.tokens.read_bytes()
    try:
        write_atomically(running.data.tokens, b"{broken")
        for _ in range(3):
            running.registry.auth.refresh()
        async with running.connected():
            pass
    finally:
        write_atomically(running.data.tokens, good)
    assert caplog.text.count("keeping the previous tokens") == 1
