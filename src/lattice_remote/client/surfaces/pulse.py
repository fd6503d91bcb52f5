"""Tells whoever waits that the cache has changed, and whether the server is in reach; busy only while somebody waits.

What is looked at is the one small file that every change of the cache rewrites (I5). So it makes no difference who
applies the changes: the agent, or a command that does without it.
"""

import json
import os
import threading
import time
from types import TracebackType
from typing import Self

from lattice_remote.client.agent_client import agent_enabled, ask, request
from lattice_remote.errors import RemoteError

__all__ = ["Pulse", "State"]

_LOOK_S = 0.1
_ASK_S = 2.0
_ASK_WITHOUT_AGENT_S = 5.0
"""Without an agent asking means to connect, and to bring the cache up to date: nobody else does."""

State = tuple[str, str]
"""A text that differs after each change, and why the cache may be behind, "" when it is not."""


class Pulse:
    """Of one cache. ``with pulse: pulse.wait(...)``, in any number of threads."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._file = os.path.join(directory, "cache_state.json")
        self._changed = threading.Condition()
        self._waiting = 0
        self._state: State = ("", "")
        self._seen: tuple[int, int] | None = None  # the state file's signature when it was last read
        self._told = ""  # what it said
        self._started = False
        self._closed = False

    def __enter__(self) -> Self:
        with self._changed:
            self._waiting += 1
            self._state = (self._version(), self._state[1])
            self._changed.notify_all()
            if not self._started:
                self._started = True
                for work in (self._look, self._ask):
                    threading.Thread(target=work, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        with self._changed:
            self._waiting -= 1

    def close(self) -> None:
        """Wake everybody who waits; they are told None from now on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def wait(self, known: State | None, timeout_s: float) -> State | None:
        """Return the state once it differs from ``known``, or after the time; None when the pulse was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._state != known, timeout_s)
            return None if self._closed else self._state

    def _goes_on(self, delay_s: float) -> bool:
        """Return True after the delay, as soon as somebody waits; False once the pulse was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed, delay_s)
            self._changed.wait_for(lambda: self._closed or self._waiting)
            return not self._closed

    def _look(self) -> None:
        while self._goes_on(_LOOK_S):
            version = self._version()
            with self._changed:
                if version != self._state[0]:
                    self._state = (version, self._state[1])
                    self._changed.notify_all()

    def _version(self) -> str:
        """Return what the state file says of the files; it is also rewritten, now and then, without a change."""
        try:
            status = os.stat(self._file)
            signature = (status.st_ino, status.st_mtime_ns)
            if signature != self._seen:
                with open(self._file, "rb") as file:
                    state = json.loads(file.read())
                self._seen, self._told = signature, f"{state['mark']}-{state['seq']}-{len(state['wanted'])}"
        except (OSError, ValueError, KeyError, TypeError):
            return ""
        return self._told

    def _ask(self) -> None:
        delay_s = 0.0
        while self._goes_on(delay_s):
            delay_s = _ASK_S if agent_enabled() else _ASK_WITHOUT_AGENT_S
            trouble = self._trouble()
            with self._changed:
                if trouble != self._state[1]:
                    self._state = (self._state[0], trouble)
                    self._changed.notify_all()

    def _trouble(self) -> str:
        """Return why the cache may be behind. Asking keeps an agent running, and starts one where the last has left."""
        try:
            answer = ask(request("status" if agent_enabled() else "pull", self._directory))
        except RemoteError as failure:
            return failure.message
        except OSError as failure:
            return f"the background agent can't be asked: {failure}"
        error, age_s = answer.get("error"), answer.get("age_s")
        why = f"the server is out of reach ({error})" if error else answer.get("trouble")
        if not why or age_s is None:
            return why or ""
        return f"{why}; this is the board of {time.strftime('%H:%M', time.localtime(time.time() - age_s))}"
