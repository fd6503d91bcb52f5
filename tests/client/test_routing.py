"""Where a command runs, and what travels with it."""

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import click
import pytest
from lattice.cli.main import cli

from lattice_remote.client import attachments, routing
from lattice_remote.client.attachments import INLINE_BYTES, CallersFiles, identity
from lattice_remote.errors import Misuse

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
    here = routing._READS | routing._ELSEWHERE | {("remote",)}
    elsewhere = {("resource", name) for name in ("create", "acquire", "release", "heartbeat")}
    elsewhere |= {("session", name) for name in ("start", "end")} | {(name,) for name in ROUTED.split()}
    assert set(leaves(cli)) - here == elsewhere


def context(args: list[str]) -> tuple[click.Command, tuple[str, ...], click.Context]:
    """Parse a command line as Click does; return the innermost command, its path and its context."""
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
def test_what_only_reads_stays_here(args: list[str], is_read: bool) -> None:
    _, path, ctx = context(args)
    assert routing._is_read(path, ctx) is is_read


@pytest.mark.parametrize(("flags", "waits"), [([], False), (["--wait"], True), (["--timeout", "3"], False)])
def test_a_command_that_waits_is_known(flags: list[str], waits: bool) -> None:
    _, path, ctx = context(["resource", "acquire", "gpu", *flags])
    assert routing._waits(path, ctx) is waits


@pytest.mark.parametrize(("words", "has_page"), [(["dashboard"], True), (["list"], False)])
def test_the_page_of_a_cache_saves_on_the_server_and_is_refused_where_it_could_not(
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


def test_an_option_with_its_value_is_taken_apart(here: Path) -> None:
    argv, files = attached(["comment", "LAT-1", "--file=x", "--role", "--file=x"])
    assert argv == ["comment", "LAT-1", "--file", "x", "--role", "--file=x"]
    assert files[0]["index"] == 3


@pytest.mark.parametrize("source", ["a b ü.txt", "./a b ü.txt"])
def test_names_may_be_anything(here: Path, source: str) -> None:
    _, files = attached(["attach", "LAT-1", source])
    assert files == [{"index": 2, "name": "a b ü.txt", "data": "/wA="}]


@pytest.mark.parametrize("source", ["missing", ".", "/", ""])
def test_what_is_no_file_travels_as_none(here: Path, source: str) -> None:
    _, files = attached(["attach", "LAT-1", source])
    assert files[0]["data"] is None and files[0]["name"]


@pytest.mark.parametrize("args", [["attach", "LAT-1", "https://h/x"], ["attach", "LAT-1", "--inline", "x"], ["list"]])
def test_a_url_or_text_brings_no_file(args: list[str]) -> None:
    assert attached(args) == (args, [])


def test_a_pipe_is_read_here(here: Path) -> None:
    read, write = os.pipe()
    os.write(write, b"piped")
    os.close(write)
    _, files = attached(["comment", "LAT-1", "--file", f"/dev/fd/{read}"])
    os.close(read)
    assert files[0]["data"] == "cGlwZWQ="


def test_a_large_file_is_named_and_not_read(here: Path) -> None:
    large = here / "large.bin"
    large.write_bytes(bytes(INLINE_BYTES + 1))
    (here / "link").symlink_to(large)
    for source in ("large.bin", str(large), "link"):
        _, files = attached(["attach", "LAT-1", source])
        name = os.path.basename(source)
        assert files == [{"index": 2, "name": name, "path": str(large), "identity": identity(large.stat())}]
    large.write_bytes(bytes(INLINE_BYTES))
    assert attached(["attach", "LAT-1", "large.bin"])[1][0]["data"]


def test_a_redirected_file_is_found_where_it_lies(here: Path) -> None:
    large = here / "large.bin"
    large.write_bytes(bytes(INLINE_BYTES + 1))
    with large.open("rb") as file:
        _, files = attached(["attach", "LAT-1", f"/dev/fd/{file.fileno()}"])
    assert files[0]["path"] == str(large)


@pytest.mark.parametrize("is_removed", [False, True], ids=["a pipe", "a removed file"])
def test_what_can_not_be_opened_again_is_kept_meanwhile(here: Path, is_removed: bool) -> None:
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


def test_a_pipe_without_end_is_refused_and_leaves_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachments, "MAX_SPOOLED_BYTES", 3 * INLINE_BYTES)
    monkeypatch.setenv("TMPDIR", str(here))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(Misuse) as error:
        attached(["comment", "LAT-1", "--file", "/dev/zero"])
    assert error.value.code == "REMOTE_TOO_LARGE"
    assert not list(here.glob("lattice-*"))


# --- what lattice pays for us ---


def loaded_by(code: str, cwd: Path, **environment: str) -> set[str]:
    """Return which of our modules, and of the heavy ones, a lattice command has imported in the end."""
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


def test_a_project_without_a_remote_pays_for_the_plugin_alone(guarded: Path) -> None:
    assert loaded_by("cli(['list'])", guarded.parent) == {"lattice_remote.client", "lattice_remote.client.plugin"}


def test_the_server_is_left_alone(guarded: Path) -> None:
    (guarded / "remote.json").write_text("{}")
    loaded = loaded_by("cli(['list'])", guarded.parent, LATTICE_REMOTE_SERVER="1")
    assert loaded == {"lattice_remote.client", "lattice_remote.client.plugin"}


def test_a_usage_error_needs_no_server(guarded: Path) -> None:
    (guarded / "remote.json").write_text("{}")
    assert not loaded_by("cli(['comment', '--nope'])", guarded.parent) & {"asyncio", "websockets", "msgspec", "typer"}


def test_next_in_a_session_that_the_group_names_writes() -> None:
    _, path, ctx = context(["next"])
    assert routing._is_read(path, ctx)
    ctx.obj = {"_session_name": "Argus-1"}
    assert not routing._is_read(path, ctx)
    ctx.obj = None
    ctx.params["session_name"] = "Argus-1"
    assert not routing._is_read(path, ctx)
