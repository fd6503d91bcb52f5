"""Hostile command lines and edits through the real executor, thousands a minute; ``make fuzz`` runs this (I9).

    python tests/hostile/fuzz.py --lines 20000 --seed 1

Each batch has its own project. After each: nothing outside it was touched, a cache that followed every change equals
the tree, ``doctor`` finds nothing, ``rebuild --all`` changes nothing, and the worker was not replaced.
"""

import argparse
import json
import random
import secrets
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "server"), str(HERE), str(HERE.parent), str(HERE.parents[1] / "examples")]

from calls import Calls  # noqa: E402 - found on the path that was just made
from place import CANARY, Place  # noqa: E402 - found on the path that was just made
from values import PATHS, Known, Line, Lines  # noqa: E402
from worker_process import Copy, WorkerProcess, answer_of, change_of, execute, tree_of  # noqa: E402

from lattice_remote.protocol.messages import Change, Refused, Reply, Result, Returned, Stored  # noqa: E402
from lattice_remote.protocol.operations import AppendBytes, PutFile  # noqa: E402
from lattice_remote.server.ipc import Edit, RequestDone, RunCall  # noqa: E402

BATCH_LINES = 400
_MAX_LINE_S = 20.0
_MAX_MEMORY_KIB = 700 * 1024
IDENTITIES: tuple[tuple[str, tuple[str, ...]], ...] = (("human:ana", ("agent:*",)), ("agent:x", ()))
"""A token that may act as others, and one that may not."""
_START = (
    ["session", "start", "--name", "Ana", "--model", "human"],
    ["session", "start", "--name", "X", "--model", "m", "--framework", "f"],
    ["resource", "create", "gpu", "--actor", "human:ana"],
    *(["create", f"Task {number}", "--actor", "human:ana"] for number in range(5)),
    ["comment", "LAT-1", "first", "--actor", "human:ana"],
    ["archive", "LAT-5", "--actor", "human:ana"],
)


class Broken(AssertionError):
    """A broken promise; the text names it and the line."""


@dataclass
class Figures:
    """Totals of all batches."""

    outcomes: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    memory_kib: int = 0


class Batch:
    """One project and the lines that run in it; ``seed`` determines everything."""

    def __init__(self, place: Place, seed: str, figures: Figures, *, unguarded: bool = False) -> None:
        self._place = place
        self._rng = random.Random(seed)
        self._figures = figures
        self._unguarded = unguarded
        if self._rng.random() < 0.3:
            place.forget_code()
        self._copy = Copy(place.lattice, tree_of(place.lattice))
        self._known = Known(outside=place.outside)
        self._lines = Lines(self._rng, self._known)
        self._calls = Calls(self._rng, self._known, self._lines)
        self._logged: set[bytes] = set()

    def run(self, count: int) -> None:
        """Run ``count`` lines and check everything.

        Raises:
            Broken: a promise does not hold.
        """
        with self._place.worker(unguarded=self._unguarded) as worker:
            for argv in _START:
                worker.send(execute(*argv))
                self._take(Line(argv, []), worker.done(), None)
            for _ in range(count):
                self._run_one(worker)
            self._check_project(worker)
            self._figures.memory_kib = max(self._figures.memory_kib, _memory_kib(worker.pid))
            if self._figures.memory_kib > _MAX_MEMORY_KIB:
                raise Broken(f"the worker holds {self._figures.memory_kib} KiB")
        self._place.check()

    def _run_one(self, worker: WorkerProcess) -> None:
        """Run the next line or edit, and check its effect before the next."""
        identity = self._rng.choice(IDENTITIES)
        line = self._next(identity)
        began = time.monotonic()
        try:
            if isinstance(line, Edit | RunCall):
                worker.send(line)
            else:
                worker.send(execute(*line.argv, files=line.files, actor=identity[0], act_as=identity[1]))
            done = worker.done()
        except (EOFError, OSError) as error:
            raise Broken(f"the worker is gone or hangs ({error!r}) at {_shown(line)}") from error
        took = time.monotonic() - began
        self._figures.slowest_s = max(self._figures.slowest_s, took)
        if took > _MAX_LINE_S:
            raise Broken(f"{took:.1f} s for {_shown(line)}")
        self._take(line, done, None if self._unguarded else identity)

    def _next(self, identity: tuple[str, tuple[str, ...]]) -> "Line | Edit | RunCall":
        what = self._rng.random()
        if what < 0.08:
            return self._edit()
        return self._calls.call(*identity) if what < 0.3 else self._lines.line()

    def _edit(self) -> Edit:
        rng, known = self._rng, self._known
        task = rng.choice([*known.tasks[-5:], *known.archived[-2:], "task_01M8173J64RGGH4YR2NPR2QQQQ"])
        path = f"{rng.choice(['plans', 'notes'])}/{task}.md"
        if rng.random() < 0.3:
            path = rng.choice(
                [rng.choice(PATHS), path + "/x", path.upper(), f"plans/../{path}", path + "\n", f"/{path}", ""]
            )
        texts = [
            b"",
            b"text\n",
            b"a\r\nb\rc\n",
            b"\0\1\2",
            b"\xff\xfe",
            rng.randbytes(500),
            b"x\n" * 9000,
            b"y" * (1 << 20),
        ]
        there = self._copy.files.get(path)
        base = rng.choice([there, there, None, rng.choice(texts)])
        text = rng.choice([rng.choice(texts), (there or b"") + rng.choice(texts)])
        return Edit(secrets.token_hex(16), path, base, text, "tok_1", "human:ana")

    # --- replies and changes ---

    def _take(
        self, line: Line | Edit | RunCall, done: RequestDone, identity: tuple[str, tuple[str, ...]] | None
    ) -> None:
        change = change_of(done)
        try:
            if change is not None:
                self._copy.follow(change)
                self._learn(change, identity)
            self._check_answer(line, answer_of(done))
        except AssertionError as error:
            raise Broken(f"{error}\n  at {_shown(line)}") from error

    def _check_answer(self, line: Line | Edit | RunCall, answer: Result | Refused | None) -> None:
        match answer:
            case None:
                self._figures.outcomes["waits"] += 1
            case Stored(outcome=outcome):
                self._figures.outcomes[f"edit {outcome}"] += 1
            case Returned(status=status, payload=payload):
                self._figures.outcomes[f"call {status}"] += 1
                assert isinstance(line, RunCall)
                json.loads(payload)
                self._check_secrecy(payload.decode())
            case Refused(code=code, message=message):
                self._figures.outcomes[f"refused {code}" + (" by the hook" if "tried to" in message else "")] += 1
                assert code.startswith("REMOTE_"), code
                assert message.isprintable() and 0 < len(message) <= 4096, f"not one clear line: {message!r}"
                self._check_secrecy(message)
            case Reply(exit_code=exit_code, stdout=stdout, stderr=stderr):
                output = (stdout + stderr).decode()
                outcome = "ran" if exit_code == 0 else "an error of lattice's own"
                if "failed on the server and was undone" in output:
                    outcome = "broke down, undone: " + output.split("undone: ")[1].split(":")[0]
                self._figures.outcomes[outcome] += 1
                self._check_secrecy(output)

    def _check_secrecy(self, output: str) -> None:
        assert CANARY not in output, "a canary was read"
        if not self._unguarded:
            assert str(self._place.root) not in output, "the server's directories are told"

    def _learn(self, change: Change, identity: tuple[str, tuple[str, ...]] | None) -> None:
        known = self._known
        for operation in change.ops:
            if not isinstance(operation, AppendBytes | PutFile) or not operation.path.endswith(".jsonl"):
                continue
            for raw in operation.data.splitlines():
                if raw not in self._logged and raw.strip():
                    self._logged.add(raw)
                    event = json.loads(raw)
                    known.events.append(event["id"])
                    if identity is not None and "archive" not in change.command:
                        _check_actor(event["actor"], *identity)
        files = self._copy.files
        known.shorts = list(json.loads(files.get("ids.json", b'{"map": {}}'))["map"])
        known.tasks = [path[6:-5] for path in files if path.startswith("tasks/")]
        known.archived = [path[14:-5] for path in files if path.startswith("archive/tasks/")]
        known.artifacts = [path[15:-5] for path in files if path.startswith("artifacts/meta/")]
        known.resources = [path.split("/")[1] for path in files if path.startswith("resources/")]
        known.sessions = [
            path[9:-5] for path in files if path.startswith("sessions/") and "-" in path and path.count("/") == 1
        ]

    # --- the project afterwards ---

    def _check_project(self, worker: WorkerProcess) -> None:
        files = tree_of(self._place.lattice)
        assert self._copy.files == files, "a copy that followed every change differs"
        assert worker.reconcile().change is None, "the tree is not what the journal says"
        assert not any(CANARY.encode() in data for data in files.values()), "a canary is in the tree"
        if self._unguarded:
            return  # without the policy a client may damage its own project, and nothing else
        findings = json.loads(worker.ok("doctor", "--json"))["data"]["findings"]
        findings = [finding for finding in findings if "Stale holder" not in finding["message"]]
        if findings:
            raise Broken(f"doctor: {findings[:5]}")
        worker.ok("rebuild", "--all")
        rebuilt = tree_of(self._place.lattice)
        differing = [path for path in files.keys() | rebuilt.keys() if _form(path, files) != _form(path, rebuilt)]
        if differing:
            raise Broken(f"rebuild --all changes {differing[:5]}")


def _form(path: str, files: dict[str, bytes]) -> object:
    """Return a file normalised as by ``rebuild``: order within a second and unused codes are free."""
    data = files.get(path)
    if data is not None and path == "events/_lifecycle.jsonl":
        return sorted(data.splitlines())
    if data is not None and path == "ids.json":
        return json.loads(data)["map"]
    return data


def _check_actor(actor: object, own: str, act_as: tuple[str, ...]) -> None:
    """Fail if an event names an actor that the token does not allow."""
    if isinstance(actor, dict):
        kind = "human" if actor["model"] == "human" else "agent"
        actor = f"{kind}:{actor['base_name']}"
        assert actor.lower() == own or (act_as and actor.startswith("agent:")), f"an event by {actor} for {own}"
        return
    assert actor == own or (act_as and str(actor).startswith("agent:")), f"an event by {actor} for {own}"


def _memory_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def _shown(line: Line | Edit | RunCall) -> str:
    if isinstance(line, RunCall):
        return f"a call of {line.surface!r}, {line.name!r}, {line.payload[:300]!r}"
    if isinstance(line, Edit):
        return f"an edit of {line.path!r}"
    argv = [word if len(word) < 120 else f"{word[:100]}... ({len(word)} characters)" for word in line.argv]
    files = [(file.index, file.name, None if file.data is None else len(file.data)) for file in line.files]
    return f"lattice {argv!r} with the files {files!r}" if files else f"lattice {argv!r}"


def run_batch(seed: str, count: int, figures: Figures, *, unguarded: bool = False) -> None:
    """Run one batch in a place of its own, which is removed."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as directory:
        Batch(Place(Path(directory).resolve()), seed, figures, unguarded=unguarded).run(count)


def main() -> int:
    """Run batches until the lines are used up; at the first failure return 1 and print how to repeat it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--lines", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--unguarded", action="store_true", help="without the policy: the audit hook alone")
    options = parser.parse_args()
    figures = Figures()
    began, done, seed = time.monotonic(), 0, options.seed
    while done < options.lines:
        count = min(BATCH_LINES, options.lines - done)
        try:
            run_batch(f"{seed}", count, figures, unguarded=options.unguarded)
        except AssertionError as error:
            print(f"FAILED: {error}")
            more = " UNGUARDED=1" if options.unguarded else ""
            print(f"repeat it: make fuzz SEED={seed} LINES={count}{more}")
            return 1
        done, seed = done + count, seed + 1
        if sys.stderr.isatty():
            print(f"\r{done} lines", end="", file=sys.stderr)
    took = time.monotonic() - began
    print(f"{done} lines in {took:.0f} s ({done / took:.0f}/s), seeds {options.seed} to {seed - 1}: nothing escaped")
    print(f"slowest {figures.slowest_s:.2f} s; the worker held at most {figures.memory_kib // 1024} MiB")
    for outcome, number in figures.outcomes.most_common():
        print(f"  {number:7}  {outcome}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
