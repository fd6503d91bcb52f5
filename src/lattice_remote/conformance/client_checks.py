"""Checks of a client: a scripted server plays to it, and its directory is compared with the server's files.

The client is a command. ``COMMAND URL DIRECTORY`` keeps ``DIRECTORY/.lattice`` current until it is ended;
``COMMAND URL DIRECTORY ARGV...`` runs one command of lattice, and has its changes in the files when it ends. The token
is in ``LATTICE_TOKEN``. No two commands run in one directory at the same time.
"""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import msgspec

from lattice_remote.conformance import CheckFailed, CheckList, all_of, expect, within
from lattice_remote.conformance.scripted_server import (
    EXIT_CODE,
    LINE,
    LOG,
    STDOUT,
    TOKEN,
    Files,
    ScriptedServer,
    append_to,
    merge_into,
)
from lattice_remote.protocol.messages import Bye, Change, Entries, Fetch, Hello, Part, Put, Reply, Run, encode
from lattice_remote.protocol.operations import (
    AnnounceFile,
    AppendBytes,
    DeleteFile,
    MergeJson,
    MoveFile,
    Operation,
    PutFile,
    canonical_json,
    digest_of,
)
from lattice_remote.protocol.paths import is_replicated

__all__ = ["CHECKS", "ClientTarget"]

TASK = "task_01ARZ3NDEKTSV4RRFFQ69G5FAV"
PLAN, SNAPSHOT = f"plans/{TASK}.md", f"tasks/{TASK}.json"
IDS = canonical_json({"map": {"LAT-1": TASK}, "next_seq": 2, "schema_version": 1})
FILES: Files = {
    "config.json": b"{}\n",
    PLAN: b"# Plan\n\none\ntwo\nthree\n",  # not last: a client killed now has also stored the base of edits
    "ids.json": IDS,
    SNAPSHOT: b'{\n  "title": "T"\n}\n',
    LOG: LINE,
}
Edits = dict[str, bytes | None]
EVIL = b"written by a hostile server"
EQUAL_TIMEOUT_S = 20.0
CLOSE_TIMEOUT_S = 10.0


class ClientTarget:
    def __init__(self, command: list[str], directory: Path) -> None:
        self.command = command
        self._directory = directory
        self._plays = 0

    @contextlib.asynccontextmanager
    async def play(self, files: Files | None = None) -> AsyncIterator["Play"]:
        self._plays += 1
        play = Play(self.command, self._directory / str(self._plays), FILES if files is None else files)
        await play.server.start()
        try:
            yield play
            expect(not play.server.faults, "; ".join(play.server.faults))
        finally:
            await play.end()

    @contextlib.asynccontextmanager
    async def filled(self, files: Files | None = None) -> AsyncIterator["Play"]:
        async with self.play(files) as play:
            await play.follow()
            await play.equal()
            yield play


class Play:
    def __init__(self, command: list[str], directory: Path, files: Files) -> None:
        self.server = ScriptedServer(dict(files))
        self.root = directory
        self.lattice = directory / "work" / ".lattice"
        self.lattice.mkdir(parents=True)
        self._command = command
        self._processes: list[asyncio.subprocess.Process] = []

    async def end(self) -> None:
        try:
            await asyncio.gather(*map(_end, self._processes))
        finally:
            await self.server.stop()

    async def _start(self, *argv: str) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *self._command,
            self.server.url,
            str(self.lattice.parent),
            *argv,
            env={**os.environ, "LATTICE_TOKEN": TOKEN},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=pipe if argv else asyncio.subprocess.DEVNULL,
            stderr=pipe if argv else asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        self._processes.append(process)
        return process

    async def follow(self) -> None:
        """Start the client, to follow until ``kill()`` or the end."""
        await self._start()

    async def kill(self) -> None:
        for process in self._processes:
            _signal(process, signal.SIGKILL)
            await process.wait()
        self._processes.clear()
        self.server.cut()
        await self.until(lambda: not self.server.links, "the end of the client's connections")

    async def run(self, *argv: str) -> tuple[int, bytes, bytes]:
        process = await self._start(*(argv or ("comment", "LAT-1", "x", "--actor", "human:ana")))
        out, err = await process.communicate()
        return process.returncode or 0, out, err

    @property
    def tree(self) -> Files:
        found: Files = {}
        for place, directories, names in os.walk(self.lattice):
            directories[:] = [name for name in directories if not name.startswith(".")]
            for name in names:
                path = (Path(place) / name).relative_to(self.lattice).as_posix()
                if is_replicated(path):
                    with contextlib.suppress(OSError):  # replaced since it was listed
                        found[path] = (Path(place) / name).read_bytes()
        return found

    async def equal(self) -> None:
        end = time.monotonic() + EQUAL_TIMEOUT_S
        while True:
            began = time.monotonic()
            tree, files = self.tree, self.server.files
            if tree == files:
                return
            if began > end:
                differing = sorted(path for path in tree.keys() | files.keys() if tree.get(path) != files.get(path))
                raise CheckFailed(f"not the server's after {EQUAL_TIMEOUT_S:.0f} s: {', '.join(differing[:5])}")
            await asyncio.sleep(max(0.02, 3 * (time.monotonic() - began)))

    async def until(self, condition: Callable[[], object], what: str, seconds: float = EQUAL_TIMEOUT_S) -> None:
        end = time.monotonic() + seconds
        while not condition():
            expect(time.monotonic() < end, f"no {what} within {seconds:.0f} s")
            await asyncio.sleep(0.02)

    async def cut_and_attempt(self) -> None:
        before = self.server.attempts
        self.server.cut()
        await self.until(lambda: self.server.attempts > before, "attempt to connect")

    async def announce(self, *contents: bytes) -> None:
        """Announce contents of ``context.md``, one after the other, and hold their pieces back."""
        self.server.holds_pieces = True
        for data in contents:
            after = {**self.server.files, "context.md": data}
            await self.server.write([AnnounceFile("context.md", len(data), digest_of(data))], after)
        await self.until(self.has_held_pieces, "Fetch")

    async def release(self) -> None:
        """Send the pieces that were held back, and wait until the files are equal."""
        self.server.holds_pieces = False
        await self.server.flush()
        await self.equal()

    def has_held_pieces(self) -> bool:
        return any(link.connection.pending for link in self.server.links)

    def sent(self, kind: type[Any]) -> list[Any]:
        return [frame for frame in self.server.frames if isinstance(frame, kind)]


def _signal(process: asyncio.subprocess.Process, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


async def _end(process: asyncio.subprocess.Process) -> None:
    _signal(process, signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), 10)
    except TimeoutError:
        _signal(process, signal.SIGKILL)
        await process.wait()


CHECKS: CheckList[ClientTarget] = CheckList()
check = CHECKS


def filled(section: str, name: str) -> Callable[[Callable[[Play], Awaitable[None]]], None]:
    """Add a check that gets a client whose directory equals the server's."""

    def add(run_check: Callable[[Play], Awaitable[None]]) -> None:
        @check(section, name)
        async def _(target: ClientTarget) -> None:
            async with target.filled() as play:
                await run_check(play)

    return add


# --- 5.3: filling ---


@filled("2.1", "it connects with token and subprotocol, greets, and fills its directory")
async def _(play: Play) -> None:
    first = play.server.frames[0]
    expect(isinstance(first, Hello) and 1 in first.versions and first.epoch == "", f"the first frame is {first}")


@check("5.3", "files of before are replaced, kept or removed")
async def _(target: ClientTarget) -> None:
    async with target.play() as play:
        for path, data in {SNAPSHOT: b"other", "tasks/surplus.json": b"{}", LOG: LINE}.items():
            (play.lattice / path).parent.mkdir(exist_ok=True)
            (play.lattice / path).write_bytes(data)
        await play.follow()
        await play.equal()
        fetched = {path for frame in play.sent(Fetch) for path in frame.paths}
        expect(LOG not in fetched, "it fetches a file that is equal")


@check("5.3", "an empty file, an empty project, 1,500 files, a file of 3 MiB")
async def _(target: ClientTarget) -> None:
    async with target.filled({}) as play:
        await play.server.change({"config.json": b""})
        await play.equal()
    many = {f"notes/n{number}.md": b"%d" % number for number in range(1500)}
    async with target.play({**many, "resources/big.json": os.urandom(3 << 20)}) as play:
        play.server.model.piece = 1 << 20
        await play.follow()
        await play.equal()


@check("5.3", "cut in the middle of a fill, it continues or starts again")
async def _(target: ClientTarget) -> None:
    async with target.play() as play:
        play.server.holds_pieces = True
        await play.follow()
        for count in (1, 3, 5):
            await play.until(play.has_held_pieces, "request")
            await play.server.pieces(count)
            play.server.cut()
            await play.until(lambda: not play.server.links, "end of the connection")
        play.server.holds_pieces = False
        await play.equal()


@check("5.3", "changes during the manifest and between its pieces are not lost")
async def _(target: ClientTarget) -> None:
    async with target.play({f"tasks/t{number}.json": b"%d" % number for number in range(30)}) as play:
        play.server.holds_pieces = True
        await play.follow()
        await play.until(play.has_held_pieces, "Manifest")
        await play.server.change({"tasks/t1.json": b"new", "tasks/t2.json": None, "tasks/new.json": b"{}"})
        await play.server.pieces(2)
        await play.server.change({LOG: LINE, "tasks/t1.json": None})
        await play.release()


# --- 4, 5: changes ---


@check("4", "put, append, delete and move are applied")
async def _(target: ClientTarget) -> None:
    steps: tuple[Edits, ...] = (
        {"context.md": b"new"},
        {LOG: LINE * 2},
        {SNAPSHOT: None, f"archive/{SNAPSHOT}": FILES[SNAPSHOT]},
        {"context.md": None, LOG: LINE * 3, PLAN: b"# Another\n"},
    )
    async with target.filled() as play:
        for files in steps:
            await play.server.change(files)
            await play.equal()


@check("4.2", "a merge gives canonical JSON: nesting, numbers, non-ASCII, order of keys")
async def _(target: ClientTarget) -> None:
    before = canonical_json({"a": {"b": 1, "c": [1, {"x": None}]}, "z": 1.5, "é": "ü", "\U0001f600": "\ue000", "n": {}})
    patch: dict[str, object] = {
        "a": {"b": None, "d": {"e": None, "f": 1e300}},
        "ключ": "значение \u2028",
        "\ue000": [],
        "\U0001f601": {},
        "n": {"m": -0.0},
        "big": 2**63,
    }
    async with target.filled({"config.json": before}) as play:
        merge, after = merge_into("config.json", before, patch)
        await play.server.write([merge], {"config.json": after})
        await play.equal()


@filled("4", "an operation that does not fit is drift: the file is fetched")
async def _(play: Play) -> None:
    await play.kill()
    for path in (LOG, "ids.json", SNAPSHOT):
        (play.lattice / path).write_bytes(b"damaged by another program")
    await play.follow()
    await play.until(lambda: len(play.sent(Hello)) > 1, "second connection")
    before, ids = play.server.files, FILES["ids.json"]
    merge, merged = merge_into("ids.json", ids, {"next_seq": 3})
    move = MoveFile(SNAPSHOT, f"archive/{SNAPSHOT}", digest_of(FILES[SNAPSHOT]))
    after = {**before, LOG: LINE * 2, "ids.json": merged, f"archive/{SNAPSHOT}": FILES[SNAPSHOT]}
    del after[SNAPSHOT]
    await play.server.write([append_to(LOG, LINE, LINE), merge, move], after)
    await play.equal()


@filled("5.1", "an announced file is fetched; announced again before it came, the newer content counts")
async def _(play: Play) -> None:
    await play.announce(b"first" * 20, b"other" * 20)
    await play.release()


@check("4", "an announced file with the size of the present one is fetched")
async def _(target: ClientTarget) -> None:
    async with target.filled({**FILES, "context.md": b"before"}) as play:
        await play.server.change({"context.md": b"after!"}, announced=frozenset(["context.md"]))
        await play.equal()


@check("5.1", "a file that changes while its parts come: append, put, delete, move")
async def _(target: ClientTarget) -> None:
    steps: tuple[Edits, ...] = (
        {"context.md": b"x" * 70 + b"more"},
        {"context.md": b"put"},
        {"context.md": None},
        {"context.md": None, "notes/context.md": b"x" * 70},
    )
    for files in steps:
        async with target.filled() as play:
            await play.announce(b"x" * 70)
            await play.server.pieces(4)
            await play.server.change(files)
            await play.server.pieces(4)
            await play.release()


@filled("5.2", "parts with another digest are not used; a restarted file and an old part are")
async def _(play: Play) -> None:
    data = b"the right content"
    await play.announce(data)
    seq, link = play.server.model.head, play.server.links[0]
    wrong = Part("context.md", seq, len(data), digest_of(data), 0, b"x" * len(data))
    old = Part("context.md", seq - 1, 3, digest_of(b"old"), 0, b"old")
    begun = Part("context.md", seq, len(data), digest_of(data), 0, b"begun")
    fetches = len(play.sent(Fetch))
    await link.send(encode(old), encode(begun), encode(wrong))
    await play.until(lambda: len(play.sent(Fetch)) > fetches, "second Fetch")
    expect(play.tree.get("context.md") in (None, data), "it stores content with another digest")
    await play.release()


@filled("5", "a client that is killed continues where it was")
async def _(play: Play) -> None:
    for number in range(3):
        await play.kill()
        await play.server.change({LOG: play.server.files[LOG] + LINE, f"tasks/n{number}.json": b"{}"})
        await play.follow()
        await play.equal()


@filled("6", "after a cut it continues: only new changes are needed")
async def _(play: Play) -> None:
    for number in range(4):
        play.server.cut()
        await play.server.change({f"tasks/n{number}.json": b"{}"})
        await play.equal()
    hello = play.sent(Hello)[-1]
    marks = {moment.mark for moment in play.server.model.history}
    expect(hello.epoch in ("", play.server.model.epoch) and hello.mark in marks, f"it greets with {hello}")


@filled("6", "a new epoch: everything is compared again")
async def _(play: Play) -> None:
    await play.server.change({LOG: LINE * 2})
    await play.equal()
    play.server.new_epoch({"config.json": b"{}\n", LOG: LINE, "tasks/other.json": b"{}"})
    await play.equal()
    await play.server.change({LOG: LINE * 2})
    await play.equal()


@filled("6", "changes that are no longer kept: everything is compared again")
async def _(play: Play) -> None:
    await play.server.change({LOG: LINE * 2})
    await play.equal()
    await play.kill()
    for number in range(5):
        await play.server.change({LOG: LINE * (3 + number), "tasks/x.json": b"%d" % number})
    play.server.model.trim(play.server.model.head)
    await play.follow()
    await play.equal()


@filled("S3", "a random history with cuts and held pieces: the same bytes at its end")
async def _(play: Play) -> None:
    dice = random.Random(7)  # noqa: S311 - the same history each time
    paths = [LOG, SNAPSHOT, PLAN, "context.md", "notes/n.md", "events/x.jsonl", f"archive/{SNAPSHOT}"]
    for _ in range(60):
        play.server.holds_pieces = dice.random() < 0.4
        path, old = (chosen := dice.choice(paths)), play.server.files.get(chosen, b"")
        data = dice.choice([old + LINE, old + LINE, dice.randbytes(20), old, None])
        announced = frozenset([path]) if dice.random() < 0.3 else frozenset[str]()
        files: dict[str, bytes | None] = {path: data}
        if dice.random() < 0.2:  # a move
            files = {path: None, dice.choice(paths): old}
        await play.server.change(files, announced=announced)
        if dice.random() < 0.1:
            play.server.cut()
        if dice.random() < 0.3:
            await asyncio.sleep(0)
            await play.server.pieces(dice.randrange(4))
    await play.release()


# --- 3.1, 3.4: requests ---


def is_answered(done: tuple[int, bytes, bytes], play: Play) -> None:
    code, out, err = done
    expect(code == EXIT_CODE, f"exit code {code}, not the Reply's {EXIT_CODE}: {err[-200:]!r}")
    expect(out == STDOUT, f"it prints {out[:200]!r}, not the Reply's stdout")
    expect(play.tree == play.server.files, "the command ends before its change is in the files")


@check("S11", "Run: exit code and output are the Reply's; its changes are in the files when it ends")
async def _(target: ClientTarget) -> None:
    async with target.play() as play:
        is_answered(await play.run(), play)
        (request,) = play.sent(Run)
        expect(request.argv[:2] == ["comment", "LAT-1"], f"argv is {request.argv}")


@check("3.4", "Run: cut before it ran, it is sent again and runs once")
async def _(target: ClientTarget) -> None:
    async with target.play() as play:
        play.server.next_run = "cut before"
        is_answered(await play.run(), play)
        _sent_again_once(play)


@check("3.4", "Run: cut before its reply, it is sent again with its id and age_s, and runs once")
async def _(target: ClientTarget) -> None:
    async with target.play() as play:
        play.server.next_run = "cut after"
        is_answered(await play.run(), play)
        _sent_again_once(play)


def _sent_again_once(play: Play) -> None:
    requests = play.sent(Run)
    expect(len({request.id for request in requests}) == 1, "it is sent again with another id")
    expect(len(requests) == 2, f"it is sent {len(requests)} times")
    expect(requests[1].age_s > 0, "age_s is 0 in the repeated request")
    expect(play.server.files[LOG].count(LINE) == 2, f"it ran {play.server.files[LOG].count(LINE) - 1} times")


@check("S6", "Run: cut before its reply, and answered in a new epoch with seq 0")
async def _(target: ClientTarget) -> None:
    async with target.play() as play:
        play.server.next_run = "new epoch"
        code, _out, err = await play.run()
        expect(code == EXIT_CODE, f"exit code {code}: {err[-200:]!r}")
        await play.follow()
        await play.equal()


@check("3.2", "Run: Refused, the command fails and shows the server's message")
async def _(target: ClientTarget) -> None:
    async with target.play() as play:
        play.server.refusals[Run] = "REMOTE_FORBIDDEN"
        code, out, err = await play.run()
        expect(code not in (0, EXIT_CODE), f"exit code {code}")
        expect(b"refused by a check" in out + err, f"the message is not shown: {err[-200:]!r}")


# --- 5.5: edits ---


@filled("5.5", "edit: sent as Put with its base, and stored")
async def _(play: Play) -> None:
    mine = FILES[PLAN] + b"mine\n"
    (play.lattice / PLAN).write_bytes(mine)
    await play.until(lambda: play.server.files[PLAN] == mine, "Put")
    await play.equal()
    put = play.sent(Put)[0]
    by_digest = put.base is None and put.base_digest == digest_of(FILES[PLAN])
    expect(put.base == FILES[PLAN] or by_digest, "the Put has another base")
    await play.server.change({PLAN: mine + b"theirs\n"})
    await play.equal()


@filled("5.5", "edit: sent before the next Run")
async def _(play: Play) -> None:
    await play.kill()
    (play.lattice / PLAN).write_bytes(FILES[PLAN] + b"mine\n")
    await play.run()
    order = [type(frame) for frame in play.server.frames if isinstance(frame, Run | Put)]
    expect(order == [Put, Run], f"it sends {', '.join(kind.__name__ for kind in order)}")
    await play.equal()


@filled("5.5", "edit: a change of the server does not overwrite it; merged, both are there")
async def _(play: Play) -> None:
    await play.kill()
    (play.lattice / PLAN).write_bytes(FILES[PLAN] + b"mine\n")
    play.server.outcome = "merged"
    await play.server.change({PLAN: FILES[PLAN] + b"theirs\n"})
    await play.follow()
    await play.until(lambda: play.sent(Put), "Put")
    await play.equal()
    expect(play.server.files[PLAN] == FILES[PLAN] + b"mine\ntheirs\n", f"merged: {play.server.files[PLAN]!r}")


@filled("5.5", "edit: after a conflict the server's text is there, and the user's is in a copy")
async def _(play: Play) -> None:
    await play.kill()
    (play.lattice / PLAN).write_bytes(b"# Mine alone\n")
    await play.server.change({PLAN: b"# Theirs alone\n"})
    await play.follow()
    await play.until(lambda: play.sent(Put), "Put")
    await play.equal()
    kept = [path for path in files_below(play.root) if b"# Mine alone" in _content(path)]
    expect(kept, "the user's text is nowhere below its directory")


@filled("5.5", "edit: refused, the text stays, and later commands run")
async def _(play: Play) -> None:
    await play.kill()
    mine = FILES[PLAN] + b"mine\n"
    (play.lattice / PLAN).write_bytes(mine)
    play.server.refusals[Put] = "REMOTE_TOO_LARGE"
    code, _out, err = await play.run()
    expect(code == EXIT_CODE, f"the command fails: {err[-200:]!r}")
    expect((play.lattice / PLAN).read_bytes() == mine, "the text is lost")


def files_below(root: Path) -> Iterator[Path]:
    for place, _directories, names in os.walk(root):
        yield from (Path(place) / name for name in names)


def _content(path: Path) -> bytes:
    with contextlib.suppress(OSError):
        return path.read_bytes() if path.is_file() and not path.is_symlink() else b""
    return b""


# --- 2.3, 2.5, S9: violations ---

OUTSIDE = "/tmp/lattice-conformance-outside"  # noqa: S108 - must not be written
HOSTILE_PATHS = (
    "../outside",
    "tasks/../../outside",
    OUTSIDE,
    "tasks/\x00x",
    "tasks/\x9b31m",
    "tasks\\..\\..\\outside",
    ".git/hooks/post-checkout",
    "tasks/.hidden",
    "remote.json",
    "Cache_State.json",
    "LOCKS/x",
    "rem\u200cote.json",
    "C:x",
    "plans/x.md.mine",
    "notes/x",
    "",
    "tasks//x",
    "a/" * 8 + "x",
    "tasks/" + "x" * 256,
    "tasks/" + "\u00fc" * 128,
    "/".join(["x" * 200] * 3),
)


def change_of(*operations: Operation, seq: int = 1, **fields: Any) -> Change:
    return Change(seq, b"m" * 8, "2026-01-01T00:00:00.000Z", "x", "", "edit", "", list(operations), **fields)


async def closes(target: ClientTarget, message: bytes | str, name: str) -> None:
    """Check that a message ends the connection and writes nothing."""
    async with target.filled() as play:
        before = play.tree
        first = play.server.links[0]
        await first.send(message)
        await play.until(first.closed.is_set, f"end of the connection after {name}", CLOSE_TIMEOUT_S)
        expect(play.tree == before, f"{name} changes files")
        found = [str(path) for path in files_below(play.root) if EVIL in _content(path)]
        expect(not found, f"{name} is written to {', '.join(found)}")
        expect(not _content(Path(OUTSIDE)), f"{name} is written")


async def all_close(target: ClientTarget, messages: Iterable[tuple[str, bytes | str]]) -> None:
    turn = asyncio.Semaphore(4)

    async def one(name: str, message: bytes | str) -> None:
        async with turn:
            await closes(target, message, name)

    await all_of(one(*each) for each in messages)


@check("S9", "a path outside the tree ends the connection, and writes nothing")
async def _(target: ClientTarget) -> None:
    await all_close(target, ((repr(path), encode(change_of(PutFile(path, EVIL)))) for path in HOSTILE_PATHS))


@check("S9", "wherever the path appears: every operation, Part")
async def _(target: ClientTarget) -> None:
    path, digest = "../outside", digest_of(EVIL)
    frames: dict[str, Any] = {
        "append": change_of(AppendBytes(path, 0, digest_of(b""), EVIL)),
        "merge": change_of(MergeJson(path, b"{}", digest)),
        "move from": change_of(MoveFile(path, "tasks/x.json", digest)),
        "move to": change_of(MoveFile(SNAPSHOT, path, digest_of(FILES[SNAPSHOT]))),
        "delete": change_of(DeleteFile(path)),
        "announce": change_of(AnnounceFile(path, 1, digest)),
        "the second of two operations": change_of(PutFile("tasks/first.json", b"{}"), PutFile(path, EVIL)),
        "Part": Part(path, 0, len(EVIL), digest, 0, EVIL),
    }
    await all_close(target, ((name, encode(frame)) for name, frame in frames.items()))


@check("S9", "a path outside the tree in a manifest ends the connection")
async def _(target: ClientTarget) -> None:
    def rewrite(fields: dict[str, Any]) -> dict[str, Any]:
        entry = {"path": "../outside", "size": 1, "digest": digest_of(EVIL)}
        return {**fields, "entries": [entry, *fields["entries"]]} if fields["type"] == "entries" else fields

    async with target.play() as play:
        play.server.rewrite = rewrite
        await play.follow()
        await play.until(lambda: play.server.first is not None, "connection")
        await play.until(
            lambda: play.server.first is not None and play.server.first.closed.is_set(),
            "end of the connection",
            CLOSE_TIMEOUT_S,
        )


@check("3.2", "Parts: files that come together, to a client that names the capability")
async def _(target: ClientTarget) -> None:
    async with target.play({**FILES, "context.md": b""}) as play:
        play.server.model.compresses = True
        await play.follow()
        await play.equal()


@check("2.3", "a violation ends the connection: malformed, unknown, out of turn, a gap")
async def _(target: ClientTarget) -> None:
    welcome_again = {"type": "welcome", "version": 1, "server_version": "", "lattice_version": "", "project": "web"}
    more = {"actor": "x", "epoch": "e", "head": 0, "oldest": 1, "resync": True}
    limits = {"max_frame_bytes": 1 << 25, "max_file_bytes": 1 << 24}
    put = msgspec.to_builtins(change_of(PutFile("tasks/x.json", b"{}")), builtin_types=(bytes,))
    messages: dict[str, bytes | str] = {
        "a text message": "text",
        "no MessagePack": b"\xc1",
        "bytes after the map": encode(Bye("REMOTE_BUSY", "x", 0.0)) + b"\xc0",
        "an unknown kind": msgspec.msgpack.encode({"type": "shout"}),
        "an unknown operation": msgspec.msgpack.encode({**put, "ops": [{"op": "chmod", "path": "a"}]}),
        "a missing field": msgspec.msgpack.encode({key: value for key, value in put.items() if key != "mark"}),
        "a number below its bound": msgspec.msgpack.encode({**put, "seq": 0}),
        "a wrong type": msgspec.msgpack.encode({**put, "seq": "1"}),
        "true for a number": msgspec.msgpack.encode({"type": "part", "path": "a", "seq": True, "gone": True}),
        "a long change id": msgspec.msgpack.encode({**put, "mark": bytes(33)}),
        "an id with capitals": encode(Reply("AB" * 16, 0, 0, b"", b"")),
        "an empty append": encode(change_of(AppendBytes(LOG, len(LINE), digest_of(LINE), b""))),
        "a bool that is none": msgspec.msgpack.encode({"type": "part", "path": "a", "seq": 0, "gone": 1}),
        "a gap": encode(change_of(PutFile("tasks/x.json", b"{}"), seq=9)),
        "a second Welcome": msgspec.msgpack.encode({**welcome_again, **more, "limits": limits}),
        "a manifest without a request": encode(Entries(0, b"", [], last=True)),
        "an unknown outcome": msgspec.msgpack.encode({"type": "stored", "id": "0" * 32, "seq": 0, "outcome": "lost"}),
    }
    await all_close(target, messages.items())


_DEFAULTS: dict[str, Any] = {
    "offset": 0,
    "data": b"",
    "gone": False,
    "act_as": [],
    "capabilities": [],
    "lost": False,
    "used": "",
    "token_actor": "",
}


@check("2.3", "unknown fields are ignored, omitted fields have their defaults")
async def _(target: ClientTarget) -> None:
    def rewrite(fields: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in fields.items() if name not in _DEFAULTS or value != _DEFAULTS[name]}
        return {"later": [1, {"a": None}], **kept, "even_later": 0.5}

    async with target.play({**FILES, "context.md": b""}) as play:
        play.server.rewrite = rewrite
        await play.follow()
        await play.equal()
        await play.server.change({LOG: LINE * 2, PLAN: None})
        await play.equal()


# --- 2.2, 2.6: ends ---


@filled("2.6", "Bye with retry_after_s: it comes back, not before")
async def _(play: Play) -> None:
    greetings = len(play.sent(Hello))
    await play.server.bye("REMOTE_BUSY", 2.0, 1012)
    began = time.monotonic()
    await play.until(lambda: len(play.sent(Hello)) > greetings, "return of the client", 15)
    expect(time.monotonic() - began > 1.5, f"it is back after {time.monotonic() - began:.1f} s")
    await play.server.change({LOG: LINE * 2})
    await play.equal()


@filled("2.6", "Bye without retry_after_s: it does not come back")
async def _(play: Play) -> None:
    attempts = play.server.attempts
    await play.server.bye("REMOTE_UNAUTHORIZED", None, 1008)
    await asyncio.sleep(3)
    expect(play.server.attempts == attempts, f"it connects {play.server.attempts - attempts} times within 3 s")


@filled("2.6", "after a lost connection, and a refusal by another program, it comes back with growing delays")
async def _(play: Play) -> None:
    play.server.refuses = HTTPStatus.BAD_GATEWAY, ""
    attempts = play.server.attempts
    play.server.cut()
    await asyncio.sleep(4)
    tries = play.server.attempts - attempts
    expect(1 <= tries <= 15, f"{tries} attempts within 4 s")
    play.server.refuses = None
    await play.server.change({LOG: LINE * 2})
    await play.equal()


@filled("2.2", "a server that is stopping or busy is tried again")
async def _(play: Play) -> None:
    for number, refusal in enumerate(
        ((HTTPStatus.SERVICE_UNAVAILABLE, "REMOTE_SHUTDOWN"), (HTTPStatus.TOO_MANY_REQUESTS, "REMOTE_BUSY"))
    ):
        play.server.refuses = refusal
        await play.cut_and_attempt()
        play.server.refuses = None
        await play.server.change({f"tasks/n{number}.json": b"{}"})
        await play.equal()


@filled("2.2", "a token that is refused is not tried again")
async def _(play: Play) -> None:
    play.server.refuses = HTTPStatus.FORBIDDEN, "REMOTE_FORBIDDEN"
    play.server.cut()
    attempts = play.server.attempts
    await asyncio.sleep(3)
    expect(play.server.attempts - attempts <= 2, f"{play.server.attempts - attempts} attempts within 3 s")


@filled("2.6", "pings are answered; it sends one every 10 s")
async def _(play: Play) -> None:
    link = play.server.links[0]
    async with within(CLOSE_TIMEOUT_S, "pong"):
        await (await link.socket.ping())
    async with within(15, "ping of the client"):
        await link.pinged.wait()
