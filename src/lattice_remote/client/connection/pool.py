"""The connections of one cache: one that follows, and one for each further token with which commands write.

A token comes from ``tokens.json`` or with a command (``LATTICE_TOKEN``). A change of the file, or another token with
the next command, replaces one that was refused by itself.

What is sent without a command goes out under the token with which the commands of this cache come. Where they came
with several of late, the author is not known: it waits for the next command. Agents of several environments may
follow one cache, so the tokens of late are noted in the cache, by their digests.
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
from lattice_remote.client.cache.cache import PRIVATE_DIRECTORY
from lattice_remote.client.cache.replicator import Replicator, RequestOnlySession
from lattice_remote.client.config import Remote
from lattice_remote.client.connection.connection import Connection
from lattice_remote.client.trusted_servers import Server
from lattice_remote.errors import Rejected, RemoteError

__all__ = ["ConnectionPool"]

LOOK_INTERVAL_S = 0.5
"""How often to look whether the user's tokens or servers have changed."""
_WRITER_IDLE_S = 300.0
_TOKEN_LASTS_S = 600.0
"""A token with which no command has come for so long, while others came with another, is not in use any more."""
_NOTE_INTERVAL_S = 30.0
_RECENT = (PRIVATE_DIRECTORY, "tokens")
"""In the cache: an empty file for each token with which a command came, named by its digest, of that time."""


class RecentTokens:
    """The tokens with which the commands of a cache came of late, in all environments."""

    def __init__(self, cache: str) -> None:
        self._cache = cache
        self._directory = os.path.join(cache, *_RECENT)
        self._noted: dict[str, float] = {}  # digest -> when it was noted here

    def note(self, token: str) -> None:
        """A command has come with this token. What can't be noted, as in a cache that can only be read, is not."""
        digest, now = digest_of_token(token), time.monotonic()
        if now - self._noted.get(digest, -_NOTE_INTERVAL_S) < _NOTE_INTERVAL_S:
            return
        with contextlib.suppress(OSError):
            for depth in range(len(_RECENT)):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(os.path.join(self._cache, *_RECENT[: depth + 1]), 0o700)
            path = os.path.join(self._directory, digest)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600))
            os.utime(path)
            self._noted[digest] = now

    def forget(self, token: str) -> None:
        """This token was replaced by another of the same user."""
        self._noted.pop(digest_of_token(token), None)
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(self._directory, digest_of_token(token)))

    def digests(self) -> set[str]:
        """Return the digests of the tokens in use: each used within ten minutes before the last use of any."""
        uses: dict[str, float] = {}
        with contextlib.suppress(OSError):
            uses = {entry.name: entry.stat(follow_symlinks=False).st_mtime for entry in os.scandir(self._directory)}
        newest = max(uses.values(), default=0.0)
        return {digest for digest, used_at in uses.items() if newest - used_at <= _TOKEN_LASTS_S + _NOTE_INTERVAL_S}


def digest_of_token(token: str) -> str:
    """Return what stands for a token where it must not be: nobody can guess one from it."""
    return hashlib.sha256(b"lattice-remote token " + token.encode(errors="replace")).hexdigest()[:32]


class ConnectionPool:
    """``start()`` it in a running loop, ``close()`` it in the end."""

    def __init__(self, remote: Remote, follower: Replicator) -> None:
        self._remote = remote
        self.following = Connection(remote, follower, None, on_heard=follower.heard)
        """The link that keeps the files current."""
        self._writers: dict[str, tuple[Connection, float]] = {}
        self._recent = RecentTokens(follower.cache.directory)
        self._given: dict[str, str | None] = {}  # digest -> token that a command brought, None: the stored one
        self._last_stored: str | None = None
        self._watcher: asyncio.Task[None] | None = None

    def start(self, token: str | None, *, named: Server | None = None, prefer_given: bool = False) -> None:
        """Begin to follow, with the user's stored token before one that a command brought."""
        self._last_stored = self.stored_token()
        link = self.following
        link.named = named
        link.token = (token or self._last_stored) if prefer_given else (self._last_stored or token)
        link.start()
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def close(self) -> None:
        """End all connections."""
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        for link, _ in self._writers.values():
            await link.close()
        await self.following.close()

    def stored_token(self) -> str | None:
        """Return the token that this user keeps for the project."""
        return credentials.stored(self._remote.url, self._remote.project)

    def choose(self, given: str | None, named: Server | None = None) -> None:
        """Follow with the user's stored token, or with one that a command brought, whichever the server takes."""
        link, stored = self.following, self.stored_token()
        if stored != self._last_stored and self._last_stored is not None:
            self._recent.forget(self._last_stored)
        if named is not None and named != link.named:
            link.named = named
            link.try_again()
        candidates = [token for token in (stored, given) if token]
        if not candidates and link.token == self._last_stored:
            link.use_token(None)  # logged out
        elif candidates and (link.token is None or link.token == self._last_stored != candidates[0]):
            link.use_token(candidates[0])
        elif link.is_refused and (others := [token for token in candidates if token != link.token]):
            link.use_token(others[0])
        self._last_stored = stored

    def writing(self, given: str | None) -> Connection:
        """Return the link that writes with a command's token: the one that follows, or one of its own.

        Raises:
            Rejected: there is no token.
        """
        token = given or self.stored_token()
        if token is None:
            raise Rejected(
                f"no token for {self._remote.url}; log in with: lattice remote login {self._remote.place}",
                code="REMOTE_UNAUTHORIZED",
            )
        if token == self.following.token:
            return self.following
        link = self._writers[token][0] if token in self._writers else self.new_writer(token)
        self._writers[token] = (link, time.monotonic())
        return link

    def refusal(self, named: Server | None) -> RemoteError | None:
        """Return why a command may not speak to this server; None when it may.

        A server that only an earlier command named, by ``LATTICE_REMOTE_URL``, is not named by this one.
        """
        if self.following.named is None or self.following.named == named:
            return None  # decided where the token is sent
        try:
            trusted_servers.admit(self._remote.url, named)
        except RemoteError as error:
            return error
        return None

    def note_use(self, given: str | None) -> None:
        """A command has come with this token, None: with the user's stored one."""
        token = given or self._last_stored
        if token is not None:
            self._given[digest_of_token(token)] = None if token == self._last_stored else token
            self._recent.note(token)

    def live(self) -> Connection | None:
        """Return the link for what is sent without a command; None when its author isn't known.

        Never a token that no command of this cache came with: the user may have given it for another directory.
        """
        recent = self._recent.digests()
        self._given = {digest: given for digest, given in self._given.items() if digest in recent}
        if len(recent) != 1 or not self._given:
            return None  # of several, or of another environment
        try:
            return self.writing(*self._given.values())
        except RemoteError:
            return None  # there is no token, or the file that holds it can't be read: said to the next command

    def has_several_names(self) -> bool:
        """Whether the commands of late came with several tokens, or with one of another environment."""
        recent = self._recent.digests()
        return len(recent) > 1 or not recent <= self._given.keys()

    def new_writer(self, token: str) -> Connection:
        """Return a link of its own, started; the caller must close it."""
        link = Connection(self._remote, RequestOnlySession(), token, named=self.following.named)
        link.start()
        return link

    @contextlib.asynccontextmanager
    async def bulk(self, token: str) -> AsyncIterator[Connection]:
        """Yield a link for what is large: nothing else waits behind it."""
        link = self.new_writer(token)
        try:
            yield link
        finally:
            await link.close()

    async def drop_idle(self) -> None:
        """Close the links whose token nobody has used for long."""
        for token, (link, used_at) in list(self._writers.items()):
            if time.monotonic() - used_at > _WRITER_IDLE_S and not link.is_waiting:
                del self._writers[token]
                await link.close()

    async def _watch(self) -> None:
        """Notice that the user has logged in or out, or has named a server: nobody needs to tell."""
        seen = _seen()
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            now = _seen()
            if now == seen:
                continue
            seen = now
            with contextlib.suppress(RemoteError):  # a file that can't be read is said to the next command
                self.choose(None)
            for link in (self.following, *(link for link, _ in self._writers.values())):
                if link.is_refused:
                    link.try_again()


def _seen() -> tuple[Any, ...]:
    return tuple(private_files.signature(path) for path in (credentials.tokens_path(), trusted_servers.servers_path()))
