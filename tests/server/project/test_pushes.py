"""Projects pushed by clients: atomic, checked by lattice, and once for each id."""

import asyncio
import contextlib
import json
import os
import secrets
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from harness import Copy, Running, serving, tree_of, until, upload
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from lattice_remote.protocol.messages import Bye, Push, Pushed, Refused, Reply
from lattice_remote.server.config import Config
from lattice_remote.server.datadir import DataDir
from lattice_remote.server.project.worker_process import WORKER_COMMAND
from lattice_remote.server.tokens import TokenFile
from sample_projects import HOOKS, add_hooks, pack_of, sample_project


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a local project."""
    return tree_of(sample_project(tmp_path_factory.mktemp("own")))


def make_server(path: Path) -> tuple[DataDir, str]:
    data = DataDir(path)
    data.create()
    data.create_project("web", code="WEB", name=None, actor=None)
    _, text = TokenFile(data.tokens).create(projects=["web"], actor="human:ana", act_as=["agent:*"])
    return data, text


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    data, token = make_server(tmp_path / "data")
    async with serving(data, token, worker=WORKER_COMMAND) as made:
        yield made


async def connected(socket: ClientConnection) -> Copy:
    copy = Copy(follow=False)
    await copy.greet(socket)
    return copy


async def push(running: Running, pack: bytes, token: str | None = None) -> Pushed | Refused:
    """Upload and push; reconnect and repeat after the goodbye of the new epoch."""
    async with running.connected(token) as socket:
        copy = await connected(socket)
        request = await upload(copy, pack)
    return await ask(running, request, token)


async def ask(running: Running, request: Push, token: str | None = None) -> Pushed | Refused:
    for _ in range(5):
        async with running.connected(token) as socket:
            copy = await connected(socket)
            await copy.send(request)
            try:
                answer = await copy.answer(request.id)
            except (AssertionError, ConnectionClosed):
                assert isinstance(copy.frames[-1], Bye)
                continue
            assert isinstance(answer, Pushed | Refused)
            return answer
    raise AssertionError("no answer")


async def test_a_project_is_pushed_as_a_whole_into_an_empty_one(running: Running, own: dict[str, bytes]) -> None:
    """I2, I3, I6, I7."""
    follower = Copy()
    async with running.connected() as socket:
        await follower.greet(socket)
        await follower.sync()
        epoch = follower.replica.position.epoch
        pushed = await push(running, pack_of(own))
        assert isinstance(pushed, Pushed), pushed
        assert (pushed.tasks, pushed.archived, pushed.files, pushed.notes) == (2, 1, len(own), [])
        with pytest.raises((AssertionError, ConnectionClosed)):
            while True:
                await follower.pump()
    assert tree_of(running.tree) == own, "byte for byte"
    async with running.connected() as socket:
        await follower.greet(socket)
        await follower.sync()
        assert follower.tree == own
        assert follower.replica.position.epoch not in ("", epoch)
        assert follower.replica.position.seq == pushed.seq == 1
        reply = await follower.run("comment", "OWN-1", "goes on", "--actor", "human:ana")
        assert isinstance(reply, Reply) and (reply.exit_code, reply.seq) == (0, 2)
        await follower.sync()
        assert follower.tree == tree_of(running.tree)
    paths = running.data.project("web")
    assert not list(paths.incoming.iterdir()) and not list(paths.uploads.iterdir())
    assert not (paths.root / "adopting").exists()


async def test_a_repeated_push_is_answered_again(running: Running, own: dict[str, bytes]) -> None:
    """I6."""
    async with running.connected() as socket:
        request = await upload(await connected(socket), pack_of(own))
    first = await ask(running, request)
    assert isinstance(first, Pushed)
    assert await ask(running, request) == first
    running.registry.project("web")._worker.kill()  # type: ignore[union-attr] - nothing depends on who answers
    assert await ask(running, request) == first


async def test_a_project_with_changes_refuses_a_push(running: Running, own: dict[str, bytes]) -> None:
    assert isinstance(await push(running, pack_of(own)), Pushed)
    before = tree_of(running.tree)
    refused = await push(running, pack_of({"config.json": own["config.json"]}))
    assert isinstance(refused, Refused) and "has 3 tasks" in refused.message
    assert tree_of(running.tree) == before
    async with running.connected() as socket:
        welcome = (await connected(socket)).frames[0]
        assert welcome.used == "3 tasks"  # type: ignore[union-attr]


async def test_a_race_of_pushes_has_one_winner(running: Running, own: dict[str, bytes]) -> None:
    """I1."""
    other = {path: data for path, data in own.items() if path in ("config.json", "ids.json", "context.md")}
    answers = await asyncio.gather(push(running, pack_of(own)), push(running, pack_of({**other, "notes/x.md": b""})))
    assert sorted(type(answer).__name__ for answer in answers) == ["Pushed", "Refused"]
    won = tree_of(running.tree)
    assert won == own if isinstance(answers[0], Pushed) else "notes/x.md" in won and len(won) == len(other) + 2


async def test_hooks_are_omitted_unless_an_administrator_allows_them(
    tmp_path: Path, running: Running, own: dict[str, bytes]
) -> None:
    directory = tmp_path / "hooked"
    directory.mkdir()
    (directory / "config.json").write_bytes(own["config.json"])
    add_hooks(directory)
    hooked = {**own, "config.json": (directory / "config.json").read_bytes()}
    kept = json.loads((running.tree / "config.json").read_text())
    kept["hooks"] = {"post_event": "true"}
    (running.tree / "config.json").write_text(json.dumps(kept, sort_keys=True, indent=2) + "\n")
    pushed = await push(running, pack_of(hooked))
    assert isinstance(pushed, Pushed) and "hooks were removed" in pushed.notes[0]
    assert json.loads((running.tree / "config.json").read_text())["hooks"] == {"post_event": "true"}
    data, token = make_server(tmp_path / "allowing")
    async with serving(data, token, worker=WORKER_COMMAND, config=Config(pushed_hooks=True)) as allowing:
        pushed = await push(allowing, pack_of(hooked))
        assert isinstance(pushed, Pushed) and not pushed.notes
        assert json.loads((allowing.tree / "config.json").read_text())["hooks"] == HOOKS


async def test_a_snapshot_that_disagrees_with_its_events_is_rebuilt_and_reported(
    running: Running, own: dict[str, bytes]
) -> None:
    path = next(path for path in own if path.startswith("tasks/"))
    pushed = await push(running, pack_of({**own, path: own[path].replace(b"parser", b"PARSER")}))
    assert isinstance(pushed, Pushed)
    assert pushed.notes == [f"rebuilt from the event logs: {path}"]
    assert tree_of(running.tree) == own


async def test_an_upload_of_another_token_or_size_can_not_be_pushed(running: Running, own: dict[str, bytes]) -> None:
    """I9."""
    _, other = TokenFile(running.data.tokens).create(projects=["web"], actor="human:ben", act_as=[])
    async with running.connected() as socket:
        request = await upload(await connected(socket), pack_of(own))
    refused = await ask(running, request, other)
    assert isinstance(refused, Refused) and refused.code == "REMOTE_NOT_FOUND"
    wrong_size = Push(secrets.token_hex(16), request.digest, request.size + 1)
    assert isinstance(await ask(running, wrong_size), Refused)
    assert running.registry.project("web").history.used is None


async def test_a_repeated_push_joins_the_running_one(running: Running, own: dict[str, bytes]) -> None:
    """I6: the answer may have been cut off at that moment, and a refusal would be wrong."""
    project = running.registry.project("web")
    async with running.connected() as first, running.connected() as second:
        one, two = await connected(first), await connected(second)
        request = await upload(one, pack_of(own))
        worker = project._worker.pid  # type: ignore[union-attr]
        os.kill(worker, signal.SIGSTOP)
        try:
            await one.send(request)
            await until(lambda: project._queue.get(request.id), 30)
            await two.send(request)
            await two.send(unknown := Push(secrets.token_hex(16), bytes(32), 1))
            await until(lambda: project._queue.get(unknown.id))
            await until(lambda: len(project._queue._by_id[request.id].requesters) == 3 or not project.pushes._under_way)
        finally:
            os.kill(worker, signal.SIGCONT)
        with contextlib.suppress(ConnectionClosed, AssertionError):
            await two.answer(request.id)
        assert not [frame for frame in two.frames if isinstance(frame, Refused)]
    assert isinstance(await ask(running, request), Pushed)
    assert tree_of(running.tree) == own
    assert not project.pushes._under_way


async def test_a_pack_that_is_refused_takes_no_more_room(running: Running, own: dict[str, bytes]) -> None:
    refused = await push(running, pack_of({**own, "config.json": b"[]"}))
    assert isinstance(refused, Refused) and "is not a JSON object" in refused.message
    await until(lambda: not list(running.data.project("web").uploads.iterdir()))
