"""Every command of lattice-tracker, remote against local: the same output, exit code and files for the same lines.

The lines of ``command_table.py`` run in a plain local project and in a cache of a server's project. Ids, times and the
names of private directories are normalised. Everything else must be equal, and the cache must equal the server's
directory byte for byte. The commands come from lattice-tracker itself, so an untested new command or option fails.
"""

import copy
import json
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import click
import pytest
from command_coverage import Ran, commands_of, gaps, ran
from command_table import EXCEPTIONS, LOCAL, ROWS, SAID_BESIDES, UNORDERED, Line
from lattice.cli.main import cli  # type: ignore[import-untyped]
from normaliser import Normaliser

import launcher_programs
from lattice_remote.server.worker.policy import ROUTED
from preloaded_programs import warm
from sandbox import Client, Server, board, differences, tree_of

pytestmark = pytest.mark.e2e


class Result(NamedTuple):
    """The normalised result of one line."""

    exit_code: int
    stdout: str
    stderr: str


@dataclass
class Recording:
    """One side of the comparison: runs command lines and keeps the results."""

    client: Client
    busy_port: int
    normalise: Normaliser = field(init=False)

    def __post_init__(self) -> None:
        self.normalise = Normaliser({str(self.client.dir): "DIR", self.client.env["HOME"]: "HOME"})

    def run_all(self) -> list[Result]:
        return [self.run(line) for lines in ROWS.values() for line in lines]

    def run(self, line: Line) -> Result:
        done = self.client.run(*map(self._fill, line))
        stdout = self.normalise(done.stdout)
        if line[0] in UNORDERED:
            stdout = "\n".join(sorted(part.strip(" ,") for part in stdout.splitlines()))
        return Result(done.returncode, stdout, self.normalise(done.stderr))

    def _fill(self, argument: str) -> str:
        """Replace ``{...}`` by values of this side."""
        match argument.strip("{}").split() if argument.startswith("{") and argument.endswith("}") else []:
            case ["busy"]:
                return str(self.busy_port)
            case ["comment", number]:
                return self._comments()[int(number) - 1]
            case [short_id] if short_id.startswith("LAT-"):
                return self._task(short_id)
        return argument

    def _task(self, short_id: str) -> str:
        return str(json.loads((self.client.lattice_dir / "ids.json").read_text())["map"][short_id])

    def _comments(self) -> list[str]:
        log = self.client.lattice_dir / "events" / f"{self._task('LAT-1')}.jsonl"
        events = map(json.loads, log.read_text().splitlines())
        return [event["id"] for event in events if event["type"] == "comment_added"]

    def board(self) -> dict[str, str]:
        """The project's files with normalised names and contents, for comparison."""
        return self.normalise.files(tree_of(self.client.lattice_dir))

    def surroundings(self) -> dict[str, str]:
        """Files that commands left beside the project and in the user's home, including its own projects."""
        found: dict[str, bytes] = {}
        for top, below in ((self.client.dir, ""), (Path(self.client.env["HOME"]), "HOME/")):
            for path in sorted(top.rglob("*")):
                relative = path.relative_to(top).as_posix()
                if path.is_file() and not relative.startswith((".lattice/", ".config/")) and "/locks/" not in relative:
                    found[below + relative] = path.read_bytes()
        return self.normalise.files(found)


class BothSides(NamedTuple):
    """The whole table, run on both sides."""

    server: Server
    here: Recording
    there: Recording
    ben: Client
    results: list[tuple[Line, Result, Result]]

    def ran(self) -> list[Ran]:
        """The lines with their results in the remote project."""
        found = (ran(cli, line, there.exit_code) for line, _, there in self.results)
        return [one for one in found if one is not None]


def prepare_inputs(directory: Path) -> None:
    (directory / "notes.txt").write_text("From a file.\nSecond line, naïve.\n")
    (directory / "deep" / "er").mkdir(parents=True)
    (directory / "deep" / "er" / "data.bin").write_bytes(bytes(range(256)) * 40)


@pytest.fixture(scope="module", params=["lattice", "launcher"])
def command_board(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Client, Client]]:
    """A board whose first client runs commands by ``lattice`` itself, or by the launcher."""
    with board("ana", "ben", programs=warm()) as (server, (ana, ben)):
        if request.param == "launcher":
            programs = launcher_programs.install(tmp_path_factory.mktemp("launcher"))
            launcher_programs.wait_until_warm(ana, programs)
            ana.programs = programs
        yield server, ana, ben


@pytest.fixture(scope="module")
def both_sides(
    command_board: tuple[Server, Client, Client], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BothSides]:
    """Run the whole table once on both sides concurrently."""
    server, ana, ben = command_board
    local = ben.elsewhere(tmp_path_factory.mktemp("local") / ana.dir.name)
    # Both sides start from the server's initial project.
    shutil.copytree(server.lattice_dir(), local.lattice_dir)
    for directory in (local.dir, ana.dir):
        prepare_inputs(directory)
    with socket.create_server(("127.0.0.1", 0)) as busy:
        here, there = (Recording(client, busy.getsockname()[1]) for client in (local, ana))
        with ThreadPoolExecutor(2) as both:
            locally, remotely = both.map(Recording.run_all, (here, there))
    lines = [line for lines in ROWS.values() for line in lines]
    yield BothSides(server, here, there, ben, list(zip(lines, locally, remotely, strict=True)))


def test_every_command_option_and_format_is_tried(both_sides: BothSides) -> None:
    """The expected commands come from the groups of the installed lattice-tracker."""
    assert gaps(cli, both_sides.ran(), EXCEPTIONS) == []


def test_every_command_prints_and_exits_the_same(both_sides: BothSides) -> None:
    results = [(line, here, without_notice(line, there)) for line, here, there in both_sides.results]
    different = [(line, here, there) for line, here, there in results if here != there]
    assert not different, "\n\n".join(
        f"lattice {' '.join(line)}\n local: {here}\nremote: {there}" for line, here, there in different
    )


def without_notice(line: Line, result: Result) -> Result:
    """Remove the line that a remote project adds; it must be present exactly where it is documented."""
    if line[0] not in SAID_BESIDES:
        return result
    notice, _, rest = result.stderr.partition("\n")
    assert notice.startswith("lattice-remote: ") and SAID_BESIDES[line[0]] in notice, (line, result)
    return result._replace(stderr=rest)


def test_every_command_leaves_the_same_files(both_sides: BothSides) -> None:
    local, remote = both_sides.here.board(), both_sides.there.board()
    assert sorted(local) == sorted(remote)
    assert {path for path in local if local[path] != remote[path]} == set()


def test_local_commands_leave_the_same_files_beside_the_project(both_sides: BothSides) -> None:
    local, remote = both_sides.here.surroundings(), both_sides.there.surroundings()
    assert sorted(local) == sorted(remote)
    assert {path for path in local if local[path] != remote[path]} == set()
    assert {"CLAUDE.md", "deep/.lattice/config.json", "HOME/.claude/skills/lattice/SKILL.md"} <= set(remote)


def test_both_caches_equal_the_server_byte_for_byte(both_sides: BothSides) -> None:
    """I3."""
    server, there, ben = both_sides.server, both_sides.there.client, both_sides.ben
    assert differences(there.lattice_dir, server.lattice_dir()) == []
    ben.ok("remote", "pull")
    assert differences(ben.lattice_dir, server.lattice_dir()) == []
    for client in (there, ben):
        assert client.run("remote", "verify").returncode == 0


def test_every_command_is_either_known_to_the_server_or_local_by_nature_or_a_plain_read() -> None:
    """Each command's place of execution is declared explicitly."""
    from lattice_remote.client.routing import _PROJECTLESS, _READS

    reads = {" ".join(words) for words in _READS}
    assert {path for path, _ in commands_of(cli)} == set(ROUTED) | reads | set(LOCAL)
    assert {" ".join(words) for words in _PROJECTLESS} | {"dashboard", "remote"} == set(LOCAL)
    assert not set(ROUTED) & set(LOCAL)


def test_a_new_command_or_option_is_a_gap(both_sides: BothSides) -> None:
    """The next lattice-tracker may add a command, a subcommand, an option or a format."""

    @click.command()
    @click.option("--json", "output_json", is_flag=True)
    def brand_new(output_json: bool) -> None: ...

    newer = copy.copy(cli)
    newer.commands = {**cli.commands, "brand-new": brand_new}
    session = copy.copy(cli.commands["session"])
    assert isinstance(session, click.Group)
    session.commands = {**session.commands, "pause": brand_new}
    newer.commands["session"] = session
    shown = copy.copy(cli.commands["show"])
    shown.params = [*shown.params, click.Option(["--quiet"], is_flag=True), click.Option(["--tree"])]
    newer.commands["show"] = shown
    assert gaps(newer, both_sides.ran(), EXCEPTIONS) == [
        *(f"brand-new: {what}" for what in ("fails", "fails with --json", "option output_json")),
        *(f"brand-new: {what}" for what in ("succeeds", "succeeds with --json")),
        *(f"session pause: {what}" for what in ("fails", "fails with --json", "option output_json")),
        *(f"session pause: {what}" for what in ("succeeds", "succeeds with --json")),
        *(f"show: {what}" for what in ("option quiet", "option tree", "succeeds with --quiet")),
    ]


def test_an_omitted_line_is_a_gap(both_sides: BothSides) -> None:
    without = [one for one in both_sides.ran() if one.path != "assign"]
    assert {gap.partition(":")[0] for gap in gaps(cli, without, EXCEPTIONS)} == {"assign"}
    assert gaps(cli, both_sides.ran(), {**EXCEPTIONS, "show: fails": "why"}) == [
        "the exception 'show: fails' is of no use"
    ]
