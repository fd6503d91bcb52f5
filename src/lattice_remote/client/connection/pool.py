"""Connections of one cache: one that follows, and one for each further token of a writing command.

A token comes from ``tokens.json`` or with a command (``LATTICE_TOKEN``). A refused one is replaced when the file
changes or a command brings another.

Unrequested edits are sent under the token of this cache's commands. After recent commands with several tokens the
author is unknown: such edits wait for the next command.
"""

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import AsyncIterator
from typing import Any

from lattice_remote.client import credentials, trusted_servers
from lattice_remote.client import credentials as private_files
from lattice_remote.client.cache.cache import Cache
from lattice_remote.client.cache.replicator import Replicator, RequestOnlySession
from lattice_remote.client.config import PRIVATE_DIRECTORY, Remote
from lattice_remote.client.connection.connection import Connection
from lattice_remote.client.trusted_servers import Server
from lattice_remote.errors import Rejected, RemoteError, StorageError

__all__ = ["ConnectionPool"]

LOOK_INTERVAL_S = 0.5
"""Interval of checks for changed tokens or servers."""
_WRITER_IDLE_S = 300.0
_TOKEN_LASTS_S = 600.0
"""Unused for this long, while others were used, a token is no longer recent."""
_NOTE_INTERVAL_S = 30.0
_RECENT = f"{PRIVATE_DIRECTORY}/tokens"
"""In the cache: an empty file for each recent token, named by its digest; its time is the last use."""


class RecentTokens:
    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._directory = cache.absolute(_RECENT)
        self._noted: dict[str, float] = {}  # digest -> time of the last record

    def note(self, token: str) -> None:
        digest, now = digest_of_token(token), time.monotonic()
        if now - self._noted.get(digest, -_NOTE_INTERVAL_S) < _NOTE_INTERVAL_S:
            return
        path = f"{_RECENT}/{digest}"
        with contextlib.suppress(OSError, StorageError):
            try:
                os.utime(self._cache.absolute(path))
            except FileNotFoundError:
                self._cache.replace(path, b"")
            self._noted[digest] = now

    def forget(self, token: str) -> None:
        self._noted.pop(digest_of_token(token), None)
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(self._directory, digest_of_token(token)))

    def digests(self) -> set[str]:
        """Return the digests of tokens used at most ten minutes before the last use of any."""
        uses: dict[str, float] = {}
        with contextlib.suppress(OSError):
            uses = {entry.name: entry.stat(follow_symlinks=False).st_mtime for entry in os.scandir(self._directory)}
        newest = max(uses.values(), default=0.0)
        return {digest for digest, used_at in uses.items() if newest - used_at <= _TOKEN_LASTS_S + _NOTE_INTERVAL_S}


def digest_of_token(token: str) -> str:
    return hashlib.sha256(b"lattice-remote token " + token.encode(errors="replace")).hexdigest()[:32]


class ConnectionPool:
    """Connections of one cache; ``start()`` and ``close()`` it once."""

    def __init__(self, remote: Remote, replicator: Replicator) -> None:
        self._remote = remote
        self.following = Connection(remote, replicator, None, on_heard=replicator.heard)
        self._writers: dict[str, tuple[Connection, float]] = {}
        self._recent = RecentTokens(replicator.cache)
        self._given: dict[str, str | None] = {}  # digest -> token from a command, None: the stored one
        self._last_stored: str | None = None
        self._watcher: asyncio.Task[None] | None = None

    def start(self, token: str | None, *, named: Server | None = None, prefer_given: bool = False) -> None:
        """Follow the project with the stored token, else ``token``; ``prefer_given`` reverses that."""
        self._last_stored = self.stored_token()
        connection = self.following
        connection.named = named
        connection.token = (token or self._last_stored) if prefer_given else (self._last_stored or token)
        connection.start()
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        for connection, _ in self._writers.values():
            await connection.close()
        await self.following.close()

    def stored_token(self) -> str | None:
        return credentials.stored(self._remote.url, self._remote.project)

    def choose(self, given: str | None, named: Server | None = None) -> None:
        """Follow with the stored token or a command's: the one that the server accepts."""
        connection, stored = self.following, self.stored_token()
        if stored != self._last_stored and self._last_stored is not None:
            self._recent.forget(self._last_stored)
        if named is not None and named != connection.named:
            connection.named = named
            connection.try_again()
        candidates = [token for token in (stored, given) if token]
        if not candidates and connection.token == self._last_stored:
            connection.use_token(None)  # logged out
        elif candidates and (connection.token is None or connection.token == self._last_stored != candidates[0]):
            connection.use_token(candidates[0])
        elif connection.is_refused and (others := [token for token in candidates if token != connection.token]):
            connection.use_token(others[0])
        self._last_stored = stored

    def writing(self, given: str | None) -> Connection:
        """Return the connection for a command's token. Raises Rejected."""
        token = given or self.stored_token()
        if token is None:
            raise Rejected(
                f"no token for {self._remote.url}; log in with: lattice remote login {self._remote.place}",
                code="REMOTE_UNAUTHORIZED",
            )
        if token == self.following.token:
            return self.following
        connection = self._writers[token][0] if token in self._writers else self.new_writer(token)
        self._writers[token] = (connection, time.monotonic())
        return connection

    def refusal(self, named: Server | None, token: str | None) -> RemoteError | None:
        """Return why a command may not use this server. An earlier command's ``LATTICE_REMOTE_URL`` does not count."""
        if self.following.named is None or self.following.named == named:
            return None  # decided where the token is sent
        try:
            trusted_servers.admit(self._remote.url, named, token)
        except RemoteError as error:
            return error
        return None

    def note_use(self, given: str | None) -> None:
        """Record a command's token; None: the stored one."""
        token = given or self._last_stored
        if token is not None:
            self._given[digest_of_token(token)] = None if token == self._last_stored else token
            self._recent.note(token)

    def for_edits(self) -> Connection | None:
        """Return the connection for unrequested edits; None if their author is unknown."""
        recent = self._recent.digests()
        self._given = {digest: given for digest, given in self._given.items() if digest in recent}
        if len(recent) != 1 or not self._given:
            return None  # several tokens, or another environment's
        try:
            return self.writing(*self._given.values())
        except RemoteError:
            return None  # the token is missing or its file unreadable: the next command reports it

    def has_several_tokens(self) -> bool:
        recent = self._recent.digests()
        return len(recent) > 1 or not recent <= self._given.keys()

    def new_writer(self, token: str) -> Connection:
        connection = Connection(self._remote, RequestOnlySession(), token, named=self.following.named)
        connection.start()
        return connection

    @contextlib.asynccontextmanager
    async def bulk(self, token: str) -> AsyncIterator[Connection]:
        connection = self.new_writer(token)
        try:
            yield connection
        finally:
            await connection.close()

    async def drop_idle(self) -> None:
        for token, (connection, used_at) in list(self._writers.items()):
            if time.monotonic() - used_at > _WRITER_IDLE_S and not connection.is_waiting:
                del self._writers[token]
                await connection.close()

    async def _watch(self) -> None:
        seen = _seen()
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            now = _seen()
            if now == seen:
                continue
            seen = now
            with contextlib.suppress(RemoteError):  # the next command reports an unreadable file
                self.choose(None)
            for connection in (self.following, *(connection for connection, _ in self._writers.values())):
                if connection.is_refused:
                    connection.try_again()


def _seen() -> tuple[Any, ...]:
    return tuple(private_files.signature(path) for path in (credentials.tokens_path(), trusted_servers.servers_path()))
