"""Scripted worker: the process behind ``server/ipc.py`` with commands for tests instead of lattice.

put PATH TEXT      write a file                    noop           answer, change nothing
die                end without a trace             die-once       the same, but only the first time
die-after PATH     commit ``put PATH died``, then end before saying so
sleep SECONDS      take long                       fail           report Failed
want NAME SECONDS  as ``resource acquire --wait``: succeeds when resources/NAME/free exists, and removes it
hook COMMAND       ask for a hook                  count          answer with the number of runs so far
slow PATH TEXT     write the file, wait 50 ms, then commit
undone PATH TEXT   write the file, wait until the project has a file ``seen``, then delete both

Where there is a file ``die-when-ready``, it is removed, and the worker ends as soon as it has opened the project.
"""

import argparse
import os
import socket
import sys
import time
from pathlib import Path
from typing import ClassVar

import msgspec

from lattice_remote.protocol.messages import Change, Refused, Reply, encode
from lattice_remote.protocol.operations import DeleteFile, PutFile, digest_of
from lattice_remote.server.ipc import (
    AbandonRequest,
    Edit,
    HookCall,
    NewEpoch,
    PathState,
    Ready,
    Reconcile,
    RequestDone,
    RunCommand,
    Stop,
    ToWorker,
    WorkerFailed,
)
from lattice_remote.server.journal.journal import Journal
from lattice_remote.server.journal.segment import Record


class FakeWorker:
    def __init__(self, connection: socket.socket, project: Path) -> None:
        self.connection = connection
        self.project = project
        self.tree = project / ".lattice"
        self.journal = Journal.open(project / "journal") or self._new_journal()

    def _new_journal(self) -> Journal:
        return Journal.create(self.project / "journal", os.urandom(8).hex())

    def send(self, message: object) -> None:
        data = msgspec.msgpack.encode(message)
        self.connection.sendall(len(data).to_bytes(4) + data)

    edited: ClassVar[dict[str, bytes | None]] = {}

    def ready(self) -> None:
        files = [p for p in self.tree.rglob("*") if p.is_file() and not p.name.startswith(".")]
        after = [
            PathState(str(p.relative_to(self.tree)), p.stat().st_size, digest_of(p.read_bytes())) for p in sorted(files)
        ]
        journal = self.journal
        self.send(Ready(journal.epoch, journal.head, journal.mark, journal.oldest, "fake", after))

    def handle(self, message: ToWorker) -> None:
        match message:
            case RunCommand():
                known = self.journal.find(message.id)
                if known is not None:
                    self.send(RequestDone(message.id, known.seq, reply=known.reply))
                else:
                    self.execute(message)
            case AbandonRequest():
                known = self.journal.find(message.id)
                refused = encode(Refused(message.id, message.code, message.message))
                self.send(RequestDone(message.id, self.journal.head, reply=known.reply if known else refused))
            case Reconcile():
                self.reconcile(message.paths or [])
            case NewEpoch():
                self.journal.close()
                self.journal = self._new_journal()
                self.ready()
            case Edit() | Stop():
                raise SystemExit(0)

    def execute(self, request: RunCommand) -> None:
        with (self.project / "runs").open("a") as runs:
            runs.write(request.id + "\n")
        match request.argv:
            case ["put", path, text]:
                self.commit(request, {path: text.encode()})
            case ["slow", path, text]:
                self.write(path, text.encode())
                time.sleep(0.05)
                self.commit(request, {path: text.encode()})
            case ["undone", path, text]:
                self.write(path, text.encode())
                while not (seen := self.project / "seen").exists():
                    time.sleep(0.01)
                seen.unlink()
                (self.tree / path).unlink()
                self.send(RequestDone(request.id, self.journal.head, reply=self.reply(request, b"")))
            case ["die"]:
                os._exit(9)
            case ["die-once"]:
                if not (self.project / "died").exists():
                    (self.project / "died").touch()
                    os._exit(9)
                self.commit(request, {})
            case ["die-after", path]:
                self.commit(request, {path: b"died"}, die=True)
            case ["sleep", seconds]:
                time.sleep(float(seconds))
                self.commit(request, {})
            case ["wait", path]:
                while not (self.tree / path).exists():
                    time.sleep(0.01)
                self.commit(request, {})
            case ["fail"]:
                self.send(WorkerFailed("the disk is gone"))
                os._exit(1)
            case ["want", name, seconds]:
                self.want(request, name, float(seconds))
            case ["hook", command]:
                hook = HookCall(command, dict(os.environ), "the event")
                self.send(RequestDone(request.id, self.journal.head, reply=self.reply(request, b""), hooks=[hook]))
            case ["print", size]:
                self.commit(request, {}, stdout=bytes(int(size)))
            case ["count"]:
                self.commit(request, {}, stdout=(self.project / "runs").read_bytes())
            case _:
                self.commit(request, {})

    def want(self, request: RunCommand, name: str, seconds: float) -> None:
        free = self.tree / "resources" / name / "free"
        if free.exists() and name not in request.ahead:
            self.commit(request, {f"resources/{name}/free": None}, stdout=b"yours")
        elif request.last_try:
            self.commit(request, {}, stdout=b"timeout")
        else:
            self.send(RequestDone(request.id, self.journal.head, waiting_for=name, wait_timeout_s=seconds))

    def write(self, path: str, data: bytes | None) -> None:
        target = self.tree / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if data is None:
            target.unlink()
        else:
            scratch = target.with_name(".tmp.x")
            scratch.write_bytes(data)
            scratch.rename(target)

    def reply(self, request: RunCommand, stdout: bytes) -> bytes:
        return encode(Reply(request.id, self.journal.head, 0, stdout, b""))

    def commit(
        self, request: RunCommand, files: dict[str, bytes | None], *, stdout: bytes = b"", die: bool = False
    ) -> None:
        for path, data in files.items():
            self.write(path, data)
        change = self.number(request.id, files, request) if files else None
        if change is None:
            reply = self.reply(request, stdout)
            self.journal.append(Record(self.journal.head, self.journal.mark, time.time(), request.id, "t", None, reply))
            self.send(RequestDone(request.id, self.journal.head, reply=reply))
        else:
            if die:
                os._exit(9)
            self.send(change)

    def number(self, cause: str, files: dict[str, bytes | None], request: RunCommand | None) -> RequestDone:
        seq = self.journal.head + 1
        mark = self.journal.change_ids.make(self.journal.epoch, seq)
        ops = [DeleteFile(p) if data is None else PutFile(p, data) for p, data in files.items()]
        change = encode(Change(seq, mark, "2026-01-01T00:00:00.000Z", "human:ana", "t", cause, "fake", list(ops)))
        reply = encode(Reply(request.id, seq, 0, b"", b"")) if request else None
        self.journal.append(Record(seq, mark, time.time(), request.id if request else "", "t", change, reply))
        after = [PathState(p, len(d or b""), None if d is None else digest_of(d)) for p, d in files.items()]
        return RequestDone(request.id if request else "", seq, mark, change, reply, after, oldest=1)

    def reconcile(self, paths: list[str]) -> None:
        files = {
            path: (self.tree / path).read_bytes() if (self.tree / path).exists() else None
            for path in paths
            if path.startswith("edited/")
        }
        new = {path: data for path, data in files.items() if self.edited.get(path) != data}
        first = dict(list(new.items())[:1])  # as if one were all that fits
        self.edited |= first
        done = self.number("edit", first, None) if first else RequestDone("", self.journal.head)
        self.send(msgspec.structs.replace(done, more=len(new) > 1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int)
    parser.add_argument("--project-dir", type=Path)
    parser.add_argument("--slug")
    parser.add_argument("--journal")
    parser.add_argument("--plugin-commands")
    options = parser.parse_args()
    worker = FakeWorker(socket.socket(fileno=options.fd), options.project_dir)
    worker.ready()
    if (options.project_dir / "die-when-ready").exists():
        (options.project_dir / "die-when-ready").unlink()
        os._exit(9)
    buffer = b""
    decoder = msgspec.msgpack.Decoder(ToWorker)
    while received := worker.connection.recv(1 << 20):
        buffer += received
        while len(buffer) >= 4 and len(buffer) >= 4 + int.from_bytes(buffer[:4]):
            end = 4 + int.from_bytes(buffer[:4])
            message, buffer = decoder.decode(buffer[4:end]), buffer[end:]
            if isinstance(message, Stop):
                sys.exit(0)
            worker.handle(message)


if __name__ == "__main__":
    main()
