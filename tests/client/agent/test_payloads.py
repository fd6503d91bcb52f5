"""Deferred contents: large artifacts are downloaded in the background or on demand."""

import asyncio
import os
from pathlib import Path

import pytest
from client_kit import ask, ready, run, tree, until
from fake_server import TOKEN, FakeServer
from websockets.asyncio.server import ServerConnection

from lattice_remote.client import config
from lattice_remote.client.agent.service import Service
from lattice_remote.client.attachments import identity
from lattice_remote.errors import Misuse, RemoteError
from lattice_remote.protocol.messages import ClientFrame, Download, Refused, Run, Upload, encode
from lattice_remote.protocol.operations import AnnounceFile, DeleteFile, PutFile, digest_of

BIG = "artifacts/payload/big.bin"
CONTENT = os.urandom(1_000_000)


def announce(server: FakeServer, content: bytes = CONTENT, path: str = BIG) -> None:
    server.files[path] = content
    server.change(AnnounceFile(path, len(content), digest_of(content)))


def downloads(server: FakeServer) -> list[Download]:
    return [frame for frame in server.frames if isinstance(frame, Download)]


def on_demand(service: Service) -> None:
    config.change_setting(service.cache.directory, "payloads", "on-demand")


async def current(service: Service, server: FakeServer) -> None:
    await until(lambda: service._is_current() and service._replicator.replica.position.seq == server.seq)


async def hold(connection: ServerConnection, frame: ClientFrame) -> bool:
    """A server that answers no download."""
    return isinstance(frame, Download)


async def test_a_deferred_content_arrives_in_the_background(
    server: FakeServer, service: Service, directory: Path
) -> None:
    await ready(service)
    server.misbehave = hold  # type: ignore[assignment]
    announce(server)
    answer = await run(service, "put", "tasks/x.json", "x")
    assert answer["exit_code"] == 0 and (directory / "tasks/x.json").exists()
    assert (await ask(service, "ready"))["current"]
    await until(lambda: bool(downloads(server)))
    status = (await ask(service, "status"))["payloads"]
    assert status == {
        "mode": "background",
        "deferred": 1,
        "deferred_bytes": len(CONTENT),
        "fetching": {"path": BIG, "done": 0, "total": len(CONTENT)},
        "trouble": None,
    }
    server.misbehave = None
    server.cut()
    await until(lambda: tree(directory) == server.files)


async def test_an_on_demand_content_is_downloaded_when_requested(
    server: FakeServer, service: Service, directory: Path
) -> None:
    on_demand(service)
    announce(server)
    await ready(service)
    await current(service, server)
    for do in ("verify", "sync"):
        answer = await ask(service, do)
        assert answer["deferred"] == (BIG,) and not (answer["differing"] or answer["missing"])
    assert not downloads(server)
    assert (await ask(service, "fetch", paths=["artifacts/payload/other"]))["fetched"] == []
    assert await ask(service, "fetch", paths=[BIG]) == {"fetched": [BIG], "bytes": len(CONTENT)}
    assert tree(directory) == server.files
    assert (await ask(service, "verify"))["deferred"] == ()


async def test_the_setting_takes_effect_at_once(server: FakeServer, service: Service, directory: Path) -> None:
    await ask(service, "configure", name="payloads", value="on-demand")
    announce(server)
    await ready(service)
    await current(service, server)
    assert not (directory / BIG).exists()
    assert await ask(service, "configure", name="payloads", value="background") == {"payloads": "background"}
    await until((directory / BIG).exists)
    for name, value in (("colour", "blue"), ("payloads", "never")):
        with pytest.raises(Misuse):
            await ask(service, "configure", name=name, value=value)


async def test_a_restart_keeps_the_downloaded_files(server: FakeServer, directory: Path) -> None:
    first = Service(str(directory))
    first.start(TOKEN)
    await ready(first)
    asked = 0

    async def hold_after_two(connection: ServerConnection, frame: ClientFrame) -> bool:
        nonlocal asked
        asked += isinstance(frame, Download)
        return isinstance(frame, Download) and asked > 2

    server.misbehave = hold_after_two  # type: ignore[assignment]
    announce(server)
    partial = directory / ".remote/downloads" / digest_of(CONTENT).hex()
    await until(lambda: partial.exists() and partial.stat().st_size == 512 * 1024)
    await first.close()
    server.misbehave = None
    server.frames.clear()
    second = Service(str(directory))
    second.start(TOKEN)
    await until(lambda: (directory / BIG).exists() and tree(directory) == server.files)
    assert min(frame.offset for frame in downloads(server)) == 512 * 1024
    assert not list(partial.parent.iterdir())
    await second.close()


async def test_a_content_replaced_during_its_download_is_discarded(
    server: FakeServer, service: Service, directory: Path
) -> None:
    await ready(service)
    server.misbehave = hold  # type: ignore[assignment]
    announce(server)
    await until(lambda: bool(downloads(server)))
    server.misbehave = None
    newer = os.urandom(700_000)
    announce(server, newer)
    server.cut()
    await until((directory / BIG).exists)
    assert (directory / BIG).read_bytes() == newer
    server.change(DeleteFile(BIG))
    await until(lambda: not (directory / BIG).exists())
    await until(lambda: not list((directory / ".remote/downloads").iterdir()))


async def test_a_newer_deferred_content_removes_the_older_file(
    server: FakeServer, service: Service, directory: Path
) -> None:
    announce(server)
    await ready(service)
    await until((directory / BIG).exists)
    await ask(service, "configure", name="payloads", value="on-demand")
    announce(server, os.urandom(700_000))
    await until(lambda: not (directory / BIG).exists())
    assert (await ask(service, "verify"))["deferred"] == (BIG,)


async def test_a_content_whose_removal_is_obsolete_is_kept(
    server: FakeServer, service: Service, directory: Path
) -> None:
    """It may arrive or be announced again between the decision to remove it and the removal."""
    announce(server)
    await ready(service)
    await until((directory / BIG).exists)
    await service._replicator.vacate(BIG, (len(CONTENT), digest_of(CONTENT)))
    assert (directory / BIG).read_bytes() == CONTENT


async def test_present_files_are_not_fetched(server: FakeServer, service: Service, directory: Path) -> None:
    await ready(service)
    (directory / BIG).write_bytes(CONTENT)
    announce(server)
    await current(service, server)
    await until(lambda: not service._replicator.replica.deferred)
    assert not downloads(server)
    assert (await ask(service, "verify"))["deferred"] == ()


async def test_a_file_downloaded_by_another_process_is_noticed(
    server: FakeServer, service: Service, directory: Path
) -> None:
    on_demand(service)
    announce(server)
    await ready(service)
    await current(service, server)
    other = Service(str(directory))
    other.start(TOKEN)
    await ask(other, "fetch", paths=[BIG])
    await other.close()
    server.change(PutFile("tasks/x.json", b"x"))
    await current(service, server)
    assert (await ask(service, "status"))["payloads"]["deferred"] == 0  # type: ignore[index]
    assert tree(directory) == server.files


async def test_an_unavailable_content_delays_no_other(server: FakeServer, service: Service, directory: Path) -> None:
    """It is tried again on request or after it has changed."""
    await ready(service)
    first, second = "artifacts/payload/first", "artifacts/payload/second"

    async def lose_first(connection: ServerConnection, frame: ClientFrame) -> bool:
        if isinstance(frame, Download) and frame.path == first:
            await connection.send(encode(Refused(frame.id, "REMOTE_STORAGE", "the disk is bad")))
        return isinstance(frame, Download) and frame.path == first

    server.misbehave = lose_first  # type: ignore[assignment]
    announce(server, path=first)
    announce(server, path=second)
    await until((directory / second).exists)
    assert (await ask(service, "status"))["payloads"]["trouble"] == "the disk is bad"  # type: ignore[index]
    with pytest.raises(RemoteError, match="the disk is bad"):
        await ask(service, "fetch", paths=None)
    tries = len([frame for frame in downloads(server) if frame.path == first])
    assert 2 <= tries <= 2 * 8, "not again and again"
    server.misbehave = None
    announce(server, CONTENT[1:], path=first)
    await until(lambda: tree(directory) == server.files)
    assert (await ask(service, "status"))["payloads"]["trouble"] is None  # type: ignore[index]


async def test_a_lost_server_is_reported_and_received_files_stay(
    server: FakeServer, service: Service, directory: Path
) -> None:
    on_demand(service)
    announce(server)
    await ready(service)
    await current(service, server)
    server.misbehave = hold  # type: ignore[assignment]
    fetching = asyncio.create_task(ask(service, "fetch", paths=None))
    await until(lambda: bool(downloads(server)))
    await server.stop()
    with pytest.raises(RemoteError, match="cannot reach"):
        await fetching
    server.misbehave = None
    await server.start()
    await until(lambda: service._connection.is_open, 20)
    await ask(service, "fetch", paths=None)
    assert tree(directory) == server.files


@pytest.mark.parametrize("spoil", ["", "[]", '{"../x": null}', '{"artifacts/payload/a": 5}', "gone"])
async def test_a_damaged_list_of_missing_files_leads_to_a_full_comparison(
    server: FakeServer, directory: Path, spoil: str
) -> None:
    """I5: a cache that has lost its list of missing files must compare all of them."""
    first = Service(str(directory))
    on_demand(first)
    first.start(TOKEN)
    announce(server)
    await ready(first)
    await current(first, server)
    await first.close()
    away = directory / ".remote/deferred.json"
    if spoil == "gone":
        away.unlink()
    else:
        away.write_text(spoil)
    second = Service(str(directory))
    second.start(TOKEN)
    await ready(second)
    assert second._replicator.replica.deferred == {BIG: (len(CONTENT), digest_of(CONTENT))}
    assert second._replicator.resyncs == 1
    await second.close()


def named(path: Path) -> list[dict[str, object]]:
    return [{"index": 1, "name": path.name, "path": str(path), "identity": identity(path.stat())}]


async def attach(service: Service, path: Path) -> dict[str, object]:
    request = {"do": "run", "token": TOKEN, "id": os.urandom(16).hex(), "argv": ["attach", str(path)]}
    async with asyncio.timeout(10):
        return await service.handle({**request, "files": named(path)}, lambda _: None)


async def test_a_large_file_is_uploaded_before_its_command(
    server: FakeServer, service: Service, tmp_path: Path
) -> None:
    path = tmp_path / "large.bin"
    path.write_bytes(CONTENT)
    await ready(service)
    assert (await attach(service, path))["exit_code"] == 0
    [sent] = [frame for frame in server.frames if isinstance(frame, Run)]
    [file] = sent.files
    assert (file.data, file.digest, file.size) == (None, digest_of(CONTENT), len(CONTENT))
    assert server.uploads == {digest_of(CONTENT): CONTENT}


async def test_a_file_changed_before_its_upload_is_not_sent(
    server: FakeServer, service: Service, tmp_path: Path
) -> None:
    path = tmp_path / "large.bin"
    path.write_bytes(CONTENT)
    described = named(path)
    path.write_bytes(CONTENT[:-1])
    await ready(service)
    request = {"do": "run", "token": TOKEN, "id": os.urandom(16).hex(), "argv": ["attach", str(path)]}
    assert await service.handle({**request, "files": described}, lambda _: None) == {"unreadable": True}
    assert not [frame for frame in server.frames if isinstance(frame, Run | Upload)]
