"""State that all nodes of a cluster share: tokens and the key of browsers' cookies.

The engine has the valid copy. Every node mirrors it into its own files, which a running server reads as before. An
administrator's command changes the engine first and its own node's file then, under the lock of the file. The other
nodes follow within half a second, so a revoked token's connections end everywhere within a second.
"""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from lattice_remote.errors import Misuse, StorageError
from lattice_remote.files import write_atomically
from lattice_remote.server.auth import signing_key
from lattice_remote.server.cluster.directory import ClusterDirectory
from lattice_remote.server.cluster.engine import Bucket, Engine, EngineUnavailable
from lattice_remote.server.cluster.settings import ClusterSettings
from lattice_remote.server.datadir import DataDir
from lattice_remote.server.tokens import SharedTokens, Token, decode_tokens, encode_tokens, locked, with_projects

__all__ = ["SharedState", "connect", "shared_tokens"]

_BUCKET = "lattice-shared"
_TOKENS, _KEY = "tokens", "signing-key"
_CHECK_S = 0.25
_FULL_CHECK_S = 5.0
"""Interval of checks that do not rely on the engine's report of a change."""
_COMMAND_S = 5.0
"""Time that a command waits for the engine."""

_log = logging.getLogger(__name__)


async def connect(settings: ClusterSettings) -> Engine:
    """Connect to a cluster's engine. Raises EngineUnavailable, or Misuse: a setting is unusable."""
    authorities = Path(settings.ca) if settings.ca else None
    try:
        tls = ssl.create_default_context(cafile=authorities)
    except OSError as error:
        raise Misuse(f"cannot read the certificates in {settings.ca}: {error.strerror or error}") from error
    return await Engine.connect(
        settings.servers,
        node=settings.node,
        credentials=Path(settings.credentials) if settings.credentials else None,
        tls=tls if any(server.startswith("tls:") for server in settings.servers) else None,
        replicas=settings.replicas,
        timeout_s=_COMMAND_S,
    )


class SharedState:
    """The shared state, made by ``open()``. Methods raise EngineUnavailable, or StorageError for this node's files."""

    def __init__(self, bucket: Bucket, max_bytes: int) -> None:
        self._bucket = bucket
        self._max_bytes = max_bytes

    @classmethod
    async def open(cls, engine: Engine) -> Self:
        return cls(await engine.kv(_BUCKET), engine.max_message_bytes)

    # --- tokens ---

    async def tokens(self) -> tuple[list[Token], int]:
        """Return the tokens and their revision; 0 if there are none yet."""
        entry = await self._bucket.get(_TOKENS)
        return ([], 0) if entry is None else (decode_tokens(entry.value), entry.revision)

    async def store_tokens(self, tokens: list[Token], revision: int) -> bool:
        """Replace the tokens of this revision; return False if another node was faster.

        Raises Misuse if they are too large for the engine.
        """
        content = encode_tokens(tokens)
        if len(content) > self._max_bytes:
            raise Misuse(
                f"all tokens together have {len(content)} bytes, and NATS takes {self._max_bytes}; nothing was changed"
            )
        if revision == 0:
            return await self._bucket.create(_TOKENS, content) is not None
        return await self._bucket.update(_TOKENS, content, revision) is not None

    async def rename_projects(self, former: Mapping[str, str]) -> None:
        """Replace former names of projects, by current names, in all tokens. Repeatable."""
        while True:
            tokens, revision = await self.tokens()
            renamed = [with_projects(each, {former.get(slug, slug) for slug in each.projects}) for each in tokens]
            if renamed == tokens or await self.store_tokens(renamed, revision):
                return

    # --- this node's files ---

    async def enter(self, data: DataDir) -> None:
        """Add this node's tokens, then take over the state of the cluster.

        The cluster's version of a token wins: a node that was away does not restore a revoked one. Repeatable.
        """
        await self._bucket.create(_KEY, await asyncio.to_thread(signing_key, data.signing_key))
        own = await asyncio.to_thread(_read_tokens, data)
        while True:
            shared, revision = await self.tokens()
            known = {token.id for token in shared}
            added = [token for token in own if token.id not in known]
            if revision and not added:
                break
            if await self.store_tokens([*shared, *added], revision):
                break
        await self._take_over(data)

    async def mirror(self, data: DataDir) -> None:
        """Keep this node's files equal to the shared state, until cancelled."""
        loop = asyncio.get_running_loop()
        revision, checked_at, said = -1, loop.time(), ""
        while True:
            try:
                newest = await self._bucket.revision()
                if newest != revision or loop.time() - checked_at > _FULL_CHECK_S:
                    await self._take_over(data)
                    revision, checked_at = newest, loop.time()
                said = ""
            except EngineUnavailable:
                pass  # the node reports it
            except StorageError as error:
                if error.message != said:
                    _log.error("the cluster's tokens are not taken over: %s", error.message)
                said = error.message
            await asyncio.sleep(_CHECK_S)

    async def _take_over(self, data: DataDir) -> None:
        """Write the files that differ. A command holds the lock from its change in the engine to its own write."""
        lock = await asyncio.to_thread(locked, data.tokens)
        try:
            tokens, revision = await self.tokens()
            key = await self._bucket.get(_KEY)
            if revision:
                await asyncio.to_thread(_write, data.tokens, encode_tokens(tokens))
            if key is not None:
                await asyncio.to_thread(_write, data.signing_key, key.value)
        finally:
            lock.release()


def _read_tokens(data: DataDir) -> list[Token]:
    try:
        return decode_tokens(data.tokens.read_bytes())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"cannot read {data.tokens}: {error.strerror}") from error


def _write(path: Path, content: bytes) -> None:
    try:
        with contextlib.suppress(FileNotFoundError):
            if path.read_bytes() == content:
                return
        write_atomically(path, content, mode=0o600)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error


# --- commands ---


@contextlib.contextmanager
def shared_tokens(settings: ClusterSettings) -> Iterator[SharedTokens]:
    """Connect a command to the tokens of its cluster. Raises StorageError: the engine is out of reach."""
    with asyncio.Runner() as runner:
        engine: Engine | None = None
        try:
            engine = runner.run(connect(settings))
            runner.run(_require_member(engine, settings))
            state = runner.run(SharedState.open(engine))
            yield _CommandTokens(runner, state)
        except EngineUnavailable as error:
            raise StorageError(f"{error.message}; nothing was changed", code=error.code) from error
        finally:
            if engine is not None:
                runner.run(engine.close())


async def _require_member(engine: Engine, settings: ClusterSettings) -> None:
    await (await ClusterDirectory.open(engine)).require_member(settings.cluster)


class _CommandTokens:
    def __init__(self, runner: asyncio.Runner, state: SharedState) -> None:
        self._runner = runner
        self._state = state
        self._revision = 0

    def load(self) -> list[Token]:
        tokens, self._revision = self._runner.run(self._state.tokens())
        return tokens

    def store(self, tokens: list[Token]) -> bool:
        try:
            return self._runner.run(self._state.store_tokens(tokens, self._revision))
        except EngineUnavailable as error:
            why = "it is unknown whether the cluster has the change; see: lattice-remote token list --all"
            raise StorageError(f"{error.message}; {why}", code="REMOTE_UNKNOWN_OUTCOME") from error
