"""Routing of commands to the server, and the files sent with them."""

import base64
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from lattice.cli.main import cli

from lattice_remote.client import attachments, routing
from lattice_remote.client.attachments import INLINE_BYTES, CallersFiles, identity
from lattice_remote.client.config import UNPUSHED_FILE
from lattice_remote.errors import ConnectionFailed, Misuse

ROUTED = """create update status assign comment comment-edit comment-delete react unreact complete attach event link
unlink branch-link branch-unlink archive unarchive backfill-ids set-project-code set-subproject-code rebuild"""


def leaves(group: click.Group, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], click.Command]:
    found: dict[tuple[str, ...], click.Command] = {}
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found |= leaves(command, (*path, name))
        else:
            found[(*path, name)] = command
    return found


def test_every_command_that_writes_is_routed() -> None:
    here = routing._READS | routing._PROJECTLESS | {("remote",)}
    elsewhere = {("resource", name) for name in ("create", "acquire", "release", "heartbeat")}
    elsewhere |= {("session", name) for name in ("start", "end")} | {(name,) for name in ROUTED.split()}
    assert set(leaves(cli)) - here == elsewhere


def context(args: list[str]) -> tuple[click.Command, tuple[str, ...], click.Context]:
    """Parse a command line as Click does. Return the innermost command, its path and its context."""
    command: click.Command = cli
    path: tuple[str, ...] = ()
    while isinstance(command, click.Group):
        path, command = (*path, args[len(path)]), command.commands[args[len(path)]]
    return command, path, command.make_context(path[-1], args[len(path) :])


@pytest.mark.parametrize(
    ("args", "is_read"),
    [
        (["doctor"], True),
        (["doctor", "--fix"], False),
        (["next"], True),
        (["next", "--claim", "--actor", "human:a"], False),
        (["next", "--name", "Argus-1"], False),
        (["list"], True),
        (["session", "show", "x"], True),
        (["resource", "acquire", "x"], False),
    ],
)
def test_commands_that_only_read_run_locally(args: list[str], is_read: bool) -> None:
    _, path, ctx = context(args)
    assert routing._is_read(path, ctx) is is_read


@pytest.mark.parametrize(("flags", "waits"), [([], False), (["--wait"], True), (["--timeout", "3"], False)])
def test_commands_that_may_wait_are_known(flags: list[str], waits: bool) -> None:
    _, path, ctx = context(["resource", "acquire", "gpu", *flags])
    assert routing._waits(path, ctx) is waits


@pytest.mark.parametrize(("words", "has_page"), [(["dashboard"], True), (["list"], False)])
def test_the_page_of_a_cache_saves_on_the_server_or_is_refused(
    guarded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], has_page: bool
) -> None:
    served: list[str] = []
    monkeypatch.setattr(routing, "ensure_current", lambda *_, **__: None)
    monkeypatch.setattr(routing, "_serve_dashboard", lambda *_: served.append("our page"))
    monkeypatch.setattr(routing, "_run_here", lambda *_: served.append("lattice's own"))

    def run() -> int:
        served.clear()
        with pytest.raises(SystemExit) as ended:
            routing.hooked(cli, (), str(guarded), words).main(words)
        return int(ended.value.code or 0)

    assert run() == has_page and bool(served) != has_page
    assert ("lattice remote add" in capsys.readouterr().err) == has_page
    (guarded / "remote.json").write_text('{"url": "http://127.0.0.1:1", "project": "x"}')
    assert run() == 0 and served == ["our page" if has_page else "lattice's own"]


def attached(args: list[str]) -> tuple[list[str], list[dict[str, object]]]:
    command, path, ctx = context(args)
    with CallersFiles.of_command(command, path, ctx, args) as files:
        return files.argv, files.described


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b ü.txt").write_bytes(b"\xff\x00")
    (tmp_path / "x").write_bytes(b"file x")
    return tmp_path


@pytest.mark.parametrize(
    ("args", "index"),
    [
        (["attach", "LAT-1", "x"], 2),
        (["attach", "x", "x", "--title", "x"], 2),
        (["attach", "--title", "x", "LAT-1", "x"], 4),
        (["attach", "LAT-1", "--", "x"], 3),
        (["comment", "LAT-1", "--file", "x"], 3),
    ],
)
def test_the_right_argument_is_the_file(here: Path, args: list[str], index: int) -> None:
    argv, files = attached(args)
    assert argv == args
    assert files == [{"index": index, "name": "x", "data": "ZmlsZSB4"}]


def test_an_option_joined_with_its_value_is_split(here: Path) -> None:
    argv, files = attached(["comment", "LAT-1", "--file=x", "--role", "--file=x"])
    assert argv == ["comment", "LAT-1", "--file", "x", "--role", "--file=x"]
    assert files[0]["index"] == 3


@pytest.mark.parametrize("source", ["a b ü.txt", "./a b ü.txt"])
def test_names_may_be_anything(here: Path, source: str) -> None:
    _, files = attached(["attach", "LAT-1", source])
    assert files == [{"index": 2, "name": "a b ü.txt", "data": "/wA="}]


@pytest.mark.parametrize("source", ["missing", ".", "/", ""])
def test_a_missing_file_is_sent_as_none(here: Path, source: str) -> None:
    _, files = attached(["attach", "LAT-1", source])
    assert files[0]["data"] is None and files[0]["name"]


@pytest.mark.parametrize("args", [["attach", "LAT-1", "https://h/x"], ["attach", "LAT-1", "--inline", "x"], ["list"]])
def test_a_url_or_text_is_sent_without_a_file(args: list[str]) -> None:
    assert attached(args) == (args, [])


def test_a_pipe_is_read_locally(here: Path) -> None:
    read, write = os.pipe()
    os.write(write, b"piped")
    os.close(write)
    _, files = attached(["comment", "LAT-1", "--file", f"/dev/fd/{read}"])
    os.close(read)
    assert files[0]["data"] == "cGlwZWQ="


def test_a_large_file_is_referenced_and_not_read(here: Path) -> None:
    large = here / "large.bin"
    large.write_bytes(bytes(INLINE_BYTES + 1))
    (here / "link").symlink_to(large)
    for source in ("large.bin", str(large), "link"):
        _, files = attached(["attach", "LAT-1", source])
        name = os.path.basename(source)
        assert files == [{"index": 2, "name": name, "path": str(large), "identity": identity(large.stat())}]
    large.write_bytes(bytes(INLINE_BYTES))
    assert attached(["attach", "LAT-1", "large.bin"])[1][0]["data"]


def test_a_redirected_file_is_referenced_by_its_path(here: Path) -> None:
    large = here / "large.bin"
    large.write_bytes(bytes(INLINE_BYTES + 1))
    with large.open("rb") as file:
        _, files = attached(["attach", "LAT-1", f"/dev/fd/{file.fileno()}"])
    assert files[0]["path"] == str(large)


@pytest.mark.parametrize("is_removed", [False, True], ids=["a pipe", "a removed file"])
def test_a_file_that_cannot_be_reopened_is_copied_temporarily(here: Path, is_removed: bool) -> None:
    content = os.urandom(INLINE_BYTES * 3)
    if is_removed:
        (here / "gone").write_bytes(content)
        descriptor = os.open(here / "gone", os.O_RDONLY)
        os.unlink(here / "gone")
        writer = None
    else:
        descriptor, write = os.pipe()
        writer = threading.Thread(target=_write, args=(write, content))
        writer.start()
    command, path, ctx = context(["comment", "LAT-1", "--file", f"/dev/fd/{descriptor}"])
    with CallersFiles.of_command(command, path, ctx, ["comment", "LAT-1", "--file", f"/dev/fd/{descriptor}"]) as files:
        [file] = files.described
        kept = Path(file["path"])
        assert kept.read_bytes() == content and kept.stat().st_mode & 0o777 == 0o600
        assert file["identity"] == identity(kept.stat())
    assert not kept.exists()
    os.close(descriptor)
    if writer is not None:
        writer.join()


def _write(descriptor: int, content: bytes) -> None:
    with open(descriptor, "wb") as pipe:
        pipe.write(content)


def test_an_endless_pipe_is_refused_and_leaves_no_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachments, "MAX_SPOOLED_BYTES", 3 * INLINE_BYTES)
    monkeypatch.setenv("TMPDIR", str(here))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(Misuse) as error:
        attached(["comment", "LAT-1", "--file", "/dev/zero"])
    assert error.value.code == "REMOTE_TOO_LARGE"
    assert not list(here.glob("lattice-*"))


# --- commands in a cache, with an agent that records requests ---


class Cache:
    """A cache whose agent records the requests and replies with ``answer``."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.directory = directory
        self.requests: list[dict[str, Any]] = []
        self.answer: dict[str, Any] = {"stdout": "", "stderr": "", "notices": [], "exit_code": 0}
        self.error: Exception | None = None
        self.is_required: list[bool] = []
        """Of each request to bring the cache up to date."""
        self._capsys = capsys

    def run(self, *words: str, group: click.Group | None = None) -> tuple[int, str, str]:
        """Run lattice or another group in the cache's directory. Return exit code, stdout and stderr."""
        program = cli if group is None else routing.hooked(group, (), str(self.directory), list(words))
        with pytest.raises(SystemExit) as ended:
            program.main(list(words))
        out, err = self._capsys.readouterr()
        return int(ended.value.code or 0), out, err

    def send(self, request: dict[str, Any], _progress: object) -> dict[str, Any]:
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        return self.answer

    def ensure_current(
        self, _directory: str, say: Callable[[str], object], *_: object, is_required: bool = False
    ) -> None:
        self.is_required.append(is_required)
        if self.error is not None:
            raise self.error
        say("as of now")


REMOTE = {"url": "http://127.0.0.1:1", "project": "web"}


@pytest.fixture
def cache(guarded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cache:
    (guarded / "remote.json").write_text(json.dumps(REMOTE))
    (guarded / "tasks").mkdir()
    (guarded / "config.json").write_text('{"schema_version": 1}')
    (guarded.parent / "x").write_text("content")
    monkeypatch.chdir(guarded.parent)
    made = Cache(guarded, capsys)
    monkeypatch.setattr(routing, "send_request", made.send)
    monkeypatch.setattr(routing, "ensure_current", made.ensure_current)
    return made


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def test_a_write_runs_on_the_server_and_returns_its_result(cache: Cache) -> None:
    cache.answer = {"stdout": encoded("x\n"), "stderr": encoded("y"), "notices": ["a\nb"], "exit_code": 3}
    assert cache.run("create", "One", "--actor", "human:ana") == (3, "x\n", "ylattice-remote: a b\n")
    [request] = cache.requests
    assert request["do"] == "run" and request["argv"] == ["create", "One", "--actor", "human:ana"]
    assert len(request["id"]) == 32 and not request["own_connection"] and request["files"] == []
    assert not cache.is_required


def test_a_command_that_may_wait_long_has_its_own_connection(cache: Cache) -> None:
    cache.run("resource", "acquire", "gpu", "--wait", "--actor", "human:ana")
    assert cache.requests[0]["own_connection"]


@pytest.mark.parametrize("is_json", [False, True])
def test_an_error_of_the_remote_is_formatted_like_lattices_own(cache: Cache, is_json: bool) -> None:
    cache.error = ConnectionFailed("no way")
    code, out, err = cache.run("comment", "LAT-1", "x", "--actor", "human:ana", *(["--json"] if is_json else []))
    if is_json:
        assert code == 1 and json.loads(out)["error"] == {"code": "REMOTE_UNREACHABLE", "message": "no way"}
    else:
        assert (code, out, err) == (1, "", "Error: no way\n")


def test_a_read_runs_locally_once_the_cache_is_current_or_reports_that_it_is_not(cache: Cache) -> None:
    assert cache.run("list") == (0, "", "as of now\n")
    assert cache.run("list", "--require-current")[0] == 0
    assert cache.is_required == [False, True] and not cache.requests


def test_only_reads_can_require_a_current_cache(cache: Cache) -> None:
    assert cache.run("create", "One", "--require-current")[0] == 2
    assert cache.run("resource", "list", "--require-current")[0] == 0


def test_a_read_that_suppresses_the_refusal_of_its_write_still_fails(cache: Cache) -> None:
    @click.command("list")
    def writes() -> None:
        try:
            (cache.directory / "tasks" / "x.json").write_text("{}")
        except PermissionError:
            click.echo("fine")

    writes.callback.__module__ = "lattice.cli"
    code, out, err = cache.run("list", group=click.Group(commands=[writes]))
    assert code == 1 and out == "fine\n" and "the project's files belong to its remote" in err
    assert not (cache.directory / "tasks" / "x.json").exists()


# --- plugin commands ---


def plugin(cache: Cache, *, writes: bool) -> click.Group:
    """Return a group with the command ``deploy note``, which reads or writes the cache."""

    @click.command("note")
    def note() -> None:
        if writes:
            (cache.directory / "tasks" / "x.json").write_text("{}")
        click.echo("noted here")

    return click.Group(commands=[click.Group("deploy", commands=[note])])


def test_a_plugin_reads_locally_even_if_the_server_is_unreachable(cache: Cache) -> None:
    assert cache.run("deploy", "note", group=plugin(cache, writes=False)) == (0, "noted here\n", "as of now\n")
    cache.error = ConnectionFailed("no way")
    code, out, err = cache.run("deploy", "note", group=plugin(cache, writes=False))
    assert (code, out, err) == (0, "noted here\n", "lattice-remote: no way\n")
    assert not cache.requests


def test_a_plugin_that_writes_is_refused_and_reported(cache: Cache) -> None:
    code, out, err = cache.run("deploy", "note", group=plugin(cache, writes=True))
    assert code == 1 and out == "" and "lattice remote route deploy note" in err
    assert not (cache.directory / "tasks" / "x.json").exists()


def test_a_plugin_routed_by_the_user_runs_on_the_server(cache: Cache) -> None:
    (cache.directory / "remote.json").write_text(json.dumps({**REMOTE, "commands": ["deploy note"]}))
    assert cache.run("deploy", "note", group=plugin(cache, writes=True)) == (0, "", "")
    assert [request["argv"] for request in cache.requests] == [["deploy", "note"]]


# --- projects that wait to be pushed ---


def unpushed(cache: Cache) -> None:
    """Make the cache a local project that waits to be pushed."""
    (cache.directory / "remote.json").unlink()
    (cache.directory / UNPUSHED_FILE).parent.mkdir()
    (cache.directory / UNPUSHED_FILE).write_text(json.dumps(REMOTE))


def test_a_project_that_waits_to_be_pushed_can_be_read_and_not_written(cache: Cache) -> None:
    unpushed(cache)
    code, _, err = cache.run("list")
    assert code == 0 and err == "lattice-remote: not pushed to http://127.0.0.1:1/web yet; next: lattice remote push\n"
    code, _, err = cache.run("create", "One", "--actor", "human:ana")
    assert code == 1 and "lattice remote remove origin" in err and not (cache.directory / "ids.json").exists()
    assert not cache.requests and not cache.is_required


# --- the warm process's child ---


@pytest.mark.parametrize(
    ("words", "may"),
    [
        (["list"], True),
        (["show", "LAT-1"], True),
        (["create", "One", "--actor", "human:ana"], True),
        (["comment", "LAT-1", "x", "--actor", "human:ana"], True),
        (["comment", "LAT-1", "--file", "x", "--actor", "human:ana"], False),
        (["attach", "LAT-1", "x", "--actor", "human:ana"], False),
        (["dashboard"], False),
        (["plugins"], False),
        (["deploy", "note"], False),
    ],
)
def test_a_command_that_needs_its_callers_process_has_no_effect_in_the_warm_one(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, words: list[str], may: bool
) -> None:
    monkeypatch.setattr(routing, "in_warm_process", True)
    group = plugin(cache, writes=False) if words[0] == "deploy" else None
    if may:
        cache.run(*words, group=group)
    else:
        with pytest.raises(routing.NeedsOwnProcess):
            cache.run(*words, group=group)
    assert bool(cache.requests or cache.is_required) == may


def test_a_project_that_waits_to_be_pushed_is_not_read_in_the_warm_process(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "in_warm_process", True)
    unpushed(cache)
    with pytest.raises(routing.NeedsOwnProcess):
        cache.run("list")


# --- progress ---


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_shown_on_a_terminal_and_cleared_at_the_end(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    shown = io.StringIO()
    shown.isatty = lambda: is_terminal  # type: ignore[method-assign]
    seen = ""

    def send(_request: dict[str, Any], on_progress: Callable[[dict[str, Any]], None] | None) -> dict[str, Any]:
        nonlocal seen
        if on_progress is not None:
            on_progress({"what": "fetching", "done": 1, "total": 2})
            seen = shown.getvalue()
            on_progress({"what": "fetching", "done": 2, "total": 2})
        return cache.answer

    monkeypatch.setattr(routing, "send_request", send)
    monkeypatch.setattr(sys, "stderr", shown)
    cache.run("comment", "LAT-1", "x", "--actor", "human:ana")
    assert seen.endswith("lattice-remote: fetching 1/2") == is_terminal
    assert shown.getvalue().endswith("\r\x1b[K") == is_terminal and bool(shown.getvalue()) == is_terminal


# --- lattice init beside a cache ---


INIT = [
    *("--project-code", "ABC", "--subproject-code", "F", "--project-name", "X", "--instance-name", "I"),
    *("--actor", "human:ana", "--model", "m", "--workflow", "classic", "--description", "D"),
    *("--no-heartbeat", "--no-setup-claude", "--no-setup-agents"),
]


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (".", "there is nothing to initialise"),
        ("sub", "this creates a separate project, which is not shared"),
        ("sub/own", "this creates a separate project"),
        ("other", ""),
    ],
)
def test_init_in_a_cache_warns_and_is_lattices_own(cache: Cache, place: str, says: str) -> None:
    root = cache.directory.parent / "repository"
    root.mkdir()
    cache.directory = cache.directory.rename(root / ".lattice")
    target = root.parent / place if place == "other" else root / place
    target.mkdir(parents=True, exist_ok=True)
    _, _, err = cache.run("init", "--path", str(target), *INIT, group=cli)
    warned = [line for line in err.splitlines() if line.startswith("lattice-remote: ")]
    assert [says in line and "a cache of project web" in line for line in warned] == ([True] if says else [])
    assert not cache.requests


# --- import cost ---


def loaded_by(code: str, cwd: Path, **environment: str) -> set[str]:
    """Return our modules and the heavy modules that a lattice command imports."""
    script = f"""
import sys
from lattice.cli.main import cli
try:
    {code}
except SystemExit:
    pass
heavy = {{"asyncio", "websockets", "msgspec", "typer", "rich", "ssl"}}
print("LOADED", *[n for n in sys.modules if n.startswith("lattice_remote.") or n in heavy])
"""
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", script], cwd=cwd, env=env, capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("LOADED")[2].split())


def test_a_project_without_a_remote_imports_only_the_plugin(guarded: Path) -> None:
    assert loaded_by("cli(['list'])", guarded.parent) == {"lattice_remote.client", "lattice_remote.client.plugin"}


def test_inside_the_server_only_the_plugin_is_imported(guarded: Path) -> None:
    (guarded / "remote.json").write_text("{}")
    loaded = loaded_by("cli(['list'])", guarded.parent, LATTICE_REMOTE_SERVER="1")
    assert loaded == {"lattice_remote.client", "lattice_remote.client.plugin"}


def test_a_usage_error_needs_no_server(guarded: Path) -> None:
    (guarded / "remote.json").write_text("{}")
    assert not loaded_by("cli(['comment', '--nope'])", guarded.parent) & {"asyncio", "websockets", "msgspec", "typer"}


def test_next_with_a_session_given_to_the_group_is_a_write() -> None:
    _, path, ctx = context(["next"])
    assert routing._is_read(path, ctx)
    ctx.obj = {"_session_name": "Argus-1"}
    assert not routing._is_read(path, ctx)
    ctx.obj = None
    ctx.params["session_name"] = "Argus-1"
    assert not routing._is_read(path, ctx)
