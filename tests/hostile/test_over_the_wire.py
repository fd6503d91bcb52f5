"""Hostile lines, edits and file requests through the whole server reach nothing outside the tree (I9)."""

import random
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from harness import Copy, Running, hello, parts_in, serving, tree_of
from place import CANARY, OBSERVED_WORKER, Place
from values import Known, Lines

from lattice_remote.protocol.messages import (
    Bye,
    Fetch,
    Part,
    Put,
    Refused,
    Reply,
    Run,
    Stored,
    decode_server_frame,
    encode,
)
from lattice_remote.server.datadir import DataDir
from lattice_remote.server.tokens import TokenFile


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
async def running(place: Place, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    for name, value in place.environment().items():
        monkeypatch.setenv(name, value)
    data = DataDir(place.root / "data")
    for path in (data.tokens, data.path / "config.json"):
        path.unlink()
    data.create()
    _, token = TokenFile(data.tokens).create(projects=["web"], actor="human:ana", act_as=["agent:*"])
    async with serving(data, token, worker=OBSERVED_WORKER) as server:
        yield server


async def test_hostile_lines_and_edits_through_the_server(place: Place, running: Running) -> None:
    rng, copy = random.Random(11), Copy()
    known = Known(shorts=["LAT-1", "LAT-2"], outside=place.outside)
    lines = Lines(rng, known)
    async with running.connected() as client:
        await copy.greet(client)
        await copy.sync()
        for title in ("one", "two"):
            await copy.run("create", title, "--actor", "human:ana")
        known.tasks = [Path(path).stem for path in copy.tree if path.startswith("tasks/")]
        for number in range(200):
            line = lines.line()
            if not line.argv or "--wait" in line.argv:
                continue
            id_ = secrets.token_hex(16)
            await copy.send(Run(id_, line.argv, line.files))
            answer = await copy.answer(id_)
            if number % 20 == 0:
                id_ = secrets.token_hex(16)
                digest = rng.choice([b"", bytes(32), rng.randbytes(3)])
                plan = f"plans/{rng.choice(known.tasks)}.md"
                await copy.send(Put(id_, plan, None, rng.randbytes(30), base_digest=digest))
                answer = await copy.answer(id_)
            assert isinstance(answer, Reply | Refused | Stored)
            text = answer.stdout + answer.stderr if isinstance(answer, Reply) else repr(answer).encode()
            assert CANARY.encode() not in text
            assert running.token.encode() not in text
        await copy.run("doctor")
        assert copy.tree == tree_of(running.tree)
        assert not any(CANARY.encode() in data for data in copy.tree.values())
    assert place.report.read_text() == ""


async def test_an_endless_wait_does_not_harm_the_server(running: Running) -> None:
    copy, ids = Copy(), []
    async with running.connected() as client:
        await copy.greet(client)
        await copy.run("resource", "create", "gpu", "--actor", "human:ana")
        await copy.run("resource", "acquire", "gpu", "--actor", "agent:a")
        for number, timeout in enumerate(("9" * 30, "1" + "0" * 300, "9" * 4000, str(1 << 63), "-1")):
            ids.append(secrets.token_hex(16))
            argv = ["resource", "acquire", "gpu", "--wait", "--timeout", timeout, "--actor", f"agent:{number}"]
            await copy.send(Run(ids[-1], argv))
        assert isinstance(await copy.run("create", "x", "--actor", "human:ana"), Reply)
        last = await copy.answer(ids[-1])
        assert isinstance(last, Reply)
        assert last.exit_code == 1
        released = await copy.run("resource", "release", "gpu", "--actor", "agent:a")
        assert isinstance(released, Reply)
        first = await copy.answer(ids[0])
        assert isinstance(first, Reply)
        assert first.exit_code == 0


HOSTILE_PATHS = (
    *(
        "../tokens.json",
        "plans/../../journal/undo",
        "/etc/passwd",
        ".remote/x",
        "locks/x.lock",
        "LOCKS/x.lock",
        "Locks/x",
    ),
    *(
        "remote.json",
        "REMOTE.JSON",
        "cache_state.json",
        ".tmp.x",
        "plans//x.md",
        "plans/./x.md",
        "plans/x.md\n",
        "a\\..\\b",
    ),
    *("plans/x.md~", "\uff0e\uff0e/tokens.json", "c:/x"),
)


async def test_files_outside_the_tree_are_neither_sent_nor_stored(running: Running) -> None:
    for path in HOSTILE_PATHS:
        for frame in (Fetch([path]), Put("1" * 32, path, None, b"x")):
            async with running.connected() as client:
                await client.send(hello(follow=False))
                await client.recv()
                await client.send(encode(frame))
                answer = decode_server_frame(await client.recv())
            assert isinstance(answer, Bye | Refused) or (isinstance(answer, Part) and answer.gone), path


async def test_files_behind_planted_symlinks_are_not_sent(place: Place, running: Running) -> None:
    copy = Copy()
    async with running.connected() as client:
        await copy.greet(client)
        await copy.sync()
        await copy.run("create", "x", "--actor", "human:ana")
        plan = next(path for path in copy.tree if path.startswith("plans/"))
        (running.tree / plan).unlink()
        (running.tree / plan).symlink_to(place.root / "home/.ssh/id")
        (running.tree / "notes").rmdir()
        (running.tree / "notes").symlink_to(place.root / "desk")
        await copy.send(Fetch([plan, "notes/notes.md", "config.json"]))
        parts: dict[str, Part] = {}
        while len(parts) < 3:
            frame = await copy.pump()
            parts |= {part.path: part for part in parts_in(frame)}
        assert parts[plan].gone
        assert parts["notes/notes.md"].gone
        assert parts["config.json"].data == (running.tree / "config.json").read_bytes()
        assert not any(CANARY.encode() in part.data for part in parts.values())
