"""``lattice-remote`` as an administrator types it."""

import contextlib
import inspect
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import lattice_remote
from lattice_remote.server.cli import main
from lattice_remote.server.cluster.shared_projects import SharedProjects
from lattice_remote.server.datadir import DataDir
from lattice_remote.server.maintenance import project_commands


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


def lattice_remote_command(*argv: object, **env: str) -> Result:
    """Run the console script's function in this process."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["lattice-remote", *map(str, argv)])
        for name, value in env.items():
            patch.setenv(name, value)
        try:
            main()
        except SystemExit as left:
            code = left.code
    assert isinstance(code, int | None)
    return Result(code or 0, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "data"
    made = lattice_remote_command("init", path)
    assert made.returncode == 0, made.stderr
    assert str(path) in made.stdout
    created = lattice_remote_command("project", "create", "web", "--code", "WEB", "--name", "The web", "--data", path)
    assert created.returncode == 0, created.stderr
    return path


def test_the_version() -> None:
    assert lattice_remote_command("--version").stdout.strip() == f"lattice-remote {lattice_remote.__version__}"


@pytest.mark.parametrize("argv", [["--help"], ["token", "create", "--help"], ["start", "--help"]])
def test_help_describes_usage(argv: list[str]) -> None:
    result = lattice_remote_command(*argv)
    assert result.returncode == 0
    assert "lattice-remote" in result.stdout


def test_the_data_directory_may_be_named_before_after_or_in_the_environment(data: Path) -> None:
    listings = [
        lattice_remote_command("--data", data, "project", "list", "--json"),
        lattice_remote_command("project", "list", "--json", "--data", data),
        lattice_remote_command("project", "list", "--json", LATTICE_REMOTE_DATA=str(data)),
    ]
    for listing in listings:
        assert json.loads(listing.stdout) == [
            {"slug": "web", "code": "WEB", "name": "The web", "tasks": 0, "archived": 0, "state": "active"}
        ]


def test_a_token_is_alone_on_stdout_and_can_be_listed_and_revoked(data: Path) -> None:
    created = lattice_remote_command(
        "token", "create", "--project", "web", "--actor", "human:ana", "--act-as", "agent:*", "--data", data
    )
    text = created.stdout.strip()
    assert created.stdout == f"{text}\n"
    assert text.startswith("ltr_")
    listed = lattice_remote_command("token", "list", "--json", "--data", data).stdout
    [token] = json.loads(listed)
    assert (token["actor"], token["act_as"], token["projects"]) == ("human:ana", ["agent:*"], ["web"])
    assert "sha256" not in token
    assert text not in listed
    assert token["id"] in lattice_remote_command("token", "list", "--data", data).stdout
    assert lattice_remote_command("token", "revoke", text, "--data", data).returncode == 0
    assert json.loads(lattice_remote_command("token", "list", "--json", "--data", data).stdout) == []


def test_a_token_can_expire_and_be_rotated(data: Path) -> None:
    named = ("token", "create", "--project", "web", "--actor", "human:ana", "--data", data)
    made = lattice_remote_command(*named, "--expires", "2999-01-01")
    assert "until 2999-01-01T00:00:00Z" in made.stderr
    [token] = json.loads(lattice_remote_command("token", "list", "--json", "--data", data).stdout)
    assert (token["expires"], token["last_used"]) == ("2999-01-01T00:00:00Z", None)
    rotated = lattice_remote_command("token", "rotate", token["id"], "--grace", "1h", "--data", data)
    assert rotated.stdout.startswith("ltr_")
    assert rotated.stdout != made.stdout
    assert "works until 2" in rotated.stderr
    assert json.loads(lattice_remote_command("token", "list", "--json", "--data", data).stdout) == [token]
    assert "2999-01-01T00:00:00Z  never" in lattice_remote_command("token", "list", "--data", data).stdout
    for wrong in (("rotate", token["id"], "--grace", "soon"), ("rotate", "tok_none"), (*named[1:], "--expires", "0d")):
        failed = lattice_remote_command("token", *wrong, *(() if "--data" in wrong else ("--data", data)))
        assert (failed.returncode, failed.stdout, len(failed.stderr.splitlines())) == (1, "", 1)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["project", "list"], "lattice-remote init"),
        (["start"], "lattice-remote init"),
        (["token", "create", "--project", "web", "--actor", "human:ana"], "lattice-remote init"),
    ],
)
def test_a_missing_directory_is_one_line_with_advice(tmp_path: Path, argv: list[str], said: str) -> None:
    result = lattice_remote_command(*argv, "--data", tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert said in result.stderr


@pytest.mark.parametrize(
    "argv",
    [
        ["token", "create", "--project", "nope", "--actor", "human:ana"],
        ["token", "create", "--project", "web", "--actor", "nobody"],
        ["token", "revoke", "tok_none"],
        ["project", "create", "web", "--code", "WEB"],
        ["project", "create", "../web", "--code", "WEB"],
        ["init"],
    ],
)
def test_a_failure_is_one_line_and_exit_1(data: Path, argv: list[str]) -> None:
    result = lattice_remote_command(*argv, "--data", data)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1


def test_a_wrong_command_line_is_exit_2(data: Path) -> None:
    assert lattice_remote_command("start", "--port", "x", "--data", data).returncode == 2
    assert lattice_remote_command("nonsense").returncode == 2


def test_an_error_of_the_system_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "data"
    lattice_remote_command("init", path)
    for argv, said in ((["--host", "x" * 70], "not a host name"), ([], "Is a directory")):
        if not argv:
            (path / ".lock").unlink()
            (path / ".lock").mkdir()
        result = lattice_remote_command("start", *argv, "--port", "0", "--data", path)
        assert result.returncode == 1
        assert said in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_the_commands_for_whole_projects(data: Path, tmp_path: Path) -> None:
    def told(*argv: object) -> tuple[int, str, str]:
        done = lattice_remote_command("--data", data, *argv)
        return done.returncode, done.stdout, done.stderr

    assert told("project", "create", "old", "--code", "OLD")[0] == 0
    code, out, err = told("export", "old", tmp_path / "copy")
    assert (code, err) == (0, "") and out.startswith(f"Exported old to {tmp_path / 'copy'}: 0 tasks, 0 archived, ")
    code, out, _ = told("import", "--from", tmp_path / "copy", "--project", "new", "--dry-run", "--json")
    assert code == 0 and json.loads(out)["refused"] == ""
    code, out, _ = told("import", "--from", tmp_path / "copy", "--project", "new")
    assert code == 0 and out.startswith("Imported new: 0 tasks, ")
    assert told("project", "rename", "old", "older") == (
        0,
        "old is now called older; 0 tokens updated.\n",
        "On each client, run: lattice remote set-url origin URL --project older\n",
    )
    archived = "Archived older; restore it with: lattice-remote project unarchive older\n"
    assert told("project", "archive", "older") == (0, archived, "")
    assert told("log", "older") == (0, "The journal has no changes.\n", "")
    assert told("project", "unarchive", "older") == (0, "older is back.\n", "")
    assert told("project", "archive", "older")[0] == 0
    code, _, err = told("project", "delete", "older")
    assert code == 1 and err.startswith("Error: nothing was deleted: ")
    code, out, err = told("project", "delete", "older", "--confirm", "older")
    assert (code, err) == (0, "") and out.startswith("Deleted older; 0 tokens lost it. Its files are in ")
    code, out, _ = told("status", "--json")
    assert code == 3 and {"new"} < {project["slug"] for project in json.loads(out)["projects"]}


def test_a_token_is_edited_and_stays_listed_after_its_end(data: Path) -> None:
    def run(*argv: object) -> Result:
        return lattice_remote_command("--data", data, *argv)

    assert run("project", "create", "api").stdout.startswith("Created project api; its tasks are API-1, API-2, ...")
    made = json.loads(run("token", "create", "--project", "web", "--actor", "human:eve", "--json").stdout)
    assert made["token"].startswith("ltr_") and made["projects"] == ["web"]
    edited = run("token", "edit", made["id"], "--add-project", "api", "--act-as", "agent:*", "--read-only")
    assert edited.stdout == f"{made['id']} reads only in api, web as human:eve and agent:*, without an expiry.\n"
    edited = run("token", "edit", made["id"], "--remove-project", "web", "--act-as", "", "--expires", "90d", "--json")
    shown = json.loads(edited.stdout)
    assert (shown["projects"], shown["act_as"], shown["read_only"]) == (["api"], [], True)
    assert shown["expires"] is not None
    assert "never" in run("token", "list").stdout
    for argv, what in (
        (("--remove-project", "web"), "is not for project 'web'"),
        (("--remove-project", "api"), "would have no project left"),
        (("--add-project", "nowhere"), "there is no project 'nowhere'"),
        (("--act-as", "no pattern"), "bad --act-as"),
        ((), "nothing to change"),
    ):
        refused = run("token", "edit", made["id"], *argv)
        assert refused.returncode == 1 and what in refused.stderr, argv
    assert json.loads(run("token", "revoke", made["id"], "--json").stdout)["revoked"] is not None
    assert made["id"] not in run("token", "list").stdout
    assert f"revoked {shown['created'][:2]}" in run("token", "list", "--all").stdout
    assert run("token", "edit", made["id"], "--read-write").returncode == 1


def test_administrative_changes_are_recorded(tmp_path: Path) -> None:
    data = tmp_path / "data"
    lattice_remote_command("init", data)

    def run(*argv: object, **env: str) -> Result:
        return lattice_remote_command("--data", data, *argv, **env)

    run("project", "create", "web")
    token = json.loads(
        run("token", "create", "--project", "web", "--actor", "human:ana", "--json", SUDO_USER="admin-ana").stdout
    )
    run("token", "rotate", token["id"])
    run("token", "revoke", token["id"])
    run("project", "archive", "web")
    entries = json.loads(run("log", "--admin", "--json").stdout)["entries"]
    assert [(entry["action"], entry["subject"]) for entry in entries] == [
        ("project archive", "web"),
        ("token revoke", token["id"]),
        ("token rotate", token["id"]),
        ("token create", token["id"]),
        ("project create", "web"),
        ("init", str(data)),
    ]
    assert entries[3]["user"] == "admin-ana" and entries[3]["details"]["projects"] == ["web"]
    assert not any(token["token"] in json.dumps(entry) for entry in entries)
    assert (data / "admin.log").stat().st_mode & 0o777 == 0o600
    shown = run("log", "--admin", "-n", "1").stdout
    assert "project archive web" in shown
    assert run("log", "web", "--admin").returncode == 1
    assert run("log").returncode == 1


@pytest.mark.parametrize(
    "command",
    [
        DataDir.create_project,
        *(
            getattr(project_commands, f"{name}_project")
            for name in ("import", "rename", "archive", "unarchive", "delete")
        ),
    ],
)
def test_a_command_for_projects_is_called_alike_in_a_cluster(command: Callable[..., object]) -> None:
    shared = getattr(SharedProjects, command.__name__)
    of_server, of_cluster = (list(inspect.signature(each).parameters.values())[1:] for each in (command, shared))
    assert of_server == of_cluster
    assert inspect.signature(command).return_annotation == inspect.signature(shared).return_annotation
