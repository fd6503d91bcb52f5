"""A seeded mix of commands from several people at once, and the account of what must be true afterwards.

Every command carries a word of its own, so that afterwards each one that was acknowledged can be looked for in
the server's files: there, exactly once. One that was not acknowledged may be there, once at the most (I6).
"""

import json
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from sandbox import Client, Server, differences, tree_of, wait_for

__all__ = ["Mix", "Outcome"]


@dataclass
class Outcome:
    """What was asked for and what was said: words of acknowledged and of unacknowledged writes."""

    acknowledged: list[str] = field(default_factory=list)
    unacknowledged: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    tracebacks: list[str] = field(default_factory=list)


class Mix:
    """Runs ``commands`` random commands on each client, all clients at once."""

    def __init__(self, server: Server, clients: list[Client], *, seed: int, commands: int) -> None:
        self.server, self.clients = server, clients
        self._seed, self._commands = seed, commands
        self._outcome = Outcome()
        self._lock = threading.Lock()
        self._tasks: list[str] = []
        self.done = 0
        """How many commands have ended so far."""

    def run(self) -> Outcome:
        """Run everything and return what came of it."""
        with ThreadPoolExecutor(len(self.clients)) as pool:
            list(pool.map(self._one_person, range(len(self.clients))))
        return self._outcome

    def _one_person(self, number: int) -> None:
        rng = random.Random(self._seed * 1000 + number)
        client, actor = self.clients[number], f"agent:mix-{number}"
        for n in range(self._commands):
            word = f"w{self._seed}x{number}x{n}x"
            argv, marked = self._command(rng, client, actor, word)
            done = client.run(*argv)
            with self._lock:
                self._record(word if marked else None, done.returncode, done.stdout, done.stderr, argv)

    def _record(self, word: str | None, code: int, out: str, err: str, argv: tuple[str, ...]) -> None:
        self.done += 1
        if "Traceback" in out + err:
            self._outcome.tracebacks.append(f"{argv}: {err}")
        if code:
            self._outcome.errors.append(f"{' '.join(argv)[:80]}: {(err or out).strip()[:300]}")
        if word is not None:
            (self._outcome.unacknowledged if code else self._outcome.acknowledged).append(word)
        if argv[0] == "create" and not code:
            self._tasks.append(out.strip())

    def _command(self, rng: random.Random, client: Client, actor: str, word: str) -> tuple[tuple[str, ...], bool]:
        """Return a command line, and whether its word must be found in the files when it succeeds."""
        by = ("--actor", actor)
        with self._lock:
            task = rng.choice(self._tasks) if self._tasks else None
        if task is None:
            return ("create", f"Task {word}", "--quiet", *by), True
        match rng.randrange(13):
            case 0 | 1:
                return ("create", f"Task {word}", "--quiet", *by), True
            case 2 | 3 | 4:
                return ("comment", task, f"says {word}", *by), True
            case 5:
                return ("status", task, rng.choice(["in_planning", "planned", "blocked"]), *by), False
            case 6:
                return ("attach", task, "--inline", f"text {word}", "--title", f"Title {word}", *by), True
            case 7:
                return ("resource", "create", f"res-{word}", *by), True
            case 8:
                return ("session", "start", "--name", f"S{word}", "--model", "m", "--framework", "f"), True
            case 9:
                return (rng.choice(["archive", "unarchive"]), task, *by), False
            case 10:
                return ("event", task, "x_mix", "--data", json.dumps({"word": word}), *by), True
            case 11:
                self._edit_plan(rng, client, word)
                return ("list", "--quiet"), False
            case _:
                return ("next", "--claim", *by), False

    def _edit_plan(self, rng: random.Random, client: Client, word: str) -> None:
        plans = sorted((client.lattice_dir / "plans").glob("task_*.md"))
        if plans:
            with rng.choice(plans).open("a") as plan:
                plan.write(f"\n- edited {word}\n")

    # --- the account ---

    def check(self, outcome: Outcome) -> None:
        """Insist on everything that must be true once all are back (I1, I3, I6)."""
        assert not outcome.tracebacks, outcome.tracebacks
        for client in self.clients:
            settle(client, self.server)
        count = words_in(self.server.lattice_dir())
        lost = [word for word in outcome.acknowledged if count.get(word, 0) == 0]
        doubled = [word for word in outcome.acknowledged + outcome.unacknowledged if count.get(word, 0) > 1]
        assert not lost, f"acknowledged and lost: {lost}"
        assert not doubled, f"done twice: {doubled}"
        self._check_project()

    def _check_project(self) -> None:
        """Doctor finds nothing, and rebuilding every snapshot from the events changes nothing."""
        client = self.clients[0]
        doctor = client.run("doctor", "--json")
        assert doctor.returncode == 0, doctor.stdout
        assert json.loads(doctor.stdout)["data"]["findings"] == []
        before = tree_of(self.server.lattice_dir())
        client.ok("rebuild", "--all")
        after = tree_of(self.server.lattice_dir())
        changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
        assert not changed, f"rebuild changed {sorted(changed)}"


def settle(client: Client, server: Server) -> None:
    """Wait until the cache equals the server's directory; its agent does that by itself once it runs."""
    client.run("remote", "push")
    wait_for(
        lambda: not differences(client.lattice_dir, server.lattice_dir()),
        f"{client.dir.name} to equal the server; it differs in {differences(client.lattice_dir, server.lattice_dir())}",
    )


def words_in(lattice_dir: Path) -> dict[str, int]:
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
