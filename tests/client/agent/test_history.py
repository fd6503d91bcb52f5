"""``lattice remote watch`` over the agent: each change once and in order, despite lost connections."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from client_kit import ask as ask_service
from client_kit import until
from fake_server import TOKEN, FakeServer
from websockets.asyncio.server import ServerConnection

from lattice_remote.client.agent import history
from lattice_remote.client.agent.service import Service, answered
from lattice_remote.client.cli import watch
from lattice_remote.errors import error_from_code
from lattice_remote.protocol.messages import ClientFrame, Position, Replay, encode
from lattice_remote.protocol.operations import AppendBytes, PutFile, digest_of

TASK = f"task_{'0' * 26}"


class Watching:
    """A run of the command in a thread. ``handled`` and ``notes`` are its output."""

    def __init__(self, service: Service, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.handled: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.code: int | None = None
        self.as_json = True
        self.free = threading.Event()
        """Cleared: a change takes as long as the user's command does."""
        self.free.set()
        self._loop, self._service = asyncio.get_running_loop(), service
        self._running: list[asyncio.Future[Any]] = []
        self._over = asyncio.Event()
        monkeypatch.setattr(watch, "send_request", self._ask)
        monkeypatch.setattr(watch, "_FIRST_RETRY_S", 0.01)
        self._watch = watch._Watch(str(directory), self, self)  # type: ignore[arg-type]

    @property
    def seqs(self) -> list[int]:
        return [record["seq"] for record in self.handled]

    def begin(self, since: Position | int | None = None) -> None:
        async def run() -> None:
            self.code = await asyncio.to_thread(self._watch.run, since, None, 0)

        self._running = [asyncio.ensure_future(run())]

    async def end(self) -> None:
        self._over.set()
        self.free.set()
        await asyncio.gather(*self._running)

    # --- the agent's socket ---

    def _ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        asked.pop("named")
        answer = asyncio.run_coroutine_threadsafe(self._handled(asked), self._loop).result(40)
        if answer is None:
            raise KeyboardInterrupt
        if not answer["ok"]:
            raise error_from_code(answer["message"], answer["code"])
        return answer

    async def _handled(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        """Return the agent's answer; None after Ctrl-C."""
        answer = asyncio.ensure_future(answered(self._service.handle({**asked, "token": TOKEN}, lambda _: None)))
        over = asyncio.ensure_future(self._over.wait())
        await asyncio.wait([answer, over], return_when=asyncio.FIRST_COMPLETED)
        over.cancel()
        if answer.done():
            return answer.result()
        answer.cancel()
        return None

    # --- output ---

    def __call__(self, record: dict[str, Any], _show: object) -> None:
        self.handled.append(record)
        self.free.wait(30)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def state(self, text: str) -> None:
        pass


@pytest.fixture
async def watching(
    server: FakeServer, service: Service, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Watching]:
    await ask_service(service, "ready")
    made = Watching(service, directory, monkeypatch)
    yield made
    await made.end()


def replays(server: FakeServer) -> list[Replay]:
    return [frame for frame in server.frames if isinstance(frame, Replay)]


async def begun(watching: Watching, since: Position | int | None = None) -> None:
    watching.begin(since)
    await until(lambda: bool(watching.notes))


async def test_a_watch_starts_with_the_next_change_and_opens_no_connection(
    server: FakeServer, watching: Watching
) -> None:
    server.put("a", b"1")
    await begun(watching)
    assert watching.notes == ["watching after change 1"]
    for number in range(2, 12):
        server.put("a", str(number).encode())
        await until(lambda: watching.seqs[-1:] == [number])  # noqa: B023
    assert watching.seqs == list(range(2, 12))
    assert server.greetings == 1 and len(replays(server)) == 1, "the agent has every change already"


async def test_a_change_is_described_with_the_titles_of_the_cache(server: FakeServer, watching: Watching) -> None:
    server.put(f"tasks/{TASK}.json", b'{"short_id": "LAT-1", "title": "One"}')
    await begun(watching)
    line = b'{"id": "ev_1"}\n'
    server.change(AppendBytes(f"events/{TASK}.jsonl", 0, digest_of(b""), line))
    await until(lambda: len(watching.handled) == 1)
    server.put(f"tasks/{TASK}.json", b'{"short_id": "LAT-1", "title": "Two"}')
    await until(lambda: len(watching.handled) == 2)
    first, second = watching.handled
    assert first["tasks"] == [{"id": TASK, "short_id": "LAT-1", "title": "One"}]
    assert second["tasks"][0]["title"] == "Two"
    assert first["events"] == [{"id": "ev_1"}] and first["events_complete"]
    assert first["position"] == str(Position("epoch1", 2, server.changes[1].mark)) and first["epoch"] == "epoch1"
    assert (first["actor"], first["token_actor"], first["token_id"]) == ("x", "x", "t")


async def test_earlier_changes_are_replayed_in_parts(
    server: FakeServer, watching: Watching, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "_MAX_CHANGES", 1)
    server.replay = 3
    for number in range(10):
        server.put("a", str(number).encode())
    await begun(watching, 0)
    await until(lambda: len(watching.handled) == 10)
    server.put("a", b"live")
    await until(lambda: len(watching.handled) == 11)
    assert watching.seqs == list(range(1, 12))
    assert watching.notes == ["watching after change 0, the last is 10"]
    assert [(frame.seq, bool(frame.mark)) for frame in replays(server)][:4] == [
        (0, False),
        (3, True),
        (6, True),
        (9, True),
    ]


async def test_a_watch_resumes_at_its_position_after_each_cut(server: FakeServer, watching: Watching) -> None:
    await begun(watching)
    for number in range(4):
        server.put("a", str(number).encode())
        await until(lambda: len(watching.handled) == 2 * number + 1)  # noqa: B023
        server.cut()
        server.put("b", str(number).encode())
        await until(lambda: len(watching.handled) == 2 * number + 2)  # noqa: B023
    assert watching.seqs == list(range(1, 9))


async def test_an_unreachable_server_is_reported_once_and_the_watch_resumes(
    server: FakeServer, watching: Watching
) -> None:
    await begun(watching)
    server.put("a", b"1")
    await until(lambda: bool(watching.handled))
    await server.stop()
    await until(lambda: len(watching.notes) == 2)
    server.numbered(PutFile("a", b"2"))
    server.files["a"] = b"2"
    await server.start()
    await until(lambda: len(watching.handled) == 2)
    assert watching.notes[1].startswith("cannot reach server ") and watching.notes[1].endswith("; trying again")
    assert watching.notes[2:] == ["connected again after change 1"] and watching.seqs == [1, 2]


@pytest.mark.parametrize(
    ("since", "why"),
    [
        (9, "there is no change 9 yet, the last is 4: resume with --since 4"),
        (0, "the changes after 0 are no longer kept, the oldest is 3: resume with --since 2"),
        (Position("older", 3, b"m"), "is not in the project's history, now epoch epoch1: resume with --since 2"),
        (Position("epoch1", 3, b"m"), "is not in the project's history"),
    ],
    ids=str,
)
async def test_changes_before_the_retention_are_reported_as_missing(
    server: FakeServer, watching: Watching, since: Position | int, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        server.put("a", str(number).encode())
    server.oldest = 3
    watching.as_json = False
    watching.begin(since)
    await until(lambda: watching.code is not None)
    assert watching.code == watch.GONE_EXIT_CODE and why in capsys.readouterr().err
    assert not watching.handled and not watching.notes


async def test_a_watch_ends_if_its_next_changes_have_expired(
    server: FakeServer, watching: Watching, capsys: pytest.CaptureFixture[str]
) -> None:
    await begun(watching)
    server.put("a", b"1")
    await until(lambda: bool(watching.handled))
    await server.stop()
    for number in range(5):
        server.numbered(PutFile("a", str(number).encode()))
    server.files["a"] = b"4"
    server.oldest = 4
    await server.start()
    await until(lambda: watching.code is not None)
    assert watching.code == watch.GONE_EXIT_CODE and watching.seqs == [1]
    assert "after 1 are no longer kept" in capsys.readouterr().out
    assert watching.notes[-1].startswith("watched up to change 1: resume with --since epoch1-1-")


async def test_a_new_epoch_is_reported_and_followed_from_its_start(server: FakeServer, watching: Watching) -> None:
    """I7."""
    await begun(watching)
    server.put("a", b"1")
    await until(lambda: bool(watching.handled))
    server.cut()
    server.epoch, server.changes = "epoch2", []
    server.put("a", b"2")
    await until(lambda: len(watching.handled) == 2)
    assert [(record["epoch"], record["seq"]) for record in watching.handled] == [("epoch1", 1), ("epoch2", 1)]
    noted = [note for note in watching.notes if "epoch" in note or "watching" in note]
    assert noted[1].startswith("a new epoch begins on the server (epoch2)")
    assert noted[2].startswith("watching after change 0")


async def test_a_watch_resumes_an_earlier_epoch_at_its_position(
    server: FakeServer, watching: Watching, service: Service
) -> None:
    """I7: a backup was restored, and then the original server was started again."""
    await begun(watching)
    server.put("a", b"1")
    await until(lambda: bool(watching.handled))
    before = server.changes
    server.cut()
    server.epoch, server.changes = "epoch2", []
    server.put("a", b"2")
    await until(lambda: len(watching.handled) == 2)
    server.cut()
    server.epoch, server.changes = "epoch1", before
    server.put("a", b"3")
    await until(lambda: len(watching.handled) == 3)
    assert [(record["epoch"], record["seq"]) for record in watching.handled][1:] == [("epoch2", 1), ("epoch1", 2)]


async def test_a_slow_reader_delays_no_client_and_misses_no_change(
    server: FakeServer, watching: Watching, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I10: unread changes stay on the server."""
    monkeypatch.setattr(history, "_MAX_CHANGES", 20)
    await begun(watching)
    watching.free.clear()
    for number in range(100):
        server.put("a", str(number).encode())
    await until(lambda: service._replicator.state.position.seq == 100)
    await until(lambda: len(watching.handled) == 1)
    assert len(service._changes._recent) == 20
    watching.free.set()
    await until(lambda: len(watching.handled) == 100)
    assert watching.seqs == list(range(1, 101))


async def test_the_agent_buffers_few_large_changes(
    server: FakeServer, watching: Watching, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "_MAX_BYTES", 10_000)
    await begun(watching)
    for number in range(20):
        server.put("a", bytes(4000) + bytes([number]))
    await until(lambda: len(watching.handled) == 20)
    assert watching.seqs == list(range(1, 21))
    assert len(service._changes._recent) == 2 and service._changes._recent_bytes <= 10_000


async def test_a_refused_token_ends_the_watch(
    server: FakeServer, watching: Watching, capsys: pytest.CaptureFixture[str]
) -> None:
    await begun(watching)
    server.tokens.clear()
    server.cut()
    await until(lambda: watching.code is not None)
    assert watching.code == 1 and "REMOTE_UNAUTHORIZED" in capsys.readouterr().out


async def test_an_answer_with_a_path_outside_the_tree_is_a_violation(server: FakeServer, watching: Watching) -> None:
    """I9: changes in answers are validated like those in the stream."""

    async def misbehave(connection: ServerConnection, frame: ClientFrame) -> bool:
        if not isinstance(frame, Replay) or len(replays(server)) > 1:
            return False
        server.changes[-1] = server.changes[-1].__class__(1, b"m", "", "x", "t", "edit", "", [PutFile("../a", b"")])
        with contextlib.suppress(Exception):
            await connection.send(encode(server._replayed(frame)))
        server.changes[-1] = server.changes[-1].__class__(1, b"m", "", "x", "t", "edit", "", [PutFile("a", b"1")])
        return True

    server.put("a", b"1")
    server.misbehave = misbehave  # type: ignore[assignment]
    greetings = server.greetings
    watching.begin(0)
    await until(lambda: len(watching.handled) == 1)
    assert server.greetings > greetings, "the connection was ended"
