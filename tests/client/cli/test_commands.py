"""``lattice remote ...`` and routed commands, against the fake server."""

import asyncio
import json
import os
import shlex
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from client_kit import PLAN, TASK, make_cache, make_clone, rescued, tree, until
from fake_server import TOKEN, FakeServer, refusal_body
from lattice.cli.main import cli

from lattice_remote.client import credentials, trusted_servers

LATTICE = [sys.executable, "-c", "import sys; from lattice.cli.main import cli; sys.argv[0] = 'lattice'; cli()"]


@pytest.fixture(autouse=True)
def no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch the agent off."""
    monkeypatch.setenv("LATTICE_REMOTE_AGENT", "off")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "pro ject ü"
    made.mkdir()
    return made


class Done:
    """Result of a finished command."""

    def __init__(self, code: int, out: bytes, err: bytes) -> None:
        self.code, self.out, self.err = code, out.decode(), err.decode()

    @property
    def data(self) -> Any:
        return json.loads(self.out)["data"]


async def lattice(cwd: Path, *args: str, stdin: str = "", **environment: str) -> Done:
    """Run a command in a thread of this process, which is faster than a process."""
    return await asyncio.to_thread(_invoke, cwd, args, stdin, environment)


def _invoke(cwd: Path, args: tuple[str, ...], stdin: str, environment: dict[str, str]) -> Done:
    before = os.getcwd()
    os.chdir(cwd)
    try:
        result = CliRunner().invoke(cli, list(args), input=stdin, env=environment, prog_name="lattice")
    finally:
        os.chdir(before)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Done(result.exit_code, result.stdout_bytes, result.stderr_bytes)


async def lattice_process(cwd: Path, *args: str) -> Done:
    process = await asyncio.create_subprocess_exec(
        *LATTICE,
        *args,
        cwd=cwd,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    assert process.returncode is not None
    assert b"Traceback" not in err
    return Done(process.returncode, out, err)


async def add(server: FakeServer, root: Path, *more: str) -> Done:
    return await lattice(root, "remote", "add", "origin", f"{server.url}/web", "--token", TOKEN, *more)


async def initialise(root: Path) -> None:
    done = await lattice(
        root, "init", "--actor", "human:a", "--project-code", "LOC", "--no-setup-agents", "--no-setup-claude"
    )
    assert done.code == 0


# --- add and remove ---


async def test_adding_fills_an_empty_directory_and_reports_it(server: FakeServer, root: Path) -> None:
    done = await add(server, root)
    assert done.code == 0, done.err
    assert "1 task, 2 files, at change 0" in done.out
    assert tree(root / ".lattice") == server.files
    assert TOKEN not in (root / ".lattice/remote.json").read_text()
    assert stat.S_IMODE(os.stat(credentials.tokens_path()).st_mode) == 0o600
    assert names(root) == [".lattice"]


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


async def test_adding_takes_over_an_empty_project(server: FakeServer, root: Path) -> None:
    await initialise(root)
    assert (await add(server, root)).code == 0
    assert tree(root / ".lattice") == server.files and names(root) == [".lattice"]


async def test_a_project_with_tasks_is_not_changed(server: FakeServer, root: Path) -> None:
    await initialise(root)
    await lattice(root, "create", "Mine", "--actor", "human:a")
    before = everything(root)
    done = await add(server, root)
    assert done.code == 1 and "project of its own" in done.err and done.err.count("\n") == 1
    assert everything(root) == before


async def test_a_context_that_a_user_wrote_is_not_replaced(server: FakeServer, root: Path) -> None:
    await initialise(root)
    context = root / ".lattice/context.md"
    context.write_text(context.read_text() + "\nWe ship on Fridays.\n")
    before = everything(root)
    done = await add(server, root)
    assert done.code == 1 and "context.md" in done.err and done.err.count("\n") == 1
    assert everything(root) == before


def has_servers() -> bool:
    return os.path.exists(trusted_servers.servers_path())


def has_tokens() -> bool:
    return os.path.exists(credentials.tokens_path())


def everything(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


async def test_a_second_remote_is_refused(server: FakeServer, root: Path) -> None:
    await add(server, root)
    done = await add(server, root, "--json")
    assert done.code == 1 and "set-url" in json.loads(done.out)["error"]["message"]


@pytest.mark.parametrize("refused", [True, False])
@pytest.mark.parametrize(
    ("status", "code"),
    [
        (401, "REMOTE_UNAUTHORIZED"),
        (403, "REMOTE_FORBIDDEN"),
        (404, "REMOTE_NOT_FOUND"),
        (426, "REMOTE_VERSION"),
        (502, "REMOTE_BUSY"),
    ],
)
async def test_a_refusal_leaves_nothing_behind(
    server: FakeServer, root: Path, status: int, code: str, *, refused: bool
) -> None:
    from http import HTTPStatus

    server.status = HTTPStatus(status)
    if refused:
        server.error_body = refusal_body(code, "not now")
    done = await add(server, root)
    assert done.code == 1 and done.err.startswith("Error: ") and done.err.count("\n") == 1
    assert ("not now" in done.err) == refused
    assert names(root) == [] and not has_tokens()


async def test_an_interrupted_fill_leaves_nothing_behind(server: FakeServer, root: Path) -> None:
    async def hang(_: object, frame: object) -> bool:
        return type(frame).__name__ == "Manifest"

    server.misbehave = hang  # type: ignore[assignment]
    process = await asyncio.create_subprocess_exec(
        *LATTICE, "remote", "add", "origin", f"{server.url}/web", "--token", TOKEN, cwd=root, stderr=-1
    )
    await until(lambda: any(type(frame).__name__ == "Manifest" for frame in server.frames))
    process.send_signal(2)
    async with asyncio.timeout(30):
        _, err = await process.communicate()
    assert process.returncode != 0 and b"Traceback" not in err
    assert names(root) == [] and not has_tokens()


async def test_removing_a_remote_removes_the_cache(server: FakeServer, root: Path) -> None:
    server.files[f"tasks/{TASK}.json"] = b"{}\n"
    await add(server, root)
    (root / ".lattice" / PLAN).write_text("edited")
    done = await lattice(root, "remote", "remove", "origin")
    assert done.code == 1 and PLAN in done.err and "remote push" in done.err
    (root / ".lattice" / PLAN).unlink()
    assert (await lattice(root, "remote", "remove", "other")).code == 1
    assert (await lattice(root, "remote", "remove", "origin")).code == 0
    assert names(root) == []


@pytest.mark.parametrize("path", ["context.md", "notes/ideas.md"])
async def test_a_text_missing_on_the_server_is_not_removed(server: FakeServer, root: Path, path: str) -> None:
    server.files["context.md"] = b"# Ours\n"
    await add(server, root)
    (root / ".lattice" / path).write_text("mine")
    done = await lattice(root, "remote", "remove", "origin")
    assert done.code == 1 and path in done.err and done.err.count("\n") == 1
    assert (root / ".lattice" / path).read_text() == "mine"
    restored = await lattice(root, "remote", "sync")
    assert rescued(root / ".lattice") == {path: [b"mine"]} and "lattice remote rescued show 1" in restored.err
    done = await lattice(root, "remote", "remove", "origin")
    assert done.code == 1 and "lattice remote rescued" in done.err
    assert (await lattice(root, "remote", "rescued", "drop", "1")).out == "Dropped 1.\n"
    assert (await lattice(root, "remote", "remove", "origin")).code == 0


async def test_a_directory_with_a_name_that_is_not_utf8_is_shown(server: FakeServer, root: Path) -> None:
    place = os.fsdecode(os.fsencode(root) + b"/x\xff")
    os.mkdir(place)
    await add(server, Path(place))
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict", "LATTICE_REMOTE_AGENT": "on"}
    for words, expected in (
        (["list"], b""),
        (["remote", "agent", "status"], b"x\xff/.lattice"),
        (["remote", "agent", "stop"], b""),
    ):
        process = await asyncio.create_subprocess_exec(
            *LATTICE, *words, cwd=place, env=environment, stdout=-1, stderr=-1
        )
        out, err = await process.communicate()
        assert process.returncode == 0 and expected in out, err


async def test_a_save_while_the_cache_is_removed_restores_it(
    server: FakeServer, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add(server, root)
    rename = os.rename

    def save_first(source: str, target: str) -> None:
        if ".gone-" in target:
            (root / ".lattice" / PLAN).write_text("edited")
        rename(source, target)

    monkeypatch.setattr(os, "rename", save_first)
    done = await lattice(root, "remote", "remove", "origin")
    assert done.code == 1 and PLAN in done.err
    assert (root / ".lattice" / PLAN).read_text() == "edited" and names(root) == [".lattice"]


async def test_a_file_that_is_only_local_is_not_removed(server: FakeServer, root: Path) -> None:
    await add(server, root)
    (root / ".lattice" / (PLAN + "~")).write_text("precious")
    done = await lattice(root, "remote", "remove", "origin")
    assert done.code == 1 and "~" in done.err and (root / ".lattice/config.json").exists()


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
@pytest.mark.parametrize("command", ["comment T hi --actor human:a", "list", "remote sync"])
async def test_closed_streams_cause_no_error(server: FakeServer, root: Path, closed: str, command: str) -> None:
    await add(server, root)
    line = shlex.join(LATTICE) + f" {command} {closed}"
    process = await asyncio.create_subprocess_shell(line, cwd=root, stdout=-1, stderr=-1)
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    assert process.returncode == 0 and b"Traceback" not in out + err


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
async def test_a_notice_without_a_terminal_is_dropped(server: FakeServer, root: Path, closed: str) -> None:
    await add(server, root)
    await server.stop()
    line = shlex.join(LATTICE) + f" list {closed}"
    process = await asyncio.create_subprocess_shell(line, cwd=root, stdout=-1, stderr=-1)
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    assert process.returncode == 0 and b"Traceback" not in out + err


# --- the other subcommands ---


async def test_a_remote_is_listed_and_its_url_changed(server: FakeServer, root: Path) -> None:
    outside = await lattice(root, "remote")
    assert (outside.code, outside.out) == (1, "") and "there is no lattice project here" in outside.err
    await initialise(root)
    without = await lattice(root, "remote")
    assert (without.code, without.out + without.err) == (0, "")
    await add(server, root)
    assert (await lattice(root, "remote")).out == "origin\n"
    assert (await lattice(root, "remote", "-v")).out == f"origin\t{server.url}/web\n"
    assert server.url in (await lattice(root, "remote", "show", "origin")).out
    assert (await lattice(root, "remote", "set-url", "origin", "http://127.0.0.1:1")).code == 0
    moved = {"name": "origin", "project": "web", "url": "http://127.0.0.1:1"}
    assert (await lattice(root, "remote", "--json")).data == {"remotes": [moved]}
    assert (await lattice(root, "remote", "set-url", "origin", "http://127.0.0.1:1", "--json")).data == moved
    assert (await lattice(root, "remote", "rename", "origin", "team", "--json")).data == {**moved, "name": "team"}


async def test_lattices_own_commands_are_not_routed(server: FakeServer, root: Path) -> None:
    await add(server, root)
    for words in (("list",), ("resource", "acquire")):
        done = await lattice(root, "remote", "route", *words)
        assert done.code == 1 and f"lattice {' '.join(words)} is lattice's own command" in done.err
    assert (await lattice(root, "remote", "route", "--json")).data == {"commands": []}


async def test_resolving_without_conflicts_reports_that(server: FakeServer, root: Path) -> None:
    await add(server, root)
    done = await lattice(root, "remote", "resolve", "--all", "--theirs")
    assert (done.code, done.out) == (0, "No conflicts.\n")


async def test_status_verify_sync_pull_and_push(server: FakeServer, root: Path) -> None:
    await add(server, root)
    status = (await lattice(root, "remote", "status", "--json")).data
    assert status["connected"] and status["current"] and status["agent"] is None
    assert status["edits_wait_for"] == "the next command that writes, as no agent runs"
    assert "connected (last frame" in (await lattice(root, "remote", "status")).out
    (root / ".lattice/config.json").write_text("tampered")
    done = await lattice_process(root, "remote", "verify")
    assert done.code == 1 and "differs: config.json" in done.out
    done = await lattice(root, "remote", "sync")
    assert done.code == 0 and "fetched: config.json" in done.out and "repaired 1 file" in done.out
    done = await lattice(root, "remote", "verify", "--json")
    assert done.code == 0 and done.data["equal"]
    (root / ".lattice" / PLAN).write_text("new")
    assert (await lattice(root, "remote", "push")).out == f"{PLAN}: stored\n"
    assert server.files[PLAN] == b"new"
    assert (await lattice(root, "remote", "pull")).out == "Up to date at change 1.\n"


async def test_status_names_the_first_withheld_edits_and_counts_all(server: FakeServer, root: Path) -> None:
    paths = [f"plans/task_{n:026d}.md" for n in range(30)]
    server.files |= dict.fromkeys(paths, b"# Plan\n\n- write\n")
    server.files |= {path.replace("plans/", "tasks/").replace(".md", ".json"): b"{}\n" for path in paths}
    await add(server, root)
    for path in paths:
        (root / ".lattice" / path).write_bytes(b"# Plan\n\n* write\n")
    await lattice(root, "remote", "push")
    shown = (await lattice(root, "remote", "status")).out.splitlines()
    start = shown.index("unsent edits:   30")
    reason = "withheld: it was changed together with many others, as by a formatter"
    indent = " " * 16
    assert shown[start + 1 : start + 14] == [
        *(f"{indent}{path}: {reason}" for path in paths[:10]),
        f"{indent}and 20 more; all: lattice remote status --json",
        f"{indent}to send withheld edits: lattice remote push --confirm",
        f"{indent}to restore the server's texts: lattice remote resolve --all --theirs",
    ]
    assert "as soon as" not in "\n".join(shown)


async def test_logging_in_and_out(server: FakeServer, tmp_path: Path) -> None:
    root = make_cache(tmp_path / "clone", server.url).parent
    done = await lattice(root, "list")
    assert done.code == 1 and f"lattice remote login {server.url}/web" in done.err
    assert (await lattice(root, "remote", "login", stdin="wrong\n")).code == 1
    done = await lattice(root, "remote", "login", stdin=TOKEN + "\n")
    assert done.code == 0 and "accepted, acting as human:ana" in done.out and TOKEN not in done.out
    assert (await lattice(root, "remote", "pull")).code == 0
    assert (await lattice(root, "remote", "logout")).code == 0
    assert (await lattice(root, "comment", "X-1", "x", "--actor", "human:a")).code == 1


async def test_a_clone_is_not_filled_before_the_user_names_its_server(server: FakeServer, tmp_path: Path) -> None:
    root = make_clone(tmp_path / "clone", server.url).parent
    done = await lattice(root, "list", LATTICE_TOKEN=TOKEN)
    assert done.code == 1 and f"lattice remote trust {server.url}" in done.err and done.err.count("\n") == 1
    done = await lattice(root, "remote", "status", LATTICE_TOKEN=TOKEN)
    assert done.code == 1 and "not connected: no token was sent" in done.out and server.requests == []
    done = await lattice(root, "remote", "pull", LATTICE_TOKEN=TOKEN, LATTICE_REMOTE_URL=server.url)
    assert done.code == 0
    assert (await lattice(root, "remote", "pull", LATTICE_TOKEN=TOKEN)).code == 1
    done = await lattice(root, "remote", "trust")
    assert done.code == 0 and done.out.startswith(f"Tokens may be sent to {server.url} (this machine only)")
    assert (await lattice(root, "remote", "pull", LATTICE_TOKEN=TOKEN)).code == 0


async def test_the_login_suggested_for_a_stale_token_replaces_it(server: FakeServer, tmp_path: Path) -> None:
    root = make_cache(tmp_path / "clone", server.url).parent
    credentials.store(server.url, "web", "ltr_rotated")
    done = await lattice(root, "comment", "X-1", "x", "--actor", "human:ana")
    assert done.code == 1 and "the server does not know this token" in done.err
    advice = done.err.strip().rpartition("log in with: lattice ")[2].split()
    done = await lattice(root, *advice, stdin=TOKEN + "\n")
    assert done.code == 0 and done.err == ""
    assert (await lattice(root, "remote", "pull")).code == 0


async def test_a_login_reports_a_token_with_precedence(server: FakeServer, tmp_path: Path) -> None:
    root = make_cache(tmp_path / "clone", server.url).parent
    credentials.store(server.url, "web", "ltr_rotated")
    done = await lattice(root, "remote", "login", server.url, stdin=TOKEN + "\n")
    assert done.code == 0 and f"replace it: lattice remote login {server.url}/web" in done.err


async def test_a_login_that_replaces_a_server_token_suggests_one_per_project(server: FakeServer, root: Path) -> None:
    for previous, said in ((None, ""), (TOKEN, ""), ("ltr_other", f"lattice remote login {server.url}/PROJECT")):
        if previous is not None:
            credentials.store(server.url, credentials.ANY_PROJECT, previous)
        done = await lattice(root, "remote", "login", server.url, stdin=TOKEN + "\n")
        assert done.code == 0 and said in done.err and bool(said) == bool(done.err)


@pytest.mark.parametrize("words", [("login",), ("trust",), ("add", "origin")])
async def test_plain_http_to_another_machine_requires_an_option(root: Path, words: tuple[str, ...]) -> None:
    url = "http://board.example"
    done = await lattice(root, "remote", *words, url + ("/web" if words[0] == "add" else ""), stdin="ltr_x\n")
    assert done.code == 1 and "--insecure" in done.err and done.err.count("\n") == 1
    assert not has_tokens() and not has_servers() and names(root) == []
    if words == ("trust",):
        done = await lattice(root, "remote", "trust", url, "--insecure")
        assert done.code == 0 and "readable on the way" in done.out
        assert trusted_servers.admit(url).insecure


async def test_a_token_is_read_from_stdin(server: FakeServer, root: Path) -> None:
    url = f"{server.url}/web"
    done = await lattice(root, "remote", "add", "origin", url, "--token", "-", stdin=TOKEN + "\n")
    assert done.code == 0 and done.err == "" and credentials.stored(server.url, "web") == TOKEN


async def test_a_moved_server_is_trusted_by_set_url(server: FakeServer, root: Path) -> None:
    make_clone(root, "http://127.0.0.1:1")
    assert (await lattice(root, "remote", "set-url", "origin", server.url)).code == 0
    assert (await lattice(root, "remote", "pull", LATTICE_TOKEN=TOKEN)).code == 0


async def test_outside_a_project_the_error_suggests_a_command(root: Path) -> None:
    done = await lattice(root, "remote", "status")
    assert done.code == 1 and "lattice remote add origin" in done.err


async def test_a_push_to_a_url_suggests_the_command_that_adds_it(server: FakeServer, root: Path) -> None:
    for url, words in (
        ("https://board.example/web", "lattice remote add origin https://board.example/web"),
        ("https://board.example:8443", "lattice remote add origin https://board.example:8443 --project SLUG"),
    ):
        done = await lattice(root, "remote", "push", url)
        assert done.code == 1 and done.err.rstrip().endswith(words)
    done = await lattice(root, "remote", "push", "https://ana:secret@board.example/web")
    assert done.code == 1 and "lattice remote login URL" in done.err and "secret" not in done.err
    await add(server, root)
    url = (await lattice(root, "remote", "get-url")).out.strip()
    assert (await lattice(root, "remote", "push", url)).out == "Nothing to send.\n"
    assert "there is 'origin'" in (await lattice(root, "remote", "push", f"{url}-2")).err


# --- routed commands ---


async def test_a_command_is_sent_as_typed(server: FakeServer, root: Path) -> None:
    await add(server, root)
    (root / "sub").mkdir()
    (root / "sub/file ü").write_bytes(b"content")
    done = await lattice_process(root / "sub", "attach", "WEB-1", "file ü", "--actor", "human:ana")
    assert done.out == "attach WEB-1 file ü --actor human:ana" and done.code == 0
    run = next(frame for frame in server.frames if type(frame).__name__ == "Run")
    assert [(file.index, file.name, file.data) for file in run.files] == [(2, "file ü", b"content")]  # type: ignore[union-attr]


async def test_reads_work_without_the_server(server: FakeServer, root: Path) -> None:
    await add(server, root)
    server.files.pop("tasks/task_1.json")
    await lattice(root, "remote", "sync")
    await lattice(root, "remote", "rescued", "drop", "--all")
    await server.stop()
    done = await lattice_process(root, "list", "--json")
    assert done.code == 0 and json.loads(done.out)["ok"]
    assert done.err.startswith(
        f"lattice-remote: cannot reach server {server.url} (connection refused); showing data from "
    )
    assert done.err.endswith("(change 0)\n") and done.err.count("\n") == 1


async def test_a_write_without_the_server_is_an_error(server: FakeServer, root: Path) -> None:
    await add(server, root)
    await server.stop()
    before = everything(root / ".lattice/tasks")
    done = await lattice_process(root, "comment", "WEB-1", "x", "--actor", "human:ana", "--json")
    error = json.loads(done.out)
    assert done.code == 1 and error["ok"] is False and error["error"]["code"] == "REMOTE_UNREACHABLE"
    assert "cannot reach server" in error["error"]["message"] and everything(root / ".lattice/tasks") == before


async def test_the_root_can_be_given_as_an_option(server: FakeServer, root: Path, tmp_path: Path) -> None:
    await add(server, root)
    done = await lattice(tmp_path, "comment", "WEB-1", "x", "--actor", "human:ana", LATTICE_ROOT=str(root))
    assert done.out.startswith("comment WEB-1")


async def test_help_and_usage_errors_are_clicks_own(root: Path) -> None:
    make_cache(root, "http://127.0.0.1:1")
    done = await lattice(root, "comment", "--help")
    assert done.code == 0 and done.out.startswith("Usage: lattice comment")
    done = await lattice(root, "comment", "--nope")
    assert done.code == 2 and "No such option" in done.err
