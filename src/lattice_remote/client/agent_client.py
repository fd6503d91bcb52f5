"""Command side of the agent's socket: one JSON line each way. Standard library only.

The steps run in this process if no agent is possible, or if the agent refuses a request from another environment.
"""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any, NamedTuple

from lattice_remote.client import agent_runtime, credentials
from lattice_remote.client.config import detachment, identify
from lattice_remote.errors import (
    ConnectionFailed,
    RemoteError,
    StorageError,
    error_from_code,
    one_line,
    unknown_if_sent,
)
from lattice_remote.files import SAFE

__all__ = [
    "Progress",
    "SurfaceResponse",
    "agent_enabled",
    "call",
    "describe_age",
    "ensure_current",
    "pass_request_id",
    "request",
    "request_id",
    "run_inline",
    "send_if_running",
    "send_request",
    "send_to_agent",
    "stay_connected",
]

AGENT_ENV = "LATTICE_REMOTE_AGENT"
REQUEST_ENV = "LATTICE_REMOTE_REQUEST"
"""See ``launcher.script``."""
START_TIMEOUT_S = 10.0
FIRST_WORD_TIMEOUT_S = 2.0
"""A live agent acknowledges a request within this time."""
SILENCE_TIMEOUT_S = 10.0
"""It reports progress every two seconds."""
_ATTEMPTS = 3

Progress = Callable[[dict[str, Any]], None]
"""Called with ``{"what": ..., "done": n, "total": n}`` while a request takes long."""


_said: set[str] = set()
"""Messages already printed: a program may ask thousands of times."""
_passed: list[tuple[str, str, str]] = []
"""Passed by a launcher for the next command."""
_starting = threading.Lock()


class _AgentLost(Exception):
    """The agent exited before it answered."""


class _AgentSilent(Exception):
    """The agent is stopped, or hangs."""


def request(do: str, directory: str, **fields: Any) -> dict[str, Any]:
    """Return a request with this process's token and server. Raises RemoteError."""
    token, named = (os.environ.get(name, "").strip() or None for name in ("LATTICE_TOKEN", "LATTICE_REMOTE_URL"))
    with unknown_if_sent("first_sent_at" in fields):
        cache = identify(directory)
    return {"do": do, "directory": directory, "cache": cache, "token": token, "named": named, **fields}


def request_id() -> dict[str, Any]:
    """Return a new command's ``id``, so that it runs once even if the agent is killed (I6).

    A launcher whose warm process was killed passes the id on, with the time of the first attempt.
    """
    pass_request_id(os.environ.pop(REQUEST_ENV, ""))
    given, _, began = _passed.pop() if _passed else ("", "", "")
    if re.fullmatch("[0-9a-f]{32}", given) is None:
        return {"id": agent_runtime.new_request_id()}
    return {"id": given, **({"first_sent_at": float(began)} if re.fullmatch(r"[0-9]{1,15}\.[0-9]+", began) else {})}


def pass_request_id(text: str) -> None:
    """Use ``ID`` or ``ID:SECONDS`` for this process's next command only."""
    if text:
        _passed[:] = [text.partition(":")]


def send_request(request: dict[str, Any], on_progress: Progress | None = None) -> dict[str, Any]:
    """Return the answer to a request, starting an agent if needed.

    If the agent ends, a new one gets the request: a command's id makes it run once (I6).
    """
    if not agent_enabled():
        return run_inline(request, on_progress)
    began = agent_runtime.boot_time()
    for _ in range(_ATTEMPTS):
        try:
            place = agent_runtime.locate()
            stream = _connect(place) or _connect_anew()
        except (StorageError, OSError) as error:
            _warn_without_agent(error)
            return run_inline(request, on_progress)  # no place for a socket
        try:
            answer = _exchange(stream, {**request, "agent": place.name}, on_progress)
            if answer.get("not_mine") or answer.get("unreadable"):  # another environment, or other rights to a file
                return run_inline(request, on_progress)
            return _checked(answer)
        except _AgentLost:
            request.setdefault("first_sent_at", began)  # the earlier agent may have sent it
        except _AgentSilent:
            request.setdefault("first_sent_at", began)
            _warn_once(f"{_silent(place)}; this command runs without it")
            return run_inline(request, on_progress)  # under the same id, in case the agent recovers
        finally:
            stream.close()
    raise ConnectionFailed("the background agent ends at every request; see its log: lattice remote agent status")


def agent_enabled() -> bool:
    return hasattr(socket, "AF_UNIX") and os.environ.get(AGENT_ENV, "").lower() not in {"off", "no", "0", "false"}


def send_if_running(request: dict[str, Any]) -> dict[str, Any] | None:
    place = _place()
    return None if place is None else send_to_agent(place, request)


def send_to_agent(place: agent_runtime.Runtime, request: dict[str, Any]) -> dict[str, Any] | None:
    """Return one agent's answer; None if it is not running. Raises ConnectionFailed."""
    stream = _connect(place)
    if stream is None:
        return None
    try:
        return _checked(_exchange(stream, {**request, "agent": place.name}, None))
    except _AgentLost:
        return None
    except _AgentSilent:
        raise ConnectionFailed(f"{_silent(place)}; commands run without it until that process ends") from None
    finally:
        stream.close()


def stay_connected() -> AbstractContextManager[object]:
    place = _place()
    stream = None if place is None else _connect(place)
    return nullcontext() if stream is None else closing(stream)


def _place() -> agent_runtime.Runtime | None:
    try:
        return agent_runtime.locate() if agent_enabled() else None
    except StorageError:
        return None


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    if answer.get("ok"):
        return answer
    message = str(answer.get("message"))
    if answer.get("code") == "REMOTE_UNAUTHORIZED" and os.environ.get("LATTICE_TOKEN", "").strip():
        message += "; the token of LATTICE_TOKEN was used, not a stored one"
    raise error_from_code(message, answer.get("code"))


def run_inline(request: dict[str, Any], on_progress: Progress | None = None) -> dict[str, Any]:
    from lattice_remote.client.agent.service import serve_once
    from lattice_remote.client.guard import allow_writes

    with allow_writes(""):  # a serving command may send while under its guard
        return _checked(serve_once(request, on_progress))


class SurfaceResponse(NamedTuple):
    status: int
    payload: str


def call(
    directory: str, surface: str, name: str, payload: str, files: list[dict[str, Any]] | None = None
) -> SurfaceResponse:
    """Run an operation on the server; its change is then in the cache. Thread-safe; raises RemoteError.

    Notices go to stderr.
    """
    # The id is created here, so that it runs once even if the agent is killed and asked again (I6).
    asked = request("call", directory, id=agent_runtime.new_request_id(), surface=surface, name=name, payload=payload)
    asked["files"] = files or []
    answer = send_request(asked)
    for notice in answer["notices"]:
        sys.stderr.write(f"lattice-remote: {one_line(notice)}\n")
    return SurfaceResponse(answer["status"], answer["payload"])


def _exchange(stream: socket.socket, request: dict[str, Any], on_progress: Progress | None) -> dict[str, Any]:
    stream.settimeout(FIRST_WORD_TIMEOUT_S)
    try:
        stream.sendall(json.dumps(request).encode() + b"\n")
        with stream.makefile("rb") as lines:
            for line in lines:
                stream.settimeout(SILENCE_TIMEOUT_S)
                answer: dict[str, Any] = json.loads(line)
                if "progress" not in answer:
                    return answer
                if on_progress is not None and answer["progress"]:
                    on_progress(answer["progress"])
    except TimeoutError as error:
        raise _AgentSilent from error
    except (OSError, ValueError) as error:
        raise _AgentLost from error
    raise _AgentLost


def _connect(place: agent_runtime.Runtime) -> socket.socket | None:
    stream = socket.socket(socket.AF_UNIX)
    try:
        agent_runtime.check(place)
        agent_runtime.check_socket(place)
        stream.connect(place.socket)
    except (StorageError, OSError):
        stream.close()
        return None
    return stream


def _warn_without_agent(error: OSError | StorageError) -> None:
    why = error.message if isinstance(error, StorageError) else error
    _warn_once(
        f"no background agent ({why}): commands run without it, more slowly; "
        f"set {agent_runtime.DIRECTORY_ENV} to another directory, or {AGENT_ENV}=off"
    )


def _warn_once(line: str) -> None:
    if line not in _said:
        _said.add(line)
        sys.stderr.write(f"lattice-remote: {line}\n")


def _silent(place: agent_runtime.Runtime) -> str:
    return f"the background agent, process {_agent_pid(place)}, does not answer"


def _agent_pid(place: agent_runtime.Runtime) -> str:
    try:
        with open(place.pid, encoding="ascii") as file:
            return str(int(file.read()))
    except (OSError, ValueError):
        return f"of {place.socket}"


def _connect_anew() -> socket.socket:
    with _starting:
        return _connect(agent_runtime.locate()) or _start()


def _start() -> socket.socket:
    """Start an agent and wait for its socket. Raises StorageError."""
    place = agent_runtime.locate()
    agent_runtime.prepare(place)
    log = os.open(place.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | SAFE, 0o600)
    os.utime(log)  # keeps a starting agent from removing it as left over
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lattice_remote.client.agent.main"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env=_agents_environment(place),
            start_new_session=True,
        )
    finally:
        os.close(log)
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        stream = _connect(agent_runtime.locate())  # the configuration directory may have been created since
        if stream is not None:
            process.returncode = 0  # keeps Popen from warning about an unawaited child
            return stream
        if process.poll():
            break  # it failed; one that found another agent exits with 0
        time.sleep(0.005)
    raise StorageError(f"the background agent did not start; see {place.log}")


def _agents_environment(place: agent_runtime.Runtime) -> dict[str, str]:
    per_request = {"LATTICE_TOKEN", "LATTICE_REMOTE_URL", "LATTICE_ROOT"}
    return {
        **{name: value for name, value in os.environ.items() if name not in per_request},
        **agent_runtime.absolute_paths(),
        "XDG_CONFIG_HOME": os.path.dirname(credentials.directory()),
        agent_runtime.DIRECTORY_ENV: place.directory,
    }


def ensure_current(
    directory: str,
    say: Callable[[str], object],
    on_progress: Progress | None = None,
    *,
    is_required: bool = False,
) -> str | None:
    """Bring the cache up to date if possible; else ``say`` its age in one line, and return the line.

    Raises:
        RemoteError: the cache was never filled; or it is not current, and that is required.
    """
    if (why := detachment(directory)) is not None:
        if is_required:
            raise RemoteError(why, code="REMOTE_GUARD")
        say(f"lattice-remote: {one_line(why)}")
        return one_line(why)
    answer = send_request(request("ready", directory), on_progress)
    for notice in answer["notices"]:
        say(f"lattice-remote: {one_line(notice)}")
    if answer["current"]:
        return None
    if is_required or not answer["filled"]:
        raise RemoteError(answer["message"], code=answer["code"])
    age = "data of unknown age" if answer["age_s"] is None else f"data from {describe_age(answer['age_s'])} ago"
    line = f"{one_line(answer['message'])}; showing {age} (change {answer['seq']})"
    say(f"lattice-remote: {line}")
    return line


def describe_age(age_s: float) -> str:
    if age_s < 120:
        return f"{age_s:.0f} s"
    if age_s < 7200:
        return f"{age_s / 60:.0f} min"
    if age_s < 172800:
        return f"{age_s / 3600:.0f} h"
    return f"{age_s / 86400:.0f} days"
