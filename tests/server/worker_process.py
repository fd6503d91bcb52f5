"""A real worker process and a copy of its tree that follows its changes: what the tests of this folder share."""

import contextlib
import json
import os
import resource
import secrets
import select
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from lattice_remote.protocol.messages import (
    Attachment,
    Change,
    Refused,
    Reply,
    Result,
    Returned,
    Stored,
    decode_server_frame,
)
from lattice_remote.protocol.operations import AnnounceFile, MemoryTree, MoveFile, apply, digest_of
from lattice_remote.protocol.paths import is_replicated
from lattice_remote.server.ipc import (
    Edit,
    Ready,
    Reconcile,
    RequestDone,
    RunCall,
    RunCommand,
    Stop,
    ToServer,
    ToWorker,
    WorkerFailed,
)
from lattice_remote.server.project.worker_process import WORKER_COMMAND
from preloaded_programs import WarmProcess, warm

__all__ = ["ANA", "Copy", "WorkerProcess", "closing", "file_at", "make_project", "tree_of"]

ANA = ("--actor", "human:ana")
_decoder: msgspec.msgpack.Decoder[ToServer] = msgspec.msgpack.Decoder(ToServer)


@contextlib.contextmanager
def closing() -> Iterator[None]:
    """Close the descriptors that the block leaves open, as the system does for a process that ends."""
    before = set(os.listdir("/proc/self/fd"))
    try:
        yield
    finally:
        for descriptor in set(os.listdir("/proc/self/fd")) - before:
            with contextlib.suppress(OSError):
                os.close(int(descriptor))


def make_project(directory: Path) -> Path:
    """Make a project as the server lays it out, with the code LAT; return its directory."""
    from lattice.core.config import default_config, serialize_config
    from lattice.storage.fs import atomic_write, ensure_lattice_dirs

    directory.mkdir(parents=True)
    ensure_lattice_dirs(directory)
    config = dict(default_config())
    config["project_code"] = "LAT"
    atomic_write(directory / ".lattice" / "config.json", serialize_config(config))
    return directory


def file_at(path: Path) -> tuple[str, os.stat_result | None]:
    """Return a path and the status of the regular file there, as a capture does for the undo log."""
    return str(path), path.lstat() if path.is_file() and not path.is_symlink() else None


def tree_of(lattice_dir: Path) -> dict[str, bytes]:
    """Return every replicated file by its path."""
    found = {}
    for folder, _, names in os.walk(lattice_dir):
        for path in [Path(folder, name) for name in names]:
            name = str(path)[len(str(lattice_dir)) + 1 :]
            if is_replicated(name) and not path.is_symlink() and path.is_file():
                found[name] = path.read_bytes()
    return found


@dataclass
class Copy:
    """What a client has: its files, and its number. Files that are only announced are read from the server's tree."""

    origin: Path
    files: dict[str, bytes] = field(default_factory=dict)
    seq: int = 0
    announced: list[str] = field(default_factory=list)

    def follow(self, change: Change) -> None:
        assert change.seq == self.seq + 1, "numbers have no gap (I1)"
        wanted: set[str] = set()
        for operation in change.ops:
            drifted = apply(operation, MemoryTree(self.files))
            if isinstance(operation, AnnounceFile):
                wanted |= drifted
            elif isinstance(operation, MoveFile) and operation.path in wanted:
                wanted = wanted - {operation.path} | drifted
            else:
                assert not drifted, f"{operation} does not fit"
        for path in wanted:
            self.announced.append(path)
            self.files[path] = (self.origin / path).read_bytes()
        self.seq = change.seq


class WorkerProcess:
    """A worker that was started on a project. Use it with ``with``: it is stopped, or killed if need be.

    It is forked from a process that has everything imported, unless a command, an environment or a directory of its
    own is given: then it is started as the server starts it.
    """

    def __init__(
        self,
        project: Path,
        *,
        command: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        cwd: Path | None = None,
        max_file_bytes: int | None = None,
        settings: str = "{}",
    ) -> None:
        self.project = project
        ours, theirs = socket.socketpair()
        ours.settimeout(30)
        self._connection, self._received = ours, b""
        self._process: subprocess.Popen[bytes] | WarmProcess
        arguments = ["--project-dir", str(project), "--slug", project.name, "--journal", settings]
        with theirs:
            if command or environment or cwd:
                self._process = _anew(command or WORKER_COMMAND, arguments, theirs.fileno(), environment, cwd)
            else:
                self._process = _warm(arguments, theirs.fileno())
        if max_file_bytes is not None:  # a disk that is full for files of this size (Python ignores SIGXFSZ)
            resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, (max_file_bytes, resource.RLIM_INFINITY))
        try:
            ready = self.receive()
            assert isinstance(ready, Ready), ready
        except BaseException:
            self.kill()
            raise
        self.ready = ready
        self.found: list[RequestDone] = []
        """The outside changes that were numbered before an outcome."""

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._connection.shutdown(socket.SHUT_WR)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._connection.close()

    def send(self, message: ToWorker) -> None:
        data = msgspec.msgpack.encode(message)
        self._connection.sendall(len(data).to_bytes(4) + data)

    def receive(self) -> ToServer:
        """Return the next message; EOFError when the process is gone."""
        while len(self._received) < 4 or len(self._received) < 4 + int.from_bytes(self._received[:4]):
            try:
                piece = self._connection.recv(1 << 20)
            except ConnectionError:
                piece = b""
            if not piece:
                raise EOFError
            self._received += piece
        end = 4 + int.from_bytes(self._received[:4])
        data, self._received = self._received[4:end], self._received[end:]
        return _decoder.decode(data)

    def has_message(self, *, within_s: float) -> bool:
        """Return whether the worker has sent a message, or sends one within this time."""
        return bool(self._received or select.select([self._connection], [], [], within_s)[0])

    def done(self) -> RequestDone:
        """Return the outcome of the oldest request."""
        while True:
            message = self.receive()
            assert isinstance(message, RequestDone), message
            if not message.is_extra:
                return message
            self.found.append(message)

    def failed(self) -> WorkerFailed:
        message = self.receive()
        assert isinstance(message, WorkerFailed), message
        return message

    def run(self, *argv: str, **options: object) -> RequestDone:
        """Run a command line and wait for its outcome."""
        self.send(execute(*argv, **options))
        return self.done()

    def reply(self, *argv: str, **options: object) -> Reply:
        """Run a command line that is answered, not refused."""
        answer = answer_of(self.run(*argv, **options))
        assert isinstance(answer, Reply), answer
        return answer

    def ok(self, *argv: str, **options: object) -> str:
        """Run a command line that succeeds; return its output."""
        reply = self.reply(*argv, **options)
        assert reply.exit_code == 0, reply
        return reply.stdout.decode()

    def refused(self, *argv: str, **options: object) -> Refused:
        """Run a command line that is refused."""
        answer = answer_of(self.run(*argv, **options))
        assert isinstance(answer, Refused), answer
        return answer

    def call(
        self, surface: str, name: str, payload: object, **options: object
    ) -> tuple[RequestDone, Returned | Refused]:
        """Have an operation of a surface carried out; a payload that is no bytes travels as JSON."""
        self.send(invoke(surface, name, payload, **options))  # type: ignore[arg-type]
        done = self.done()
        answer = answer_of(done)
        assert isinstance(answer, Returned | Refused), answer
        return done, answer

    def edit(self, path: str, base: bytes | None, text: bytes, **options: str) -> tuple[RequestDone, Stored | Refused]:
        self.send(Edit(options.get("id", secrets.token_hex(16)), path, base, text, "tok_1", "human:ana"))
        done = self.done()
        answer = answer_of(done)
        assert isinstance(answer, Stored | Refused), answer
        return done, answer

    def reconcile(self, paths: list[str] | None = None) -> RequestDone:
        self.send(Reconcile(paths))
        return self.done()

    def stop(self) -> None:
        self.send(Stop())
        assert self._process.wait(10) == 0

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._connection.close()


def _warm(arguments: Sequence[str], connection: int) -> WarmProcess:
    nothing = subprocess.DEVNULL
    environment, here = dict(os.environ), Path.cwd()
    return warm().start(
        "worker", arguments, cwd=here, env=environment, stdin=connection, stdout=nothing, stderr=nothing
    )


def _anew(
    command: Sequence[str],
    arguments: Sequence[str],
    connection: int,
    environment: dict[str, str] | None,
    cwd: Path | None,
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*command, "--fd", str(connection), *arguments],
        pass_fds=[connection],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **(environment or {})},
        cwd=cwd,
    )


def execute(
    *argv: str,
    id: str | None = None,  # noqa: A002 - the message's own word
    files: Sequence[Attachment] = (),
    actor: str = "human:ana",
    act_as: Sequence[str] = ("agent:*",),
    token_id: str = "tok_1",  # noqa: S107 - an id
    last_try: bool = False,
    ahead: Sequence[str] = (),
    may_wait: bool = True,
) -> RunCommand:
    """Return the request to run a command line."""
    request = RunCommand(id or secrets.token_hex(16), list(argv), list(files), token_id, actor, list(act_as), last_try)
    return msgspec.structs.replace(request, ahead=list(ahead), may_wait=may_wait)


def invoke(
    surface: str,
    name: str,
    payload: object,
    *,
    id: str | None = None,  # noqa: A002 - the message's own word
    files: Sequence[Attachment] = (),
    actor: str = "human:ana",
    act_as: Sequence[str] = ("agent:*",),
    token_id: str = "tok_1",  # noqa: S107 - an id
) -> RunCall:
    """Return the request to carry out an operation of a surface."""
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return RunCall(id or secrets.token_hex(16), surface, name, data, list(files), token_id, actor, list(act_as))


def change_of(done: RequestDone) -> Change | None:
    if done.change is None:
        return None
    frame = decode_server_frame(done.change)
    assert isinstance(frame, Change)
    assert frame.seq == done.seq
    for after in done.after:
        assert after.digest is None or len(after.digest) == len(digest_of(b""))
    return frame


def answer_of(done: RequestDone) -> Result | Refused | None:
    if done.reply is None:
        return None
    frame = decode_server_frame(done.reply)
    assert isinstance(frame, Result | Refused)
    assert frame.id == done.id
    return frame
