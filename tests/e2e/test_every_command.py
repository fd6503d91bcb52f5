"""Every routed command, remote against local: the same output, exit code and files for the same command lines.

The same script of command lines runs in a plain local project and in a cache of a server's project. Ids, times
and the names of private files are normalised; everything else must be equal, and the cache must equal the
server's directory byte for byte.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click
import pytest

from sandbox import Client, Server, differences, tree_of

pytestmark = pytest.mark.e2e

ANA = ("--actor", "human:ana")
_ULID = re.compile(r"(?<![A-Za-z0-9])(task|ev|art|res|sess|inst)_[0-9A-HJKMNP-TV-Z]{26}(?![A-Za-z0-9])")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)")
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_AGO = re.compile(r"\b\d+[sm] ago|in \d+m ?\d*s?|\d+m \d+s")


@dataclass
class Normaliser:
    """Replaces ids by their order of appearance, and times by a word."""

    seen: dict[str, str] = field(default_factory=dict)

    def __call__(self, text: str) -> str:
        text = _ULID.sub(self._name, text)
        return _AGO.sub("AGO", _DATE.sub("DATE", _TIME.sub("TIME", text)))

    def _name(self, match: re.Match[str]) -> str:
        return self.seen.setdefault(match[0], f"{match[1]}#{len(self.seen)}")


@dataclass
class Recording:
    """One side of the comparison: runs command lines and keeps what came of them."""

    client: Client
    normalise: Normaliser = field(default_factory=Normaliser)

    def run(self, *argv: str) -> tuple[int, str, str]:
        done = self.client.run(*(self._fill(argument) for argument in argv))
        return done.returncode, self.normalise(done.stdout), self.normalise(done.stderr)

    def _fill(self, argument: str) -> str:
        """Replace ``{...}`` by an id that only this side knows."""
        lookups: dict[str, Callable[[], str]] = {
            "{task}": self._first_task,
            "{comment}": lambda: self._comments()[0],
            "{second comment}": lambda: self._comments()[1],
        }
        return lookups[argument]() if argument in lookups else argument

    def _first_task(self) -> str:
        return str(json.loads((self.client.lattice_dir / "ids.json").read_text())["map"]["LAT-1"])

    def _comments(self) -> list[str]:
        log = self.client.lattice_dir / "events" / f"{self._first_task()}.jsonl"
        events = map(json.loads, log.read_text().splitlines())
        return [event["id"] for event in events if event["type"] == "comment_added"]

    def tree(self) -> dict[str, str]:
        """The files, named and filled with normalised ids, so that two projects can be compared."""
        tree = tree_of(self.client.lattice_dir)
        order = sorted(tree, key=lambda path: (path.startswith(("artifacts", "resources", "sessions")), path))
        return {self.normalise(path): self.normalise(tree[path].decode(errors="surrogateescape")) for path in order}


SCRIPT: list[tuple[str, ...]] = [
    ("create", "First", *ANA),
    ("create", "Second", "--description", "Two\nlines", "--tags", "a,b", "--priority", "high", *ANA, "--json"),
    ("create", "Third: naïve ☃", "--type", "bug", *ANA, "--quiet"),
    ("create", "Given id", "--id", "task_01HZXW5R3N8QJ6T2V9B4C7D1EF", *ANA),
    ("create", "Given id", "--id", "task_01HZXW5R3N8QJ6T2V9B4C7D1EF", *ANA),
    ("create", "Other text", "--id", "task_01HZXW5R3N8QJ6T2V9B4C7D1EF", *ANA),
    ("create", "Other text", "--id", "task_01HZXW5R3N8QJ6T2V9B4C7D1EF", *ANA, "--json"),
    ("create", "No actor"),
    ("create", "No actor", "--json"),
    ("create", "Bad status", "--status", "nowhere", *ANA),
    ("create",),
    ("create", "--no-such-option"),
    ("create", "--help"),
    ("update", "LAT-1", "title=First, renamed", "priority=low", *ANA),
    ("update", "LAT-1", "title=First, renamed", *ANA, "--json"),
    ("update", "LAT-1", "nonsense", *ANA),
    ("status", "LAT-1", "in_planning", *ANA),
    ("status", "LAT-1", "in_progress", *ANA),
    ("status", "LAT-1", "planned", *ANA, "--json"),
    ("status", "LAT-1", "in_progress", *ANA),
    ("status", "LAT-1", "done", *ANA),
    ("status", "LAT-404", "done", *ANA),
    ("status", "what is this", "done", *ANA, "--json"),
    ("assign", "LAT-1", "agent:claude", *ANA),
    ("assign", "LAT-1", "nobody", *ANA),
    ("comment", "LAT-1", "A comment with ünïcode and 'quotes' \"double\"", *ANA),
    ("comment", "LAT-1", "-- dashes", *ANA, "--quiet"),
    ("comment", "LAT-1", "", *ANA),
    ("comment", "LAT-1", "--file", "notes.txt", *ANA),
    ("comment", "LAT-1", "--file", "missing.txt", *ANA),
    ("comment", "LAT-1", *ANA),
    ("comment", "LAT-1", "a reply", "--reply-to", "{comment}", *ANA),
    ("comment-edit", "LAT-1", "{comment}", "edited", *ANA),
    ("react", "LAT-1", "{comment}", "thumbsup", *ANA, "--json"),
    ("unreact", "LAT-1", "{comment}", "thumbsup", *ANA),
    ("unreact", "LAT-1", "{comment}", "thumbsup", *ANA),
    ("comment-delete", "LAT-1", "{second comment}", *ANA),
    ("attach", "LAT-1", "notes.txt", "--title", "The notes", *ANA),
    ("attach", "LAT-1", "deep/er/data.bin", *ANA, "--json"),
    ("attach", "LAT-1", "https://example.org/x?a=b", *ANA),
    ("attach", "LAT-1", "--inline", "some text", "--role", "review", *ANA),
    ("attach", "LAT-1", "no/such/file.txt", *ANA),
    ("attach", "LAT-1", 'no/such/"file".txt', *ANA, "--json"),
    ("attach", "LAT-1", "/no/such/file.txt", *ANA),
    ("attach", "LAT-1", *ANA),
    ("event", "LAT-1", "x_custom", "--data", '{"a": [1, 2]}', *ANA),
    ("event", "LAT-1", "task_created", *ANA),
    ("link", "LAT-1", "blocks", "LAT-2", "--note", "why", *ANA),
    ("link", "LAT-1", "blocks", "LAT-1", *ANA),
    ("unlink", "LAT-1", "blocks", "LAT-2", *ANA),
    ("branch-link", "LAT-1", "feat/LAT-1-x", *ANA),
    ("branch-unlink", "LAT-1", "feat/LAT-1-x", *ANA, "--json"),
    ("next",),
    ("next", "--json"),
    ("next", "--claim"),
    ("next", "--claim", "--actor", "agent:racer", "--status", "planned,backlog"),
    ("session", "start", "--name", "Argus", "--model", "claude-opus-4", "--framework", "claude-code"),
    ("session", "start", "--model", "claude-opus-4"),
    ("session", "start", "--name", "Argus", "--model", "m", "--framework", "f", "--json"),
    ("comment", "LAT-2", "from a session", "--name", "Argus-1"),
    ("comment", "LAT-2", "from nobody", "--name", "Nobody-9"),
    ("next", "--name", "Argus-1"),
    ("session", "list"),
    ("session", "end", "Argus-1", "--reason", "done"),
    ("session", "end", "Argus-1"),
    ("resource", "create", "browser", "--description", "one at a time", "--ttl", "100", *ANA),
    ("resource", "create", "browser", *ANA),
    ("resource", "acquire", "browser", *ANA, "--task", "LAT-1"),
    ("resource", "acquire", "browser", "--actor", "agent:x"),
    ("resource", "acquire", "browser", "--actor", "agent:x", "--wait", "--timeout", "1"),
    ("resource", "heartbeat", "browser", *ANA),
    ("resource", "release", "browser", "--actor", "agent:x", "--json"),
    ("resource", "release", "browser", *ANA),
    ("resource", "acquire", "nothing", *ANA),
    ("resource", "status", "browser"),
    ("resource", "list", "--json"),
    ("complete", "LAT-1", "--review", "Looks good", *ANA),
    ("complete", "LAT-2", "--review", "Too early", *ANA),
    ("status", "LAT-2", "cancelled", *ANA),
    ("archive", "LAT-2", *ANA),
    ("archive", "LAT-2", *ANA, "--json"),
    ("archive", "LAT-1", "LAT-404", "LAT-3", *ANA),
    ("unarchive", "LAT-2,LAT-3", *ANA),
    ("archive", "--stale", *ANA, "--json"),
    ("archive", *ANA),
    ("backfill-ids",),
    ("backfill-ids", "--json", *ANA),
    ("set-subproject-code", "F"),
    ("create", "With a subproject", *ANA),
    ("set-project-code", "NEW"),
    ("set-project-code", "NEW", "--force"),
    ("set-project-code", "TOO-LONG-123"),
    ("doctor",),
    ("doctor", "--fix"),
    ("doctor", "--fix", "--json"),
    ("rebuild", "{task}"),
    ("rebuild", "--all"),
    ("rebuild", "--all", "--json"),
    ("rebuild",),
    ("list",),
    ("list", "--include-archived", "--json"),
    ("show", "LAT-2"),
    ("no-such-command",),
]


def prepare_inputs(directory: Path) -> None:
    (directory / "notes.txt").write_text("From a file.\nSecond line, naïve.\n")
    (directory / "deep" / "er").mkdir(parents=True)
    (directory / "deep" / "er" / "data.bin").write_bytes(bytes(range(256)) * 40)


@pytest.fixture(scope="module")
def both_sides(shared_board: tuple[Server, Client, Client], tmp_path_factory: pytest.TempPathFactory) -> object:
    """Run the whole script on both sides once."""
    server, ana, ben = shared_board
    local = ana.elsewhere(tmp_path_factory.mktemp("local"))
    # The same project to begin with: the server's, before anything was done in it.
    shutil.copytree(server.lattice_dir(), local.lattice_dir)
    for directory in (local.dir, ana.dir):
        prepare_inputs(directory)
    here, there = Recording(local), Recording(ana)
    results = [(argv, here.run(*argv), there.run(*argv)) for argv in SCRIPT]
    return server, here, there, ben, results


def test_the_script_names_every_command_that_writes() -> None:
    from lattice.cli.main import cli  # type: ignore[import-untyped]

    reads = {"list", "show", "plan", "comments", "stats", "weather", "plugins", "dashboard", "restart", "remote"}
    elsewhere = {"init", "demo", "setup-claude", "setup-claude-skill", "setup-codex", "setup-openclaw", "setup-prompt"}
    tried = {argv[0] for argv in SCRIPT}
    assert {name for name, _ in cli.commands.items()} - reads - elsewhere <= tried
    for group in ("resource", "session"):
        assert isinstance(cli.commands[group], click.Group)
        assert {f"{group} {name}" for name in cli.commands[group].commands} - {"session show"} <= {
            " ".join(argv[:2]) for argv in SCRIPT
        }


def test_every_command_says_and_exits_the_same(both_sides: tuple) -> None:  # type: ignore[type-arg]
    different = [(argv, here, there) for argv, here, there in both_sides[4] if here != there]
    assert not different, "\n\n".join(
        f"lattice {' '.join(argv)}\n local: {here}\nremote: {there}" for argv, here, there in different
    )


def test_every_command_leaves_the_same_files(both_sides: tuple) -> None:  # type: ignore[type-arg]
    _server, here, there, _ben, _results = both_sides
    local, remote = here.tree(), there.tree()
    assert sorted(local) == sorted(remote)
    assert {path for path in local if local[path] != remote[path]} == set()


def test_both_caches_equal_the_server_byte_for_byte(both_sides: tuple) -> None:  # type: ignore[type-arg]
    """I3."""
    server, _here, there, ben, _results = both_sides
    assert differences(there.client.lattice_dir, server.lattice_dir()) == []
    ben.ok("remote", "pull")
    assert differences(ben.lattice_dir, server.lattice_dir()) == []
    for client in (there.client, ben):
        assert client.run("remote", "verify").returncode == 0
