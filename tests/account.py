"""The account of a mix: acknowledged, refused and unknown commands, compared with the files at the end.

- acknowledged (exit 0): its effect is there, exactly once;
- an error that leaves the outcome unknown, or a killed command: at most once;
- any other error: there is no effect.
"""

import json
import subprocess
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from conflicting_edits import Conflict, conflict_copies_in
from lattice_remote.server.journal.segment import JournalReader
from sandbox import Client, Server, differences, tree_of, wait_for

__all__ = ["Account", "Effect", "effects_in", "events_in", "oldest_change", "owner_of", "words_in", "words_in_texts"]

_SETTLE_S = 60.0


@dataclass(frozen=True)
class Effect:
    """Effect of a command: an event of ``kind`` by ``agent:WHO``, or a session's file.

    A command that printed ``none_if`` had nothing to do and has no effect.
    """

    who: str
    kind: str
    none_if: str | None = None
    board: str = "board"
    """The project that was meant."""

    @property
    def key(self) -> tuple[str, str]:
        return self.who, self.kind


def owner_of(client: Client) -> str:
    """Return the actor of a client's token."""
    return f"human:{client.dir.name}"


class Account:
    """Thread-safe. ``check()`` raises AssertionError."""

    def __init__(self, server: Server, clients: list[Client]) -> None:
        self._server, self._clients = server, clients
        self._lock = threading.Lock()
        self.acknowledged: set[tuple[str, str]] = set()
        self.unknown: set[tuple[str, str]] = set()
        self.refused: dict[tuple[str, str], str] = {}
        self.edits: set[str] = set()
        self.lost_edits: set[str] = set()
        self.conflicts: list[Conflict] = []
        self.errors: list[str] = []
        self.defects: list[str] = []
        self.forgotten = 0
        """How much that was acknowledged was taken back by a rollback of the data directory."""
        self.forgotten_events: set[str] = set()
        """The ids of all events that a rollback has taken."""
        self._meant: dict[tuple[str, str] | str, set[str]] = {}
        """Under whose token each effect, or each word of an edit, was asked for; "" is plain lattice on the server."""
        self._boards: dict[tuple[str, str], str] = {}
        self._kept: list[Counter[str]] = []
        """The words of each text that a client withheld or rescued."""
        self._guests: dict[str, set[str]] = {}
        """Who else works in a client's directory, by its person: whoever comes first sends what is saved there."""

    # --- while the mix runs ---

    def record(
        self,
        client: Client,
        argv: tuple[str, ...],
        effect: Effect | None,
        done: subprocess.CompletedProcess[str],
        *,
        owner: str | None = None,
    ) -> None:
        """Record the end of a command. ``owner`` is the actor of its token, by default the client's."""
        shown = f"{client.dir.name}: {' '.join(argv)[:100]}"
        said = (done.stderr or done.stdout).strip()
        with self._lock:
            if "Traceback" in done.stdout + done.stderr:
                self.defects.append(f"a traceback from {shown}: {said}")
            if done.returncode:
                self.errors.append(f"{shown}: {said[:300]}")
                lines = [line for line in done.stderr.splitlines() if not line.startswith("lattice-remote: ")]
                # A launcher whose warm process was killed runs the command again, which prints the same error again.
                is_repeated = len(lines) == 2 and lines[0] == lines[1]
                if len(lines) > 1 and not is_repeated:
                    self.defects.append(f"an error of {len(lines)} lines from {shown}: {said}")
            if effect is None:
                return
            self._mean(effect.key, owner or owner_of(client))
            self._boards[effect.key] = effect.board
            if done.returncode == 0:
                if effect.none_if is None or effect.none_if not in done.stdout:
                    self.acknowledged.add(effect.key)
            elif "may have taken effect" in said or done.returncode < 0:
                self.unknown.add(effect.key)
            else:
                self.refused[effect.key] = f"{shown}: {said[:300]}"

    def acknowledge(self, effect: Effect, owner: str) -> None:
        """Record effects under the token of ``owner``, "" for plain lattice in the server's directory."""
        with self._lock:
            self._mean(effect.key, owner)
            self.acknowledged.add(effect.key)

    def leave_unknown(self, effect: Effect, owner: str) -> None:
        """Record effects that may have happened."""
        with self._lock:
            self._mean(effect.key, owner)
            self.unknown.add(effect.key)

    def share(self, client: Client, guest: str) -> None:
        """Record that another person works in a client's directory, so that saved files have an unknown author."""
        with self._lock:
            self._guests.setdefault(owner_of(client), set()).add(guest)

    def _mean(self, what: tuple[str, str] | str, owner: str) -> None:
        self._meant.setdefault(what, set()).add(owner)

    def edited(self, client: Client, word: str, *, kept: bool) -> None:
        """Record a word written into a plan or notes of a cache; ``kept``: surely into the file itself."""
        with self._lock:
            self._mean(word, owner_of(client))
            (self.edits if kept else self.lost_edits).add(word)

    def conflicted(self, words: Conflict, clients: tuple[Client, Client]) -> None:
        """Record words that two clients wrote into the same line of one text."""
        with self._lock:
            for word, client in zip(words, clients, strict=True):
                self._mean(word, owner_of(client))
            self.edits.update(words)
            self.conflicts.append(words)

    def may_lose_edits(self, words: Iterable[str]) -> None:
        """Record words that a fault has overwritten in a cache: those not on the server may be lost."""
        on_server = words_in_texts(self._server.lattice_dir())
        with self._lock:
            lost = {word for word in words if word in self.edits and not on_server[word]}
            self.edits -= lost
            self.lost_edits |= lost

    def forget_what_is_not_in(self, lattice_dir: Path, events: set[str]) -> None:
        """Record that the server's files were restored to these: effects that they lack are not expected any longer.

        ``events`` are the ids that there were before.
        """
        effects, words = sum(self._effects().values(), Counter()), words_in_texts(lattice_dir)
        with self._lock:
            gone = {key for key in self.acknowledged if key not in effects}
            self.forgotten += len(gone)
            self.acknowledged -= gone
            self.unknown |= gone
            lost = {word for word in self.edits if word not in words}
            self.edits -= lost
            self.lost_edits |= lost
            self.forgotten_events |= events - {event["id"] for event in events_in(lattice_dir)}

    # --- afterwards ---

    def check(self) -> dict[str, int]:
        """Check the invariants after the faults (I1, I3, I6, I7), and return the figures."""
        assert not self.defects, self.defects
        self._send_edits()
        self._drop_withheld()
        self._wait_until_equal()
        self._kept += [copy for client in self._clients for copy in _rescued_in(client)]
        found = self._effects()
        self._check_effects(sum(found.values(), Counter()))
        self._check_boards(found)
        self._check_edits()
        changes = check_numbers(self._server)
        self._check_project()
        return {
            "acknowledged": len(self.acknowledged),
            "unknown": len(self.unknown),
            "refused": len(self.refused),
            "edits": len(self.edits),
            "conflicts": self._check_conflicts(),
            "forgotten": self.forgotten,
            "changes": changes,
        }

    def check_who(self, seen: Mapping[tuple[str, str] | str, set[str]]) -> int:
        """Check that each seen effect has its requester's token; return their number.

        ``seen`` are the owners of the tokens of all changes that have an effect, or bring a word (I13).
        """
        known = {what: owners for what, owners in seen.items() if what in self._meant}
        wrong = {what: owners for what, owners in known.items() if not owners <= self._allowed(what)}
        assert not wrong, f"under another token than meant: {[(w, o, self._meant[w]) for w, o in wrong.items()]}"
        return len(known)

    def _allowed(self, what: tuple[str, str] | str) -> set[str]:
        meant = self._meant[what]
        return meant.union(*(self._guests.get(owner, ()) for owner in meant)) if isinstance(what, str) else meant

    def _send_edits(self) -> None:
        """Run one request at each client, which sends its edits. Nothing is compared or fetched for it."""
        for client in self._clients:
            wait_for(lambda: client.run("remote", "push").returncode == 0, f"{client.dir.name} to send edits", 60)  # noqa: B023

    def _drop_withheld(self) -> None:
        """Keep the words of each text that waits for the user's decision, and decide for the server's."""
        for client in self._clients:
            status = client.run("remote", "status", "--json")
            for path in json.loads(status.stdout)["data"]["withheld_edits"]:
                text, aside = client.lattice_dir / path, client.lattice_dir / ".remote/conflicts" / path
                # A conflict of the same text ends with it.
                self._kept += [words_in(copy.read_bytes()) for copy in (text, *aside.parent.glob(f"{aside.stem}.*"))]
                client.ok("remote", "resolve", path, "--theirs")

    def _effects(self) -> dict[str, Counter[tuple[str, str]]]:
        projects = sorted((self._server.data / "projects").iterdir())
        return {project.name: effects_in(project / ".lattice") for project in projects}

    def _check_boards(self, found: Mapping[str, Counter[tuple[str, str]]]) -> None:
        """Check that each effect is on the board that its command meant (I13)."""
        wrong = [
            (key, board)
            for board, effects in found.items()
            for key in effects
            if key in self._boards and self._boards[key] != board
        ]
        assert not wrong, f"on another board than meant: {wrong}"

    def _wait_until_equal(self) -> None:
        """Wait until the caches equal the server (I3)."""
        for client in self._clients:
            here, there = client.lattice_dir, self._server.lattice_dir()
            try:
                wait_for(lambda: not differences(here, there), "caches to become equal", _SETTLE_S)  # noqa: B023
            except TimeoutError:
                status = client.run("remote", "status").stdout
                raise AssertionError(
                    f"{client.dir.name} differs from the server in {differences(here, there)}:\n{status}"
                ) from None

    def _check_effects(self, found: Counter[tuple[str, str]]) -> None:
        lost = sorted(key for key in self.acknowledged if found[key] == 0)
        asked = self.acknowledged | self.unknown
        doubled = sorted(key for key in asked if found[key] > 1)
        # Several users may try to end one session: the effect is that of the accepted one.
        untrue = sorted(text for key, text in self.refused.items() if found[key] and key not in asked)
        assert not lost, f"acknowledged and lost: {lost}"
        assert not doubled, f"done twice: {doubled}"
        assert not untrue, f"an error was shown, and the command took effect: {untrue}"

    def _check_edits(self) -> None:
        on_server = words_in_texts(self._server.lattice_dir())
        aside = sum([*self._conflict_copies(), *self._kept], Counter[str]())
        lost = sorted(word for word in self.edits if not on_server[word] and not aside[word])
        doubled = sorted(word for word in self.edits | self.lost_edits if on_server[word] > 1)
        assert not lost, f"edits that are neither on the server nor in a conflict copy: {lost}"
        assert not doubled, f"edits that are in files twice: {self._where(doubled)}"

    def _check_conflicts(self) -> int:
        """Each of two edits of one line is somewhere, once, and never both in place; return how many there were (I4).

        Both are in conflict copies if a third edit, of the line beside theirs, came first. The one that is in place is
        also in the copy of a later conflict, made where it was in place already: with that edit's word, which is in
        place nowhere. So is a conflict copy, if an editor had read it before and saved after that.
        """
        on_server, copies = words_in_texts(self._server.lattice_dir()), self._conflict_copies()
        kept = {word for copy in self._kept for word in copy}
        pairs = [words for words in self.conflicts if not (self.lost_edits | kept) & set(words)]
        for words in pairs:
            later = {word for word in self.edits | self.lost_edits if not on_server[word]} - set(words)
            places = []
            for word in words:
                holding = [copy for copy in copies if word in copy]
                without_later = [copy for copy in holding if not later & copy.keys()]
                if on_server[word] or without_later:
                    holding = without_later
                places.append((on_server[word], sum(copy[word] for copy in holding)))
            assert sorted(places) in ([(0, 1), (1, 0)], [(0, 1), (0, 1)]), (
                f"two edits of one line, (on the server, in conflict copies): {dict(zip(words, places, strict=True))}"
            )
        return len(pairs)

    def _conflict_copies(self) -> list[Counter[str]]:
        return [copy for client in self._clients for copy in conflict_copies_in(client)]

    def _where(self, words: list[str]) -> list[str]:
        """Return the files that have these words, with their contents."""
        root = self._server.lattice_dir()
        texts = {path.relative_to(root): path.read_text() for path in root.rglob("*.md")}
        return [f"{path}: {text!r}" for path, text in texts.items() if any(word in text for word in words)]

    def _check_project(self) -> None:
        """Check that doctor finds nothing, and that a rebuild of every snapshot changes nothing."""
        client = self._clients[0]
        doctor = client.run("doctor", "--json")
        assert doctor.returncode == 0, doctor.stdout + doctor.stderr
        assert json.loads(doctor.stdout)["data"]["findings"] == [], doctor.stdout
        before = _without_order(tree_of(self._server.lattice_dir()))
        client.ok("rebuild", "--all")
        after = _without_order(tree_of(self._server.lattice_dir()))
        changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
        assert not changed, f"rebuild changed {sorted(changed)}"


def _without_order(tree: dict[str, bytes]) -> dict[str, bytes]:
    """Return a tree with sorted lines of all tasks' events: lattice makes an event before it has the lock."""
    name = "events/_lifecycle.jsonl"
    return {**tree, name: b"\n".join(sorted(tree[name].splitlines()))}


def check_numbers(server: Server, slug: str = "board") -> int:
    """Check that the journal's changes are numbered without a gap (I1); return their number."""
    numbers = [
        record.seq
        for record in JournalReader(server.data / "projects" / slug / "journal").records()
        if record.change is not None
    ]
    expected = list(range(numbers[0], numbers[0] + len(numbers))) if numbers else []
    assert numbers == expected, f"the journal's numbers have a gap: {numbers}"
    return len(numbers)


def oldest_change(server: Server, slug: str = "board") -> int:
    """Return the number of the first change in the journal; 0 if there is none."""
    records = JournalReader(server.data / "projects" / slug / "journal").records()
    return next((record.seq for record in records if record.change is not None), 0)


def effects_in(lattice_dir: Path) -> Counter[tuple[str, str]]:
    """Count the events by who caused them and their kind, and the sessions that were started and ended."""
    count: Counter[tuple[str, str]] = Counter()
    for event in events_in(lattice_dir):
        actor = event["actor"]
        if isinstance(actor, str):
            count[actor.partition(":")[2], event["type"]] += 1
    started: set[tuple[str, str]] = set()
    for file in [*lattice_dir.glob("sessions/*.json"), *lattice_dir.glob("sessions/archive/*.json")]:
        if file.name != "index.json":
            session = json.loads(file.read_text())
            started.add((session["base_name"], file.name))
            if file.parent.name == "archive":
                count[session["name"], "session_ended"] += 1
    count.update((name, "session_started") for name, _ in started)
    return count


def events_in(lattice_dir: Path) -> Iterator[dict]:
    """Yield the events of all tasks and resources, each log's in order."""
    for log in [*lattice_dir.glob("events/*.jsonl"), *lattice_dir.glob("archive/events/*.jsonl")]:
        if log.name != "_lifecycle.jsonl":
            for line in log.read_text().splitlines():
                yield json.loads(line)


def words_in(text: bytes) -> Counter[str]:
    """Count the words of a text, which a fault may have damaged."""
    return Counter(text.decode(errors="replace").split())


def _rescued_in(client: Client) -> Iterator[Counter[str]]:
    """Yield the words of each plan and notes that a client has rescued."""
    for path in (client.lattice_dir / ".remote" / "rescued").glob("*/files/**/*.md"):
        yield words_in(path.read_bytes())


def words_in_texts(lattice_dir: Path) -> Counter[str]:
    """Count the words in plans and notes."""
    count: Counter[str] = Counter()
    for folder in ("plans", "notes", "archive/plans", "archive/notes"):
        for text in (lattice_dir / folder).glob("*.md"):
            count.update(text.read_text().split())
    return count
