"""A seeded mix of commands of every family from several people at once.

Each command has an actor of its own, ``agent:w7x0x12x``, by which ``account.py`` finds afterwards whether and how often
it took effect.
"""

import contextlib
import fcntl
import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import launcher_programs
import rest_program
from account import Account, Effect
from conflicting_edits import edit_at_once
from preloaded_programs import warm
from sandbox import Client, Programs, Server

__all__ = ["Command", "Gate", "Mix"]

_STATUSES = ["backlog", "in_planning", "planned", "blocked"]
_COLD_EVERY = 8
"""Of so many commands one is started as a person starts it, two by the launcher; the others are forked (see
``preloaded_programs.py``)."""


@dataclass(frozen=True)
class Command:
    """A command line, and its effect if it succeeds (None: nothing to be found)."""

    argv: tuple[str, ...]
    effect: Effect | None
    then: Callable[[str], None] = field(default=lambda _out: None)
    """Called with what it printed when it succeeded."""
    program: str = "lattice"
    """Or ``board_writer``, through the Python interface; or ``surface_caller``, as a page or an MCP client does it; or
    ``rest_caller``, over HTTP: method, path and body."""


class Gate:
    """A shared and exclusive lock: commands pass together; ``shut`` waits for those under way and keeps out others."""

    def __init__(self) -> None:
        self._passing, self._shut = 0, False
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Pass; waits while it is shut."""
        with self._changed:
            self._changed.wait_for(lambda: not self._shut)
            self._passing += 1
        try:
            yield
        finally:
            with self._changed:
                self._passing -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def shut(self) -> Iterator[None]:
        """Keep all commands out."""
        with self._changed:
            self._shut = True
            self._changed.wait_for(lambda: self._passing == 0)
        try:
            yield
        finally:
            with self._changed:
                self._shut = False
                self._changed.notify_all()


class Mix:
    """Run of ``commands`` random commands on each client, all clients at once, with an account."""

    def __init__(self, server: Server, clients: list[Client], *, seed: int, commands: int) -> None:
        self.server, self.clients = server, clients
        self.seed = seed
        self.account = Account(server, clients)
        self.gate = Gate()
        self.done = 0
        """How many commands have ended so far."""
        self._commands = commands
        self._lock = threading.Lock()
        self._cold = Programs()
        self._launcher = launcher_programs.install(Path(server.env["HOME"]) / "launcher")
        self._tasks: list[str] = []
        self._comments: list[tuple[str, str]] = []  # task, comment
        self._reactions: list[tuple[str, str, str]] = []  # task, comment, who
        self._conflicted: set[str] = set()  # plans
        self._links: list[tuple[str, str]] = []
        self._branches: list[tuple[str, str]] = []
        self._resources: list[str] = []
        self._held: list[tuple[str, str]] = []  # resource, holder
        self._sessions: list[str] = []
        often = [self._create, self._comment, self._comment, self._resource]
        of_tasks = [self._create, self._update, self._status, self._assign, self._archive, self._complete, self._next]
        of_links = [self._link, self._unlink, self._branch]
        others = [
            self._comment_file,
            self._by_program,
            self._by_surface,
            self._over_http,
            self._over_http,
            self._on_comment,
            self._on_comment,
            self._attach,
            self._attach_file,
            self._resource,
            self._session,
        ]
        self._families = [*often, *of_tasks, *of_links, *others, self._event]

    def run(self) -> Account:
        """Run everything and return the account."""
        with ThreadPoolExecutor(len(self.clients)) as pool:
            list(pool.map(self._one_person, range(len(self.clients))))
        return self.account

    def _one_person(self, number: int) -> None:
        rng = random.Random(self.seed * 1000 + number)
        client = self.clients[number]
        for n in range(self._commands):
            word = f"w{self.seed}x{number}x{n}x"
            with self.gate.passing():
                if rng.random() < 0.15:
                    self._edit(rng, client, f"e{word}")
                if rng.random() < 0.1:
                    self._conflict(rng, client, word)
                command = self._command(rng, word)
                programs = self._programs(rng.randrange(_COLD_EVERY))
                done = self._run(client, command, programs)
                with self._lock:
                    self.account.record(client, command.argv, command.effect, done)
                    if done.returncode == 0:
                        command.then(done.stdout)
            self.done += 1

    def _programs(self, number: int) -> Programs | None:
        """Return the programs for one command: installed, by the launcher, or forked."""
        return {0: self._cold, 1: self._launcher, 2: self._launcher}.get(number)

    def _run(self, client: Client, command: Command, programs: Programs | None) -> subprocess.CompletedProcess[str]:
        if command.program == "lattice":
            return client.run(*command.argv, programs=programs)
        if command.program == "rest_caller":
            method, path, body = command.argv
            return rest_program.call(client, method, path, json.loads(body))
        return warm().run(command.program, command.argv, cwd=client.dir, env=client.env)

    # --- command lines ---

    def _command(self, rng: random.Random, word: str) -> Command:
        with self._lock:
            if not self._tasks:
                return self._create(rng, word)
            make = rng.choice(self._families)
            return make(rng, word) or self._comment(rng, word)

    def _by(self, word: str) -> tuple[str, str]:
        return "--actor", f"agent:{word}"

    def _create(self, rng: random.Random, word: str) -> Command:
        argv = ("create", f"Task {word}", "--quiet", *self._by(word))
        return Command(argv, Effect(word, "task_created"), lambda out: self._tasks.append(out.strip()))

    def _comment(self, rng: random.Random, word: str) -> Command:
        task = rng.choice(self._tasks)
        argv = ("comment", task, f"says {word}", "--json", *self._by(word))

        def note(out: str) -> None:
            self._comments.append((task, json.loads(out)["data"]["last_event_id"]))

        return Command(argv, Effect(word, "comment_added"), note)

    def _by_program(self, rng: random.Random, word: str) -> Command:
        argv = (rng.choice(self._tasks), f"by a program {word}", f"agent:{word}")
        return Command(argv, Effect(word, "comment_added"), program="board_writer")

    def _by_surface(self, rng: random.Random, word: str) -> Command:
        task, actor = rng.choice(self._tasks), f"agent:{word}"
        path, says = f"/api/tasks/{task}", f"through a surface {word}"
        surface, name, payload, kind = rng.choice(
            [
                ("dashboard", "/api/tasks", {"title": f"Task {word}"}, "task_created"),
                ("dashboard", f"{path}/comment", {"body": says}, "comment_added"),
                ("dashboard", f"{path}/assign", {"assigned_to": actor}, "assignment_changed"),
                ("dashboard", f"{path}/archive", {}, "task_archived"),
                ("mcp", "lattice_comment", {"task_id": task, "text": says}, "comment_added"),
                ("mcp", "lattice_create", {"title": f"Task {word}"}, "task_created"),
            ]
        )
        argv = (surface, name, json.dumps({**payload, "actor": actor}))
        return Command(argv, Effect(word, kind), program="surface_caller")

    def _over_http(self, rng: random.Random, word: str) -> Command:
        task, actor = rng.choice(self._tasks), f"agent:{word}"
        path, about = f"/tasks/{task}", {"description": f"over HTTP {word}", "assigned_to": actor}
        method, path, body, kind = rng.choice(
            [
                ("POST", "/tasks", {"title": f"Task {word}"}, "task_created"),
                ("POST", f"{path}/comments", {"body": f"over HTTP {word}"}, "comment_added"),
                ("PATCH", path, about, "assignment_changed"),
                ("PATCH", path, about, "field_updated"),
                ("POST", f"{path}/archive", {}, "task_archived"),
                ("POST", f"{path}/claim", {}, "assignment_changed"),
                ("POST", "/next", {}, "assignment_changed"),
                *(("POST", f"/resources/{name}/acquire", {}, "resource_acquired") for name in self._resources),
            ]
        )
        argv = (method, path, json.dumps({**body, "actor": actor}))
        return Command(argv, Effect(word, kind, none_if=rest_program.NOTHING), program="rest_caller")

    def _comment_file(self, rng: random.Random, word: str) -> Command:
        file = self.server.log.parent / f"{word}.txt"
        file.write_text(f"A file says {word}.\n")
        argv = ("comment", rng.choice(self._tasks), "--file", str(file), *self._by(word))
        return Command(argv, Effect(word, "comment_added"))

    def _on_comment(self, rng: random.Random, word: str) -> Command | None:
        if self._reactions and rng.random() < 0.3:
            *reaction, who = self._reactions.pop()
            return Command(("unreact", *reaction, "thumbsup", *self._by(who)), Effect(who, "reaction_removed"))
        if not self._comments:
            return None
        comment = rng.choice(self._comments)
        match rng.randrange(3):
            case 0:
                argv = ("comment-edit", *comment, f"now says {word}", *self._by(word))
                return Command(argv, Effect(word, "comment_edited"))
            case 1:
                argv = ("react", *comment, "thumbsup", *self._by(word))
                return Command(
                    argv, Effect(word, "reaction_added"), lambda _out: self._reactions.append((*comment, word))
                )
            case _:
                self._comments.remove(comment)
                return Command(("comment-delete", *comment, *self._by(word)), Effect(word, "comment_deleted"))

    def _update(self, rng: random.Random, word: str) -> Command:
        argv = ("update", rng.choice(self._tasks), f"description=about {word}", *self._by(word))
        return Command(argv, Effect(word, "field_updated"))

    def _status(self, rng: random.Random, word: str) -> Command:
        argv = ("status", rng.choice(self._tasks), rng.choice(_STATUSES), "--force", "--reason", "soak")
        return Command((*argv, *self._by(word)), Effect(word, "status_changed", none_if="Already"))

    def _assign(self, rng: random.Random, word: str) -> Command:
        argv = ("assign", rng.choice(self._tasks), f"agent:{word}", *self._by(word))
        return Command(argv, Effect(word, "assignment_changed"))

    def _link(self, rng: random.Random, word: str) -> Command | None:
        if len(self._tasks) < 2:
            return None
        pair = tuple(rng.sample(self._tasks, 2))
        argv = ("link", pair[0], "related_to", pair[1], *self._by(word))
        return Command(argv, Effect(word, "relationship_added"), lambda _out: self._links.append((pair[0], pair[1])))

    def _unlink(self, rng: random.Random, word: str) -> Command | None:
        if self._branches and rng.random() < 0.5:
            task, branch = self._branches.pop()
            return Command(("branch-unlink", task, branch, *self._by(word)), Effect(word, "branch_unlinked"))
        if not self._links:
            return None
        one, other = self._links.pop()
        return Command(("unlink", one, "related_to", other, *self._by(word)), Effect(word, "relationship_removed"))

    def _branch(self, rng: random.Random, word: str) -> Command:
        task = rng.choice(self._tasks)
        argv = ("branch-link", task, f"feat/{word}", *self._by(word))
        return Command(argv, Effect(word, "branch_linked"), lambda _out: self._branches.append((task, f"feat/{word}")))

    def _complete(self, rng: random.Random, word: str) -> Command:
        argv = ("complete", rng.choice(self._tasks), "--review", f"reviewed {word}", *self._by(word))
        return Command(argv, Effect(word, "artifact_attached"))

    def _next(self, rng: random.Random, word: str) -> Command:
        argv = ("next", "--claim", "--json", *self._by(word))
        return Command(argv, Effect(word, "assignment_changed", none_if='"data": null'))

    def _archive(self, rng: random.Random, word: str) -> Command:
        command, effect = rng.choice([("archive", "task_archived"), ("unarchive", "task_unarchived")])
        return Command((command, rng.choice(self._tasks), *self._by(word)), Effect(word, effect))

    def _attach(self, rng: random.Random, word: str) -> Command:
        argv = ("attach", rng.choice(self._tasks), "--inline", f"text {word}", "--title", word, *self._by(word))
        return Command(argv, Effect(word, "artifact_attached"))

    def _attach_file(self, rng: random.Random, word: str) -> Command:
        file = self.server.log.parent / f"{word}.bin"
        file.write_bytes(rng.randbytes(rng.choice([10, 5_000, 400_000, 3_000_000])))
        argv = ("attach", rng.choice(self._tasks), str(file), "--title", word, *self._by(word))
        return Command(argv, Effect(word, "artifact_attached"))

    def _resource(self, rng: random.Random, word: str) -> Command:
        if not self._resources or (len(self._resources) < 3 and rng.random() < 0.2):
            holders = "50" if rng.random() < 0.7 else "1"
            argv: tuple[str, ...] = ("resource", "create", f"res-{word}", "--max-holders", holders, *self._by(word))
            return Command(argv, Effect(word, "resource_created"), lambda _out: self._resources.append(f"res-{word}"))
        if self._held and rng.random() < 0.5:
            what = rng.choice(["release", "heartbeat"])
            resource, holder = self._held.pop()
            argv = ("resource", what, resource, *self._by(holder))
            return Command(argv, Effect(holder, {"release": "resource_released"}.get(what, "resource_heartbeat")))
        resource = rng.choice(self._resources)
        wait = ("--wait", "--timeout", "1") if rng.random() < 0.5 else ()
        argv = ("resource", "acquire", resource, *wait, *self._by(word))
        return Command(argv, Effect(word, "resource_acquired"), lambda _out: self._held.append((resource, word)))

    def _session(self, rng: random.Random, word: str) -> Command:
        """Start a session, act as one or end it: mostly an own one, else another's, which is refused."""
        person = word.split("x")[1]
        own = [name for name in self._sessions if name.startswith(f"Sw{self.seed}x{person}x")]
        name = rng.choice(own if own and rng.random() < 0.8 else self._sessions) if self._sessions else None
        if name is not None and rng.random() < 0.3:
            return Command(("comment", rng.choice(self._tasks), f"as {name}", "--name", name), None)
        if name is not None and rng.random() < 0.5:
            if name in own:
                self._sessions.remove(name)
            return Command(("session", "end", name), Effect(name, "session_ended"))
        argv = ("session", "start", "--name", f"S{word}", "--model", "m", "--framework", "f", "--quiet")
        return Command(argv, Effect(f"S{word}", "session_started"), lambda out: self._sessions.append(out.strip()))

    def _event(self, rng: random.Random, word: str) -> Command:
        argv = ("event", rng.choice(self._tasks), "x_mix", "--data", json.dumps({"word": word}), *self._by(word))
        return Command(argv, Effect(word, "x_mix"))

    # --- files that people edit ---

    def _edit(self, rng: random.Random, client: Client, word: str) -> None:
        """Edit a plan or notes, or begin new notes, as an editor does."""
        plans = sorted((client.lattice_dir / "plans").glob("task_*.md"))
        if not plans:
            return
        plan = rng.choice(plans)
        path = plan if rng.random() < 0.7 else client.lattice_dir / "notes" / plan.name
        line = f"\n- edited {word}\n"
        save = rng.choice([append_in_place, append_in_pieces, save_by_rename])
        kept = save(client, path, line)
        self.account.edited(client, word, kept=kept)

    def _conflict(self, rng: random.Random, client: Client, word: str) -> None:
        """Edit the same line of a plan here and on another client, before either can send it."""
        other = rng.choice([each for each in self.clients if each is not client])
        words = (f"c{word}", f"d{word}")
        with self._lock:
            plan = edit_at_once(client, other, words, but=self._conflicted)
            if plan is not None:
                self._conflicted.add(plan)
                self.account.conflicted(words, (client, other))


def append_in_pieces(client: Client, path: Path, line: str) -> bool:
    """Like ``append_in_place``, with pauses in which a reader may take the part for the whole."""
    return append_in_place(client, path, line, pause_s=0.2)


def append_in_place(_client: Client, path: Path, line: str, *, pause_s: float = 0.0) -> bool:
    """Append a line; return whether it surely went into the file that has this name."""
    with path.open("a") as file:
        for piece in (line[:8], line[8:]):
            file.write(piece)
            file.flush()
            time.sleep(pause_s)
        with contextlib.suppress(FileNotFoundError):
            return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    return False


def save_by_rename(client: Client, path: Path, line: str) -> bool:
    """Save as editors do, at once: a file that was stored by others since is not overwritten."""
    with (client.lattice_dir / ".remote/lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = path.read_text() if path.exists() else ""
        scratch = path.with_name(f".{path.name}.swp")
        scratch.write_text(text + line)
        scratch.replace(path)
    return True
