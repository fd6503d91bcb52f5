"""``lattice remote push``: sending of edited plans and notes, or of a whole project after ``add``."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from filelock import FileLock, Timeout

from lattice_remote.client import credentials, trusted_servers
from lattice_remote.client.agent_client import Progress
from lattice_remote.client.agent_runtime import boot_time, new_request_id
from lattice_remote.client.cache.cache import LOCK_FILE, Cache
from lattice_remote.client.cache.first_fill import FirstFill
from lattice_remote.client.cache.rescued_files import RescuedFiles
from lattice_remote.client.cache.verify import Reading, is_settled, keep_readings, read_all
from lattice_remote.client.cli.common import (
    Json,
    Name,
    here,
    notify,
    print_result,
    progress,
    send_request,
    unpushed,
    warn_of_tracking,
)
from lattice_remote.client.config import (
    PRIVATE_DIRECTORY,
    UNPUSHED_FILE,
    Remote,
    check_name,
    is_unpushed,
    read_remote,
    write_remote,
)
from lattice_remote.client.trusted_servers import Server
from lattice_remote.errors import ConnectionFailed, Misuse, Rejected, RemoteError, StorageError, one_line
from lattice_remote.files import write_atomically
from lattice_remote.output import counted
from lattice_remote.protocol.messages import Push, Pushed, Refused, Welcome
from lattice_remote.protocol.paths import is_editable

if TYPE_CHECKING:
    from lattice_remote.client.connection.connection import Connection
import hashlib
import json
import stat
import tempfile
from collections.abc import Callable
from dataclasses import field
from typing import IO

from lattice_remote.client.config import REMOTE_FILE, STATE_FILE
from lattice_remote.files import READ, Signature, hash_descriptor, signature_of
from lattice_remote.protocol.bundle import END, MAGIC, Layout, head_of
from lattice_remote.protocol.messages import Entry
from lattice_remote.protocol.operations import digest_of
from lattice_remote.protocol.paths import is_replicated

__all__ = ["Pack", "Survey", "app", "await_push", "connected", "push_project", "stay_local", "survey"]

_REACH_S = 10.0
_ATTEMPT_FILE = f"{PRIVATE_DIRECTORY}/pushing.json"
_COUNTED = {
    "tasks": "tasks",
    "archived_tasks": "archive/tasks",
    "event_logs": "events",
    "plans": "plans",
    "notes": "notes",
    "artifacts": "artifacts/meta",
    "sessions": "sessions",
}
"""Counts in the output and the directories that they cover."""

app = typer.Typer()


@app.command()
def push(
    name: Name = "",
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, without sending.")] = False,
    confirm: Annotated[
        bool, typer.Option("--confirm", help="Also send withheld edits, see lattice remote status.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Send edited plans and notes, or after add the whole project.

    Example: lattice remote push --dry-run
    """
    if (waiting := unpushed(name)) is not None:
        warn_of_tracking(waiting[0])
        (_plan_project if dry_run else _push_project)(waiting[0], as_json=as_json)
        return
    directory, _ = here(name)
    if dry_run:
        unsent = send_request("status", directory)["unsent_edits"]
        if as_json:
            print_result({"dry_run": True, "unsent_edits": unsent})
        else:
            typer.echo("\n".join(map(one_line, unsent)) or "Nothing to send.")
        return
    warn_of_tracking(directory)
    answer = send_request("push", directory, confirm=confirm)
    if as_json:
        print_result(answer)
    else:
        for sent in answer["sent"]:
            typer.echo(f"{one_line(sent['path'])}: {sent['outcome']}")
        notify(*answer["notices"])
        if not answer["sent"]:
            typer.echo("Nothing to send.")
    if any(sent["outcome"] in ("conflict", "refused") for sent in answer["sent"]):
        raise typer.Exit(1)


def _plan_project(directory: str, *, as_json: bool) -> None:
    remote, found = read_remote(directory, UNPUSHED_FILE), survey(directory)
    trouble = asyncio.run(_trouble(remote))
    counts = {label: found.count(place) for label, place in _COUNTED.items()}
    if as_json:
        data = {"dry_run": True, **counts, "files": len(found.files), "bytes": found.bytes}
        print_result({**data, "skipped": found.skipped, "hooks": found.has_hooks, "trouble": trouble})
    else:
        typer.echo(f"Would push to {remote.url}, project {remote.project}:")
        parts = [counted(n, label.replace("_", " ").removesuffix("s")) for label, n in counts.items() if n]
        typer.echo(f"  {', '.join([*parts, counted(len(found.files), 'file')])}, {found.bytes} bytes")
        if found.has_hooks:
            typer.echo("  omitted: the hooks of config.json, unless the server's administrator allows them")
        if found.skipped:
            typer.echo(f"  omitted, not part of a project: {', '.join(map(one_line, found.skipped[:10]))}")
        typer.echo(f"  {one_line(trouble or 'the server would accept it: its project is empty')}")
    if trouble:
        raise typer.Exit(1)


async def _trouble(remote: Remote) -> str | None:
    try:
        async with connected(remote, credentials.from_environment()) as (_, welcome):
            _require_empty(welcome)
    except (ConnectionFailed, Rejected, Misuse) as error:
        return error.message
    return None


def _push_project(directory: str, *, as_json: bool) -> None:
    with progress("pushing") as show:
        done = asyncio.run(push_project(directory, show))
    answer = done.answer
    with contextlib.suppress(RemoteError):  # the agent follows, and fetches what the server omitted or repaired
        send_request("pull", directory)
    if as_json:
        data = {"tasks": answer.tasks, "archived": answer.archived, "files": answer.files, "seq": answer.seq}
        print_result({**data, "notes": answer.notes, "kept": done.kept})
        return
    typer.echo(
        f"Pushed {counted(answer.tasks, 'task')}, {answer.archived} archived, {counted(answer.files, 'file')} to "
        f"{done.remote.url}, project {done.remote.project}; this directory is its cache now, at change {answer.seq}."
    )
    notify(*answer.notes)
    notify(*(f"{path} was changed here after it was sent; see: lattice remote rescued" for path in done.kept))


class _Attempt(msgspec.Struct):
    id: str
    digest: bytes
    size: int
    asked_at: float
    """Seconds since 1970."""
    entries: dict[str, bytes]
    """Digest of each sent file."""


@dataclass(frozen=True, slots=True)
class PushResult:
    """Result of a push; ``kept`` are files that changed since, and were rescued."""

    remote: Remote
    answer: Pushed
    kept: list[str]


async def await_push(directory: str, name: str, server: Server, project: str, token: str | None, *, own: str) -> Remote:
    """Prepare a local project (``own`` is the evidence) for a push into an empty project.

    Raises:
        Misuse: the server's project is not empty; nothing was changed on either side.
        RemoteError: the server is unreachable or refuses. Nothing was changed.
    """
    remote = Remote(check_name(name), server.url, project)
    survey(directory)
    async with connected(remote, token or credentials.from_environment(), server) as (_, welcome):
        _require_empty(welcome, own)
    trusted_servers.record(server)
    if token is not None:
        credentials.store(server.url, project, token)
    write_remote(directory, remote, UNPUSHED_FILE)
    return remote


def stay_local(directory: str) -> None:
    """Cancel a prepared push. Raises Misuse while it runs."""
    with _alone(directory):
        _forget(directory, _ATTEMPT_FILE, UNPUSHED_FILE)
    _forget(directory, LOCK_FILE)
    with contextlib.suppress(OSError):  # rescued files of an attempt to push stay
        os.rmdir(os.path.join(directory, PRIVATE_DIRECTORY))


def _forget(directory: str, *names: str) -> None:
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, name))


def _require_empty(welcome: Welcome, own: str = "") -> None:
    if welcome.used:
        raise Misuse(
            f"project {welcome.project} on the server has {welcome.used}, and this directory a project of its own"
            f"{f' ({own})' if own else ''}; nothing was touched: push to an empty project, or add the remote "
            "in another directory"
        )


@contextlib.asynccontextmanager
async def connected(
    remote: Remote, token: str | None, named: Server | None = None
) -> AsyncIterator[tuple["Connection", Welcome]]:
    """Yield an open connection for requests only. Raises ConnectionFailed, Rejected."""
    token = token or credentials.stored(remote.url, remote.project)
    if token is None:
        raise Rejected(
            f"no token for {remote.url}; log in with: lattice remote login {remote.place}", code="REMOTE_UNAUTHORIZED"
        )
    named = named or trusted_servers.from_environment(os.environ.get(trusted_servers.URL_ENV))
    from lattice_remote.client.cache.replicator import RequestOnlySession
    from lattice_remote.client.connection.connection import Connection

    connection = Connection(remote, RequestOnlySession(), token, named=named)
    connection.start()
    try:
        await connection.changed.until(
            lambda: connection.welcome is not None or connection.failed_attempts > 0, _REACH_S
        )
        if connection.welcome is None:
            raise (
                connection.error if connection.is_refused and connection.error is not None else connection.unreachable()
            )
        yield connection, connection.welcome
    finally:
        await connection.close()


async def push_project(directory: str, show: Progress | None) -> PushResult:
    """Push the prepared project in ``directory``, a ``.lattice``; afterwards it is a cache.

    Atomic: after an interruption nothing or everything is done here, and another call resumes.

    Raises:
        Misuse: the server's project is no longer empty, or files are being changed; nothing has changed.
        Rejected: the server refuses this project; nothing has changed.
        ConnectionFailed: unreachable; ``sent`` says that it may have taken effect.
        StorageError: a file cannot be read or written.
    """
    with _alone(directory):
        return await _pushed(directory, show or (lambda _: None))


@contextlib.contextmanager
def _alone(directory: str) -> Iterator[None]:
    """Hold the future cache's lock, against another push or an agent. Raises Misuse."""
    _require_waiting(directory)
    lock = FileLock(os.path.join(directory, LOCK_FILE), thread_local=False, mode=0o600)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise Misuse("another lattice remote push is running in this directory: wait for it") from None
    except OSError as error:
        raise StorageError(f"cannot lock {directory}: {error.strerror}") from error
    try:
        _require_waiting(directory)
        yield
    finally:
        lock.release()


def _require_waiting(directory: str) -> None:
    if not is_unpushed(directory):
        raise Misuse("this directory no longer waits to be pushed; see: lattice remote status")


async def _pushed(directory: str, report: Progress) -> PushResult:
    from lattice_remote.client.connection.upload import Source, upload

    remote = read_remote(directory, UNPUSHED_FILE)
    async with connected(remote, credentials.from_environment()) as (connection, welcome):
        if (earlier := _read_attempt(directory)) is not None:
            report({"what": "asking for the last attempt", "done": 0, "total": 1})
            if (answer := await _ask(connection, directory, earlier)) is not None:
                _keep_hooks(directory, remote, answer)
                return PushResult(remote, answer, _become_cache(directory, remote, earlier.entries, {}))
        _require_empty(welcome)
        found = await asyncio.to_thread(survey, directory)
        with await asyncio.to_thread(Pack.of, directory, found, _reporter(report, "reading")) as pack:
            source = Source(pack.file.fileno(), pack.size, pack.digest)
            await upload(connection, source, purpose="project", on_progress=_reporter(report, "sending"))
            if (changed := _changed(directory, found)) is not None:
                raise Misuse(f"{changed} was changed while the project was sent; nothing was done: push again")
            entries = {path: entry.digest for path, entry in pack.entries.items()}
            attempt = _Attempt(new_request_id(), pack.digest, pack.size, time.time(), entries)
            _write_attempt(directory, attempt)
            report({"what": "checking on the server", "done": 0, "total": 1})
            answer = await _ask(connection, directory, attempt)
            if answer is None:
                raise ConnectionFailed("the server has forgotten what was sent; push again")
            _keep_hooks(directory, remote, answer)
            texts = {path: pack.content(path) for path in pack.entries if is_editable(path)}
            return PushResult(remote, answer, _become_cache(directory, remote, entries, texts, pack.readings))


async def _ask(connection: "Connection", directory: str, attempt: _Attempt) -> Pushed | None:
    """Request a push; return its answer, None if it certainly was not carried out and must restart.

    Raises:
        Rejected: the server refuses it, or no longer accepts it.
        ConnectionFailed: as for ``Connection.send_request``.
    """
    age_s = max(0.0, time.time() - attempt.asked_at)
    first_sent_at = boot_time() - age_s if age_s > 1 else None
    answer = await connection.send_request(Push(attempt.id, attempt.digest, attempt.size), first_sent_at=first_sent_at)
    match answer:
        case Pushed():
            return answer
        case Refused(code="REMOTE_NOT_FOUND" | "REMOTE_UNKNOWN_OUTCOME") if not (
            connection.welcome and connection.welcome.used
        ):
            _forget(directory, _ATTEMPT_FILE)
            return None
        case Refused(code="REMOTE_BUSY"):
            raise Rejected(answer.message, code=answer.code)
        case Refused():
            _forget(directory, _ATTEMPT_FILE)
            raise Rejected(answer.message, code=answer.code)
        case _:
            raise ConnectionFailed("unexpected response from the server", sent=True)


def _changed(directory: str, found: "Survey") -> str | None:
    now = survey(directory).files
    return next(
        (path for path in sorted(now.keys() | found.files.keys()) if now.get(path) != found.files.get(path)), None
    )


def _reporter(report: Progress, what: str) -> Any:
    return lambda done, total: report({"what": f"{what} (KiB)", "done": done >> 10, "total": max(1, total >> 10)})


def _keep_hooks(directory: str, remote: Remote, answer: Pushed) -> None:
    if any("hooks" in note for note in answer.notes):
        cache = Cache(directory, remote)
        cache.prepare()
        reason = "the server has it without its hooks; your own is kept"
        RescuedFiles(cache).add("config.json", cache.read("config.json"), reason)


def _become_cache(
    directory: str,
    remote: Remote,
    entries: Mapping[str, bytes],
    texts: Mapping[str, bytes],
    earlier: Mapping[str, Reading] | None = None,
) -> list[str]:
    """Turn the directory into a cache; return the files that changed since, which are rescued.

    ``remote.json`` is written last: until then this can be repeated. ``entries`` has the digest of each pushed file; a
    plan or notes not in ``texts`` is taken from disk if unchanged. Unchanged ``earlier`` readings are not repeated.
    """
    cache = Cache(directory, remote)
    cache.prepare()
    kept, rescued, bases = list[str](), RescuedFiles(cache), FirstFill(cache)
    readings = read_all(cache, earlier)
    for path, reading in readings.items():
        if is_editable(path):
            text = texts.get(path)
            if text is None and reading.digest == entries.get(path):
                text = cache.read(path)
            if text is not None:
                # A file that differs from this base is an edit, and will be sent.
                bases.add_base(path, text)
        elif reading.digest != entries.get(path):
            content = cache.read(path)
            rescued.add(path, content, "changed here while the project was pushed; that version is kept")
            kept.append(path)
    bases.close()
    keep_readings(cache, {path: each for path, each in readings.items() if each.digest == entries.get(path)})
    write_remote(directory, remote)
    _forget(directory, _ATTEMPT_FILE, UNPUSHED_FILE)
    return sorted(kept)


def _read_attempt(directory: str) -> _Attempt | None:
    try:
        with open(os.path.join(directory, _ATTEMPT_FILE), "rb") as file:
            return msgspec.json.decode(file.read(), type=_Attempt)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise StorageError(f"cannot read {_ATTEMPT_FILE}: {error}; start over with: lattice remote remove") from error


def _write_attempt(directory: str, attempt: _Attempt) -> None:
    path = os.path.join(directory, _ATTEMPT_FILE)
    try:
        write_atomically(path, msgspec.json.encode(attempt), temporary=path + ".tmp", is_parent_synced=False)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error


_PIECE_BYTES = 1 << 20
_BOOKKEEPING = frozenset({"locks", ".gitignore", REMOTE_FILE, STATE_FILE, PRIVATE_DIRECTORY})
"""Lattice's locks and our own files, which are not part of the project."""


@dataclass(frozen=True, slots=True)
class Survey:
    files: dict[str, Signature]
    """Files to send."""
    skipped: list[str]
    """Temporary and backup files, links."""
    bytes: int
    has_hooks: bool

    def count(self, directory: str) -> int:
        return sum(path.rpartition("/")[0] == directory for path in self.files)


def survey(directory: str) -> Survey:
    """List a project's files. Raises Misuse if the server would refuse it, StorageError."""
    files: dict[str, Signature] = {}
    skipped: list[str] = []
    layout = Layout(max_bytes=1 << 62)
    try:
        for path, status in _walk(directory, skipped):
            layout.add(path, status.st_size)
            files[path] = signature_of(status)
        has_hooks = _has_hooks(directory)
    except OSError as error:
        raise StorageError(f"cannot read {error.filename or directory}: {error.strerror}") from error
    if "config.json" not in files:
        raise Misuse("config.json not found: this is not a lattice project")
    return Survey(files, sorted(skipped), layout.bytes, has_hooks)


def _walk(directory: str, skipped: list[str]) -> Iterator[tuple[str, os.stat_result]]:
    pending, found = [""], list[str]()
    while pending:
        folder = pending.pop()
        for entry in os.scandir(os.path.join(directory, folder)):
            path = folder + entry.name
            if entry.is_dir(follow_symlinks=False) and is_replicated(path + "/x.md"):
                pending.append(path + "/")
            elif entry.is_file(follow_symlinks=False) and is_replicated(path):
                found.append(path)
            elif path not in _BOOKKEEPING:
                skipped.append(path)
    for path in sorted(found):
        yield path, os.lstat(os.path.join(directory, path))


def _has_hooks(directory: str) -> bool:
    try:
        with open(os.path.join(directory, "config.json"), "rb") as file:
            return bool(json.load(file).get("hooks"))
    except (FileNotFoundError, ValueError, AttributeError):
        return False  # the server reports the problem


@dataclass
class Pack:
    """A project's bundle in an unnamed file, which a context removes."""

    file: IO[bytes]
    size: int = 0
    digest: bytes = b""
    entries: dict[str, Entry] = field(default_factory=dict)
    readings: dict[str, Reading] = field(default_factory=dict)
    _offsets: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, directory: str, found: Survey, report: Callable[[int, int], None]) -> "Pack":
        """Read a project's files, blocking; ``report`` gets the bytes read and in total.

        Raises:
            StorageError: a file cannot be read, or has changed since.
        """
        try:  # beside the project: temporary directories in memory may lack the room
            pack = cls(tempfile.TemporaryFile(dir=directory))  # noqa: SIM115 - the caller's to close
        except OSError as error:
            raise StorageError(f"cannot write to {directory}: {error.strerror or error}") from error
        try:
            pack._fill(directory, found, report)
        except OSError as error:
            pack.close()
            raise StorageError(f"cannot read the project: {error.strerror or error}") from error
        except BaseException:
            pack.close()
            raise
        return pack

    def _fill(self, directory: str, found: Survey, report: Callable[[int, int], None]) -> None:
        hasher = hashlib.sha256()

        def write(data: bytes) -> None:
            self.file.write(data)
            hasher.update(data)
            self.size += len(data)

        write(MAGIC)
        done = 0
        for path in found.files:
            with open(os.open(os.path.join(directory, path), READ), "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode) or signature_of(status) != found.files[path]:
                    raise _changed_while_read(path)
                settled = is_settled(found.files[path])
                data = file.read(status.st_size) if status.st_size <= _PIECE_BYTES else b""
                if len(data) == status.st_size:
                    digest = digest_of(data)
                else:
                    data, digest = b"", hash_descriptor(file.fileno())[1].digest()
                    file.seek(0)
                entry = Entry(path, status.st_size, digest)
                write(head_of(entry))
                self._offsets[path] = self.size
                write(data)
                for piece in iter(lambda: file.read(_PIECE_BYTES), b""):
                    write(piece)
            if self.size != self._offsets[path] + entry.size:
                raise _changed_while_read(path)
            self.entries[path] = entry
            self.readings[path] = Reading(entry.size, entry.digest, found.files[path], settled)
            done += entry.size
            report(done, found.bytes)
        write(END)
        self.file.flush()
        self.digest = hasher.digest()

    def content(self, path: str) -> bytes:
        return os.pread(self.file.fileno(), self.entries[path].size, self._offsets[path])

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "Pack":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _changed_while_read(path: str) -> StorageError:
    return StorageError(f"{path} changed while it was read; try again when no program changes the project")
