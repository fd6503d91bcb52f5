"""Event streams over HTTP: every change, complete, once and in order."""

import asyncio
import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from harness import Copy
from server_process import Process, children_of, is_gone
from test_server import make_data, make_token

from lattice_remote.server.tokens import TokenFile
from sandbox import wait_for
from sse import Event, Listening, assembled


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    started = Process(make_data(tmp_path_factory.mktemp("events") / "data"))
    yield started
    if started.process.poll() is None:  # the last test has it end
        assert started.end() == 0


@pytest.fixture(scope="module")
def token(server: Process) -> str:
    return make_token(server.data)


@pytest.fixture(scope="module")
def session(token: str) -> Iterator[requests.Session]:
    with requests.Session() as made:
        made.headers["Authorization"] = f"Bearer {token}"
        yield made


@pytest.fixture
def url(server: Process) -> str:
    return f"http://127.0.0.1:{server.port}/projects/web"


def create(session: requests.Session, url: str, title: str = "a task") -> str:
    made = session.post(f"{url}/tasks", json={"title": title}, timeout=30)
    assert made.status_code == 201, made.text
    return made.json()["data"]["id"]


def test_a_new_task_is_reported(server: Process, token: str, session: requests.Session, url: str) -> None:
    with Listening(server.port, token) as listening:
        assert listening.status == 200
        assert listening.response.headers["Content-Type"] == "text/event-stream"
        task = create(session, url, "told")
        events = listening.take(4)
    by_kind = {event.kind: event.data for event in events}
    assert list(by_kind) == ["task_event", "task_snapshot", "text", "change"]
    assert by_kind["task_event"]["task"] == task
    assert by_kind["task_event"]["event"]["type"] == "task_created"
    assert by_kind["task_snapshot"]["snapshot"]["title"] == "told"
    assert by_kind["text"] == {"type": "text", "task": task, "task_id": task, "text": "plan"}
    assert by_kind["change"]["tasks"] == by_kind["change"]["plans"] == [task]
    assert by_kind["change"]["actor"] == "human:ana" and by_kind["change"]["command"].startswith("create")
    assert assembled(events) == [position(session, url)]
    assert events[-1].id == here(session, url)


def position(session: requests.Session, url: str) -> tuple[str, int]:
    described = session.get(url, timeout=10).json()
    return described["epoch"], described["head"]


def here(session: requests.Session, url: str) -> str:
    return session.get(url, timeout=10).json()["position"]


def everything(server: Process, token: str, session: requests.Session, url: str) -> list[Event]:
    with Listening(server.port, token, since="0") as listening:
        return listening.until(ends=here(session, url))


def test_a_stream_resumes_after_any_event(server: Process, token: str, session: requests.Session, url: str) -> None:
    for n in range(3):
        create(session, url, f"no {n}")
    events = everything(server, token, session, url)
    epoch, head = position(session, url)
    assert assembled(events) == [(epoch, seq) for seq in range(1, head + 1)]
    assert any("." in event.id for event in events)
    for number, event in enumerate(events[:-1]):
        by = {"last": event.id} if number % 2 else {"since": event.id}
        with Listening(server.port, token, **by) as listening:  # type: ignore[arg-type]
            assert listening.until(ends=events[-1].id) == events[number + 1 :]
            assert listening.retry_ms == 1000


def test_a_header_counts_more_than_the_address(
    server: Process, token: str, session: requests.Session, url: str
) -> None:
    """A browser that reconnects repeats the original address."""
    events = everything(server, token, session, url)
    with Listening(server.port, token, since="0", last=events[-2].id) as listening:
        assert listening.take(1) == events[-1:]


def test_without_a_position_it_begins_at_the_head_and_says_where_that_is(
    server: Process, token: str, session: requests.Session, url: str
) -> None:
    create(session, url)
    epoch, head = position(session, url)
    with Listening(server.port, token) as listening:
        create(session, url, "the next")
        event, after = listening.take(1)[0], here(session, url)
        assert event.id == f"{after}.1" and after.startswith(f"{epoch}-{head + 1}-")
    with Listening(server.port, token, since=after) as listening:
        create(session, url, "and one more")
        assert listening.take(1)[0].id == f"{here(session, url)}.1"


@pytest.mark.parametrize(
    ("last", "reason"), [("nobody-3", "epoch"), ("999999", "ahead"), ("nonsense\x1b[2J", "epoch"), ("", "epoch")]
)
def test_an_unavailable_position_is_reset_to_the_head(
    server: Process, token: str, session: requests.Session, url: str, last: str, reason: str
) -> None:
    create(session, url)
    epoch, head = position(session, url)
    with Listening(server.port, token, last=last) as listening:
        [reset] = listening.take(1)
        assert (reset.kind, reset.id) == ("reset", here(session, url))
        assert reset.data == {"type": "reset", "reason": reason, "epoch": epoch, "seq": head}
        create(session, url, "after it")
        assert listening.take(1)[0].id == f"{here(session, url)}.1"


@pytest.mark.parametrize("since", ["nonsense", "-1", "1&since=2", "%00", "1.x", "abc-1", "1.2"])
def test_an_invalid_since_is_an_error(server: Process, token: str, since: str) -> None:
    with Listening(server.port, token, since=since) as listening:
        assert listening.status == 422
        assert json.loads(listening.response.read())["error"]["code"] == "REMOTE_INVALID"


def test_listening_requires_a_right_to_the_project(server: Process, token: str) -> None:
    for shown, slug, status in (("ltr_wrong", "web", 401), (token, "other", 403)):
        with Listening(server.port, shown, slug) as listening:
            assert listening.status == status


def test_a_large_snapshot_is_sent_whole_and_an_older_one_is_null(
    server: Process, token: str, session: requests.Session, url: str
) -> None:
    """The change holds only a patch of a large snapshot."""
    made = session.post(f"{url}/tasks", json={"title": "large", "description": "x" * 9000}, timeout=30)
    task, before = made.json()["data"]["id"], here(session, url)
    with Listening(server.port, token) as listening:
        for title in ("first", "second"):
            rename(server, token, task, title)
            events = listening.take(3)
            assert [event.kind for event in events] == ["task_event", "task_snapshot", "change"]
            assert events[1].data["snapshot"]["title"] == title
            assert len(events[1].data["snapshot"]["description"]) == 9000
    with Listening(server.port, token, since=before) as listening:
        snapshots = [event.data["snapshot"] for event in listening.take(6) if event.kind == "task_snapshot"]
    assert snapshots[0] is None
    assert snapshots[1]["title"] == "second"


def rename(server: Process, token: str, task: str, title: str) -> None:
    """Change a task as a client does."""

    async def run() -> None:
        async with server.connected(token) as client:
            copy = Copy(follow=False)
            await copy.greet(client)
            reply = await copy.run("update", task, f"title={title}", "--actor", "human:ana")
            assert reply.exit_code == 0, reply  # type: ignore[union-attr]

    asyncio.run(run())


def test_a_head_request_is_answered_and_over(session: requests.Session, url: str) -> None:
    answer = session.head(f"{url}/events/stream", timeout=10)
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "text/event-stream")


def test_a_client_of_http_1_0_gets_no_chunks(server: Process, token: str, session: requests.Session, url: str) -> None:
    """nginx uses HTTP/1.0 by default."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
        raw.sendall(
            f"GET /projects/web/events/stream HTTP/1.0\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
        )
        file = raw.makefile("rb")
        while file.readline() != b"\r\n":
            pass
        assert file.readline() == b"retry: 1000\n"
        assert file.readline() == b"event: position\n"
        assert file.readline().startswith(b"id: ")
        assert file.readline().startswith(b"data: ")
        assert file.readline() == b"\n"
        create(session, url)
        assert file.readline() == b"event: task_event\n"
        file.close()


def test_a_token_that_is_revoked_ends_its_streams(server: Process) -> None:
    token, text = TokenFile(server.data.tokens).create(projects=["web"], actor="human:eve", act_as=[])
    with Listening(server.port, text) as listening:
        TokenFile(server.data.tokens).revoke(token.id)
        assert list(listening) == []
        assert "REMOTE_UNAUTHORIZED" in listening.comments[-1]
    with Listening(server.port, text, last=listening.id) as again:
        assert again.status == 401


def test_nothing_is_kept_for_disconnected_listeners(
    server: Process, token: str, session: requests.Session, url: str
) -> None:
    files = Path(f"/proc/{server.process.pid}/fd")
    before = len(list(files.iterdir()))
    for n in range(40):
        listening = Listening(server.port, token)
        listening.reset() if n % 2 else listening.close()
    create(session, url)
    wait_for(lambda: len(list(files.iterdir())) <= before + 1, "the connections to be closed", 60)


def test_a_killed_server_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """Streams continue at each listener's position after the restart, even within a change."""
    data = make_data(tmp_path / "data")
    token = make_token(data)
    first = Process(data)
    with requests.Session() as session:
        session.headers["Authorization"] = f"Bearer {token}"
        url = f"http://127.0.0.1:{first.port}/projects/web"
        with Listening(first.port, token, since="0") as listening:
            create(session, url, "one")
            events = listening.take(2)  # of four
        create(session, url, "two")
        assert session.get(f"{url}/tasks", timeout=30).ok
        [reader] = children_of(first, b"worker.reader")
        assert first.end(signal.SIGKILL) == -signal.SIGKILL
        wait_for(lambda: is_gone(reader), "its reader to leave", 60)
        second = Process(data)
        url = f"http://127.0.0.1:{second.port}/projects/web"
        with Listening(second.port, token, last=events[-1].id) as listening:
            create(session, url, "three")
            epoch, head = position(session, url)
            events += listening.until(ends=here(session, url))
    assert second.end() == 0
    assert assembled(events) == [(epoch, seq) for seq in range(1, head + 1)]


def test_two_hundred_streams_end_at_shutdown_in_less_than_two_seconds(
    server: Process, token: str, session: requests.Session, url: str
) -> None:
    """The server is stopped with SIGTERM while fifty streams are not read. Must be this server's last test."""
    told, ended = [0] * 150, [0.0] * 150
    with contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(stalling(server.port, token)) for _ in range(50)]
        assert len(stalled) == 50
        listening = [stack.enter_context(Listening(server.port, token)) for _ in range(150)]

        def read(number: int) -> None:
            for line in listening[number].response:
                told[number] += line.startswith(b"event: task_event")
            ended[number] = time.monotonic()

        readers = [threading.Thread(target=read, args=(number,)) for number in range(150)]
        for reader in readers:
            reader.start()
        for n in range(12):
            body = {"title": f"no {n}", "description": "x" * 50_000}
            assert session.post(f"{url}/tasks", json=body, timeout=30).status_code == 201
        wait_for(lambda: told == [12] * 150, "everybody who reads to have been told", 60)
        began = time.monotonic()
        assert server.end() == 0
        took = time.monotonic() - began
        for reader in readers:
            reader.join(20)
    assert told == [12] * 150
    assert max(took, max(ended) - began) < 10, "a stalled listener is cut after 20 s"


@contextlib.contextmanager
def stalling(port: int, token: str) -> Iterator[socket.socket]:
    """Open a stream and read nothing from it."""
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", port))
        raw.sendall(
            f"GET /projects/web/events/stream HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
        )
        yield raw
