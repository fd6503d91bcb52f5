"""Requests of a command to its agent: timeouts, retries, and the age of the data."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lattice_remote.client import agent_client, agent_runtime
from lattice_remote.client.agent_client import call, describe_age, ensure_current, request, request_id, send_request
from lattice_remote.errors import ConnectionFailed, RemoteError


def test_ages_are_in_the_largest_unit() -> None:
    ages = (8.4, 119, 120, 180, 7199, 7200, 18000, 172799, 172800, 200000)
    expected = ["8 s", "119 s", "2 min", "3 min", "120 min", "2 h", "5 h", "48 h", "2 days", "2 days"]
    assert [describe_age(age) for age in ages] == expected


class FakeAgent:
    """An agent that answers each connection's request with the next lines of ``script``; None sends nothing.

    An empty text closes the connection.
    """

    def __init__(self, listener: socket.socket) -> None:
        self.script: list[str | None] = []
        self.requests: list[dict[str, Any]] = []
        self._listener = listener
        self._silent: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed at the end
            while True:
                stream, _ = self._listener.accept()
                with stream.makefile("rb") as lines:
                    self.requests.append(json.loads(lines.readline()))
                answer = self.script.pop(0)
                if answer is None:
                    self._silent.append(stream)
                else:
                    stream.sendall(answer.encode())
                    stream.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(20)
        for stream in (*self._silent, self._listener):
            stream.close()


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAgent]:
    monkeypatch.setattr(agent_client, "_said", set())
    place = agent_runtime.locate()
    agent_runtime.prepare(place)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place.socket)
        listener.listen()
        made = FakeAgent(listener)
        yield made
        made.close()


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Record the requests that the command runs itself."""
    ran: list[dict[str, Any]] = []

    def run_inline(request: dict[str, Any], _progress: object = None) -> dict[str, Any]:
        ran.append(dict(request))
        return {"ok": True, "inline": True, "notices": [], "status": 200, "payload": "{}"}

    monkeypatch.setattr(agent_client, "run_inline", run_inline)
    return ran


OK = '{"ok": true}\n'


def test_a_request_names_its_agent(agent: FakeAgent, inline: list[dict[str, Any]]) -> None:
    agent.script = [OK]
    assert send_request({"do": "x"}) == {"ok": True}
    assert agent.requests == [{"do": "x", "agent": agent_runtime.locate().name}] and not inline


def test_progress_comes_before_the_answer(agent: FakeAgent) -> None:
    agent.script = ['{"progress": null}\n{"progress": {"done": 1}}\n{"progress": {"done": 2}}\n' + OK] * 2
    seen: list[dict[str, Any]] = []
    assert send_request({"do": "x"}, seen.append) == {"ok": True} == send_request({"do": "x"})
    assert seen == [{"done": 1}, {"done": 2}]


@pytest.mark.parametrize("end", ["", "no json\n", '{"progress": null}\n'])
def test_a_request_resent_to_a_new_agent_has_the_time_of_its_first_attempt(
    agent: FakeAgent, inline: list[dict[str, Any]], end: str
) -> None:
    agent.script = [end, end, OK]
    before = agent_runtime.boot_time()
    assert send_request({"do": "run", "id": "1"}) == {"ok": True}
    first, *later = agent.requests
    assert "first_sent_at" not in first and [each["id"] for each in later] == ["1", "1"]
    assert len({each["first_sent_at"] for each in later}) == 1
    assert before <= later[0]["first_sent_at"] <= agent_runtime.boot_time() and not inline


def test_attempts_with_an_agent_that_ends_at_every_request_are_bounded(agent: FakeAgent) -> None:
    agent.script = [""] * 9
    with pytest.raises(ConnectionFailed, match="ends at every request"):
        send_request({"do": "run"})
    assert len(agent.requests) == 3


def test_a_command_runs_without_an_unresponsive_agent_and_reports_that_once(
    agent: FakeAgent,
    inline: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(agent_client, "FIRST_WORD_TIMEOUT_S", 0.01)
    agent.script = [None, None]
    place = agent_runtime.locate()
    Path(place.pid).write_text("123\n")
    for _ in range(2):
        assert send_request({"do": "run", "id": "1"})["inline"]
    said = "lattice-remote: the background agent, process 123, does not answer; this command runs without it\n"
    assert capsys.readouterr().err == said
    assert [each["id"] for each in inline] == ["1", "1"] and all("first_sent_at" in each for each in inline)


def test_an_agent_that_does_not_stop_is_reported_by_its_socket_without_a_pid(
    agent: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_client, "FIRST_WORD_TIMEOUT_S", 0.01)
    agent.script = [None]
    with pytest.raises(ConnectionFailed, match=f"process of {agent_runtime.locate().socket}, does not answer"):
        agent_client.send_if_running({"do": "agent-stop"})


def test_a_request_from_another_environment_is_run_by_the_command(
    agent: FakeAgent, inline: list[dict[str, Any]]
) -> None:
    agent.script = ['{"not_mine": true}\n']
    assert send_request({"do": "run"})["inline"] and len(inline) == 1


@pytest.mark.parametrize("value", ["off", "OFF", "0", "no", "false"])
def test_the_agent_can_be_switched_off(
    agent: FakeAgent, inline: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("LATTICE_REMOTE_AGENT", value)
    assert send_request({"do": "run"})["inline"] and not agent.requests
    assert agent_client.send_if_running({"do": "agent-status"}) is None
    with agent_client.stay_connected():
        pass
    assert not agent.requests and len(inline) == 1


def test_a_directory_writable_by_others_has_no_agent(agent: FakeAgent) -> None:
    place = agent_runtime.locate()
    os.chmod(place.directory, 0o777)  # noqa: S103 - the fault
    assert agent_client.send_if_running({"do": "agent-status"}) is None and not agent.requests
    os.chmod(place.directory, 0o700)
    agent.script = [OK]
    assert agent_client.send_if_running({"do": "agent-status"}) == {"ok": True}


@pytest.mark.parametrize("token", ["", " ", "ltr_x"])
def test_an_error_names_the_refused_token(agent: FakeAgent, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("LATTICE_TOKEN", token)
    agent.script = [
        f'{{"ok": false, "code": "REMOTE_{code}", "message": "m"}}\n' for code in ("UNAUTHORIZED", "CONFLICT")
    ]
    with pytest.raises(RemoteError) as refused:
        send_request({"do": "run"})
    assert refused.value.code == "REMOTE_UNAUTHORIZED"
    assert ("LATTICE_TOKEN" in refused.value.message) == bool(token.strip())
    with pytest.raises(RemoteError) as conflict:
        send_request({"do": "run"})
    assert conflict.value.message == "m"


# --- request ids ---


@pytest.mark.parametrize(
    ("passed", "found"),
    [
        ("a" * 32, {"id": "a" * 32}),
        (f"{'a' * 32}:12.5", {"id": "a" * 32, "first_sent_at": 12.5}),
        (f"{'a' * 32}:soon", {"id": "a" * 32}),
        ("x" * 32, None),
        ("", None),
    ],
)
def test_a_launchers_request_id_is_used_for_one_command(
    monkeypatch: pytest.MonkeyPatch, passed: str, found: dict[str, object] | None
) -> None:
    monkeypatch.setenv("LATTICE_REMOTE_REQUEST", passed)
    first, second = request_id(), request_id()
    assert found is None or first == found
    assert "first_sent_at" not in second and len(second["id"]) == 32 and first["id"] != second["id"]


def test_a_request_has_the_callers_token_and_cache(guarded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (guarded / "remote.json").write_text('{"url": "http://127.0.0.1:1", "project": "web"}')
    monkeypatch.setenv("LATTICE_TOKEN", " ltr_x\n")
    asked = request("run", str(guarded), argv=["list"])
    status = guarded.stat()
    assert asked["cache"] == [status.st_dev, status.st_ino, "http://127.0.0.1:1", "web"]
    assert (asked["do"], asked["token"], asked["named"], asked["argv"]) == ("run", "ltr_x", None, ["list"])


# --- freshness of the cache ---


READY: dict[str, Any] = {"ok": True, "notices": ["n"], "current": True}
STALE: dict[str, Any] = {
    **READY,
    "current": False,
    "filled": True,
    "message": "no\nway",
    "code": "REMOTE_UNREACHABLE",
    "age_s": 8,
    "seq": 3,
}


@pytest.fixture
def cache(guarded: Path) -> str:
    (guarded / "remote.json").write_text('{"url": "http://127.0.0.1:1", "project": "web"}')
    return str(guarded)


def test_the_age_of_stale_data_is_shown(agent: FakeAgent, cache: str) -> None:
    said: list[str] = []
    agent.script = [json.dumps(answer) + "\n" for answer in (READY, STALE, {**STALE, "age_s": None})]
    assert ensure_current(cache, said.append) is None and said == ["lattice-remote: n"]
    line = "no way; showing data from 8 s ago (change 3)"
    assert ensure_current(cache, said.append) == line and said[2:] == [f"lattice-remote: {line}"]
    assert "data of unknown age" in str(ensure_current(cache, said.append))


@pytest.mark.parametrize(("filled", "is_required"), [(False, False), (True, True)])
def test_data_that_must_be_current_or_was_never_received_is_an_error(
    agent: FakeAgent, cache: str, filled: bool, is_required: bool
) -> None:
    agent.script = [json.dumps({**STALE, "filled": filled}) + "\n"]
    with pytest.raises(RemoteError, match="no way") as error:
        ensure_current(cache, lambda _: None, is_required=is_required)
    assert error.value.code == "REMOTE_UNREACHABLE"


def test_a_cache_without_its_remote_is_read_and_not_required(cache: str, agent: FakeAgent) -> None:
    Path(cache, "remote.json").rename(Path(cache, "cache_state.json"))
    said: list[str] = []
    assert "remote.json is gone" in str(ensure_current(cache, said.append)) and len(said) == 1
    with pytest.raises(RemoteError, match="project web") as error:
        ensure_current(cache, said.append, is_required=True)
    assert error.value.code == "REMOTE_GUARD" and not agent.requests


def test_a_file_that_the_agent_cannot_read_is_sent_once_by_the_command(
    agent: FakeAgent, inline: list[dict[str, Any]], cache: str
) -> None:
    agent.script = ['{"ok": true, "unreadable": true}\n']
    asked = request("run", cache, id="1" * 32, argv=["comment", "LAT-1"], files=[{"index": 1}])
    assert send_request(asked)["inline"]
    assert [each["id"] for each in (*agent.requests, *inline)] == ["1" * 32] * 2, "the same id: it runs once (I6)"


# --- operations of a program ---


def test_a_file_that_the_agent_cannot_read_is_sent_by_the_program_with_the_same_id(
    agent: FakeAgent, inline: list[dict[str, Any]], cache: str, capsys: pytest.CaptureFixture[str]
) -> None:
    agent.script = [
        '{"ok": true, "notices": ["a\\nb"], "status": 201, "payload": "[]"}\n',
        '{"ok": true, "unreadable": true}\n',
    ]
    answer = call(cache, "mcp", "create", "{}")
    assert (answer.status, answer.payload) == (201, "[]") and capsys.readouterr().err == "lattice-remote: a b\n"
    files = [{"index": 0}]
    assert call(cache, "mcp", "attach", "{}", files).status == 200
    first, second = agent.requests
    assert first["files"] == [] and second["files"] == files and first["id"] != second["id"]
    assert [each["id"] for each in inline] == [second["id"]]
    wanted = {"do": "call", "surface": "mcp", "name": "attach", "payload": "{}"}
    assert {name: second[name] for name in wanted} == wanted


def test_the_timeout_is_longer_once_the_agent_has_started_to_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_client, "FIRST_WORD_TIMEOUT_S", 0.2)
    ours, theirs = socket.socketpair()

    theirs.sendall(b'{"progress": null}\n')

    def answer() -> None:
        time.sleep(0.5)
        theirs.sendall(b'{"ok": true}\n')

    agent = threading.Thread(target=answer)
    agent.start()
    with ours, theirs:
        assert agent_client._exchange(ours, {}, None) == {"ok": True}
        agent.join()
