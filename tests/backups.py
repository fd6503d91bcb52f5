"""Copies of a live data directory, taken with ``rsync -a`` while clients write: each must be whole.

A copy is taken file by file, so its files are of different moments. Started as a server it must be a valid
project again, with everything in it that was acknowledged before the copy began (I2, I7, I12).

    make backups COPIES=50
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lattice_remote.protocol.messages import Reply, Stored

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent / "examples")]

from memory_client import MemoryClient  # noqa: E402
from preloaded_programs import warm  # noqa: E402
from programs import program  # noqa: E402
from request_client import Light  # noqa: E402
from sandbox import Sandbox, Server, tree_of, wait_for  # noqa: E402

__all__ = ["Copy", "Writers", "check_copy", "copy_in_order", "copy_live", "resync"]

_VANISHED = 24
"""rsync's exit code when files went away while it copied, as they do in a live directory."""


def copy_live(source: Path, target: Path) -> None:
    """Copy a directory with ``rsync -a``."""
    argv = [program("rsync"), "-a", f"{source}/", f"{target}/"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode in (0, _VANISHED), done.stderr


def copy_in_order(source: Path, target: Path) -> None:
    """Copy file by file in rsync's order, by name, a directory's own files before its directories; keep the times."""
    target.mkdir(parents=True, exist_ok=True)
    entries = sorted(os.scandir(source), key=lambda entry: (entry.is_dir(follow_symlinks=False), entry.name))
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            copy_in_order(Path(entry.path), target / entry.name)
        elif not Path(entry.path).is_socket():  # of the running server: a copy of its socket is useless
            with contextlib.suppress(FileNotFoundError):
                shutil.copy2(entry.path, target / entry.name, follow_symlinks=False)


class Writers:
    """Clients that write all the time, in a thread of their own, everything that commands can do to files."""

    def __init__(self, url: str, token: str, *, count: int = 4, seed: int = 1) -> None:
        self.acknowledged: list[str] = []
        """The word of each write that was acknowledged, in order; each is to be found in the files once."""
        self.errors: list[str] = []
        """What was refused or failed; there is nothing that may."""
        self._url, self._token, self._count, self._seed = url, token, count, seed
        self._tasks: list[str] = []
        self._archived: set[str] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> "Writers":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=60)
        assert not self.errors, self.errors[:3]

    async def _run(self) -> None:
        await asyncio.gather(*(self._write(number) for number in range(self._count)))

    async def _write(self, number: int) -> None:
        rng, by = random.Random(self._seed * 100 + number), ("--actor", f"agent:w{number}")
        async with Light(self._url, self._token) as client:
            step = 0
            while not self._over.is_set():
                step += 1
                try:
                    await self._one(rng, client, by, f"w{self._seed}n{number}s{step}x")
                except Exception as error:  # noqa: BLE001 - shown by __exit__, in the test's own thread
                    self.errors.append(repr(error))
                    return

    async def _one(self, rng: random.Random, client: Light, by: tuple[str, ...], word: str) -> None:
        active = [task for task in self._tasks if task not in self._archived]
        if not active:
            await self._create(client, by, word)
            return
        task = rng.choice(active[-20:])
        match rng.randrange(12):
            case 0 | 1:
                await self._create(client, by, word)
            case 2 | 3 | 4:
                await self._marked(word, client, "comment", task, f"says {word}", *by)
            case 5:
                await self._archive(client, by, task, word)
            case 6:
                await self._marked(word, client, "attach", task, "--inline", f"text {word}", "--title", word, *by)
            case 7:
                padding = " and more" * 40_000  # over what a change carries: only announced
                await self._marked(word, client, "attach", task, "--inline", word + padding, "--title", word, *by)
            case 8:
                await self._marked(word, client, "resource", "create", f"res-{word}", *by)
            case 9:
                await self._marked(word, client, "session", "start", "--name", word, "--model", "m", "--framework", "f")
            case 10:
                await self._edit(client, task, word)
            case _:
                await client.run("status", task, rng.choice(["in_planning", "planned", "blocked"]), *by)

    async def _create(self, client: Light, by: tuple[str, ...], word: str) -> None:
        self._tasks.append(json.loads(await client.ok("create", f"Task {word}", "--json", *by))["data"]["id"])
        self.acknowledged.append(word)

    async def _marked(self, word: str, client: Light, *argv: str) -> None:
        answer = await client.run(*argv)
        assert isinstance(answer, Reply), answer
        if answer.exit_code == 0:  # the task may be archived by now
            self.acknowledged.append(word)

    async def _archive(self, client: Light, by: tuple[str, ...], task: str, word: str) -> None:
        """Move a task's files: away, and sometimes back."""
        self._archived.add(task)
        await client.run("archive", task, *by)
        if int(word[-2]) % 2:
            await client.run("unarchive", task, *by)
            self._archived.discard(task)

    async def _edit(self, client: Light, task: str, word: str) -> None:
        answer = await client.put(f"plans/{task}.md", None, f"# The plan\n\n{word}\n".encode())
        assert isinstance(answer, Stored), answer


class Copy(Server):
    """A copy of a server's data directory, as a server of its own."""

    def __init__(
        self,
        sandbox: Sandbox,
        original: Server,
        name: str,
        copy_with: Callable[[Path, Path], None] = copy_live,
    ) -> None:
        copy_with(original.data, sandbox.root / name)
        super().__init__(sandbox, name)

    def lattice(self, *argv: str) -> dict[str, Any]:
        """Run plain ``lattice`` in the copied project and return its data."""
        env = {name: value for name, value in self.env.items() if not name.startswith("LATTICE")}
        done = self.programs.run("lattice", [*argv, "--json"], cwd=self.lattice_dir().parent, env=env)
        answer: dict[str, Any] = json.loads(done.stdout)
        assert answer["ok"], answer
        return answer


def check_copy(copy: Copy, token: str, acknowledged: list[str]) -> None:
    """Start the copy and check that it is whole; leave it running.

    Raises:
        AssertionError: it is no valid project, or something that was acknowledged before it was taken is missing.
    """
    copy.start()
    asyncio.run(_open_project(copy, token))
    lattice_dir = copy.lattice_dir()
    assert copy.lattice("doctor")["data"]["findings"] == [], copy.log.read_text()[-3000:]
    before = tree_of(lattice_dir)
    copy.lattice("rebuild", "--all")
    after = tree_of(lattice_dir)
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    assert not changed, f"rebuild changed {changed}"
    for meta in lattice_dir.glob("artifacts/meta/*.json"):
        payload = json.loads(meta.read_text())["payload"]["file"]
        assert payload is None or (lattice_dir / "artifacts" / "payload" / payload).is_file(), (
            f"{meta.name}: no payload"
        )
    count = _words_in(lattice_dir)
    assert not (lost := [word for word in acknowledged if count.get(word, 0) != 1]), f"lost or doubled: {lost}"


def _words_in(lattice_dir: Path) -> dict[str, int]:
    """Count how often each word was written: by the one event, session or resource that carries it."""
    count: dict[str, int] = {}
    for text in _marked_texts(lattice_dir):
        for word in text.replace('"', " ").replace("-", " ").split():
            bare = word.removeprefix("S").strip(".,}")
            if bare.startswith("w") and bare.endswith("x"):
                count[bare] = count.get(bare, 0) + 1
    return count


def _marked_texts(lattice_dir: Path) -> Iterator[str]:
    for log in [*lattice_dir.glob("events/*.jsonl"), *lattice_dir.glob("archive/events/*.jsonl")]:
        if log.name == "_lifecycle.jsonl":
            continue
        for line in log.read_text().splitlines():
            event = json.loads(line)
            if event["type"] in {"task_created", "comment_added", "x_mix", "resource_created"}:
                data = event["data"]
                yield str(data.get("title") or data.get("body") or data.get("word") or data.get("name"))
    for meta in lattice_dir.glob("artifacts/meta/*.json"):
        yield json.loads(meta.read_text())["title"]
    for session in lattice_dir.glob("sessions/*.json"):
        if session.name != "index.json":
            yield json.loads(session.read_text())["base_name"]


async def _open_project(copy: Copy, token: str) -> None:
    async with Light(copy.url, token) as client:
        assert client.welcome.epoch


def resync(original: Server, copy: Copy, token: str) -> int:
    """Connect a client that is current with the original to the copy, and wait until it equals the copy.

    Returns the number of comparisons of its whole cache.
    """

    async def go() -> int:
        client = MemoryClient(original.url, token)
        client.start()
        await client.current()
        await client.close()
        moved = MemoryClient(copy.url, token, after=client)
        moved.start()
        try:
            await moved.current()
            assert moved.files == tree_of(copy.lattice_dir())
        finally:
            await moved.close()
        return moved.resyncs

    return asyncio.run(go())


def take_copies(numbers: range, copy_with: Callable[[Path, Path], None], *, seed: int, writes: int) -> int:
    """Take and check these copies of one server under load; print a line for each and return how many failed."""
    failed = 0
    with Sandbox(warm()) as sandbox:
        server = sandbox.server()
        server.project()
        # Small segments, so that one ends and another begins while a copy is taken.
        (server.data / "config.json").write_text('{"journal": {"segment_bytes": 200000}}\n')
        server.start()
        token = server.token("human:ana", "agent:*")
        before: list[str] = []
        for number in numbers:
            with Writers(server.url, token, seed=seed * 1000 + number) as writers:
                _wait_for_writes(writers, 30 if before else writes)
                acknowledged = before + writers.acknowledged
                began = time.monotonic()
                copy = Copy(sandbox, server, f"copy-{number}", copy_with)
                took = time.monotonic() - began
            before += writers.acknowledged
            how = f"{took:.2f} s, {len(before) - len(acknowledged)} writes meanwhile"
            failed += not _report(number, copy, token, acknowledged, server, how)
            shutil.rmtree(copy.data)
    return failed


def _wait_for_writes(writers: Writers, count: int) -> None:
    wait_for(lambda: len(writers.acknowledged) >= count or writers.errors, "writes", 300)


def _report(number: int, copy: Copy, token: str, acknowledged: list[str], server: Server, how: str) -> bool:
    try:
        check_copy(copy, token, acknowledged)
        resyncs = resync(server, copy, token)
    except Exception:  # noqa: BLE001 - whatever goes wrong is this copy's result
        traceback.print_exc()
        print(f"copy {number}: FAILED; {how}\n{copy.log.read_text()[-2000:]}", flush=True)
        return False
    finally:
        copy.stop()
    mended = next(
        (line.split("board: ")[1] for line in copy.log.read_text().splitlines() if "is a copy" in line), "whole"
    )
    print(f"copy {number}: ok; {how}; {mended}; its client compared {resyncs} times", flush=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=int, default=50, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the writes (default: %(default)s)")
    parser.add_argument("--writes", type=int, default=500, help="before the first copy (default: %(default)s)")
    parser.add_argument("--without-rsync", action="store_true", help="copy in rsync's order, without it")
    options = parser.parse_args()
    copy_with = copy_in_order if options.without_rsync else copy_live
    groups = [range(first, min(first + 10, options.copies)) for first in range(0, options.copies, 10)]  # a server each
    failed = sum(take_copies(group, copy_with, seed=options.seed, writes=options.writes) for group in groups)
    print(f"{options.copies - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
