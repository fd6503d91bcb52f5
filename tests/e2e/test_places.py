"""Directories and environments of every kind work, or are refused in one line with the reason and the next step."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from sandbox import BIN, Client, Sandbox, Server, differences, tree_of, wait_for

pytestmark = pytest.mark.e2e

ANA = ("--actor", "human:ana")
INIT = ("init", "--project-code", "NEW", *ANA, "--no-setup-claude", "--no-setup-agents", "--no-seed")


@pytest.fixture
def clone(shared_board: tuple[Server, Client, Client], tmp_path: Path) -> Client:
    """Create the result of ``git clone`` of a project with a remote: its address, and nothing else."""
    return fresh(shared_board[1], tmp_path / "clone")


def fresh(ana: Client, directory: Path) -> Client:
    other = ana.elsewhere(directory)
    other.lattice_dir.mkdir()
    shutil.copy(ana.lattice_dir / "remote.json", other.lattice_dir)
    return other


def works_in(client: Client, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
    """Require that a write is there for a following read, and on the server."""
    made = client.run("create", "Here too", *ANA, "--quiet", cwd=cwd, env=env)
    assert (made.returncode, made.stderr) == (0, "")
    listed = client.run("list", "--quiet", cwd=cwd, env=env)
    assert (listed.returncode, listed.stderr) == (0, "")
    assert made.stdout.strip() in listed.stdout.split()


def says(done: subprocess.CompletedProcess[str], *words: str, code: int = 1) -> None:
    """Require one line of error that contains all these words."""
    assert done.returncode == code, done
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


# --- directories ---


def test_init_in_a_fresh_clone_reports_the_remote_and_changes_nothing(clone: Client) -> None:
    for _ in range(2):
        done = clone.run(*INIT)
        says(done, "this is a cache of project board", "nothing to initialise", code=0)
        assert done.stdout == "Lattice already initialized in .lattice/\n"
        assert json.loads((clone.lattice_dir / "remote.json").read_text())["project"] == "board"
        works_in(clone)


def test_init_below_a_cache_creates_its_own_project_with_a_notice(clone: Client) -> None:
    works_in(clone)
    inner = clone.dir / "in" / "here"
    inner.mkdir(parents=True)
    done = clone.run(*INIT, cwd=inner)
    says(done, "is inside", "a separate project, which is not shared", code=0)
    assert clone.run("create", "Only here", *ANA, cwd=inner).stdout.startswith("Created task NEW-1")
    assert "Only here" not in clone.ok("list")
    works_in(clone, cwd=clone.dir / "in")
    assert not (inner / ".lattice" / "remote.json").exists()


def test_a_cache_within_a_local_project_is_a_cache(clone: Client) -> None:
    outer = clone.elsewhere(clone.dir.parent)
    assert outer.run(*INIT).returncode == 0
    works_in(clone)
    assert "NEW-1" in outer.ok("create", "Around it", *ANA)
    assert "Around it" not in clone.ok("list")


def test_commands_work_in_a_deep_directory_with_relative_paths(clone: Client) -> None:
    deep = clone.dir / "a" / "b" / "c"
    deep.mkdir(parents=True)
    works_in(clone, cwd=deep)
    (deep / "notes.txt").write_text("from below")
    task = clone.ok("create", "With a file", *ANA, "--quiet").strip()
    attached = clone.run("attach", task, "../c/notes.txt", *ANA, "--json", cwd=deep)
    artifact = json.loads(attached.stdout)["data"]["id"]
    (payload,) = (clone.lattice_dir / "artifacts" / "payload").glob(f"{artifact}*")
    assert payload.read_text() == "from below"


def without_its_remote(ana: Client, directory: Path) -> Client:
    """A cache in a git repository, at a commit from before the remote was added."""
    other = ana.elsewhere(directory)
    git(other.dir, "init", "-q", "-b", "main")
    git(other.dir, "commit", "-q", "--allow-empty", "-m", "before")
    other.lattice_dir.mkdir()
    shutil.copy(ana.lattice_dir / "remote.json", other.lattice_dir)
    works_in(other)
    git(other.dir, "add", ".lattice/remote.json")
    git(other.dir, "commit", "-q", "-m", "with a remote")
    git(other.dir, "checkout", "-q", "main~")
    assert not (other.lattice_dir / "remote.json").exists() and (other.lattice_dir / "tasks").is_dir()
    return other


GONE = ("is a cache of project board", "remote.json is gone", "lattice remote add origin", "--project board")


def test_a_cache_without_its_remote_json_is_not_a_local_project(
    shared_board: tuple[Server, Client, Client], tmp_path: Path
) -> None:
    server, ana, _ben = shared_board
    other = without_its_remote(ana, tmp_path / "repo")
    task = ana.ok("create", "Known", *ANA, "--quiet").strip()
    before = tree_of(other.lattice_dir)
    for words in (
        ("create", "Lost", *ANA),
        ("comment", task, "lost", *ANA),
        ("session", "start", "--name", "Lost", "--model", "m", "--framework", "f"),
        ("dashboard",),
        ("remote",),
        ("remote", "status"),
        ("remote", "push"),
        ("remote", "remove", "origin"),
    ):
        says(other.run(*words), *GONE)
    done = other.run("comment", task, "lost", *ANA, "--json")
    assert json.loads(done.stdout)["error"]["code"] == "REMOTE_GUARD"
    listed = other.run("list")
    says(listed, *GONE, code=0)
    assert "Here too" in listed.stdout
    assert tree_of(other.lattice_dir) == before
    program = (
        "from lattice_remote import resolve_backend as here; board = here(); print(len(board.list_tasks()))\n"
        "board.write_notes('LAT-1', 'x', None)"
    )
    done = subprocess.run(
        [BIN / "python", "-c", program], cwd=other.dir, env=other.env, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip().isdigit() and done.returncode == 1 and "remote.json is gone" in done.stderr
    git(other.dir, "checkout", "-q", "main")
    works_in(other)
    wait_for(lambda: not differences(server.lattice_dir(), other.lattice_dir), "the copy to be current")


def test_remote_add_reattaches_a_cache(shared_board: tuple[Server, Client, Client], tmp_path: Path) -> None:
    server, ana, _ben = shared_board
    other = without_its_remote(ana, tmp_path / "repo")
    (plan, *_) = sorted((other.lattice_dir / "plans").glob("*.md"))
    text = plan.read_text() + "\nwritten meanwhile\n"
    plan.write_text(text)
    says(other.run("remote", "add", "origin", f"{server.url}/another"), "is a cache of", f"{server.url}/board")
    assert "Added remote origin" in other.ok("remote", "add", "origin", server.url, "--project", "board")
    works_in(other)
    wait_for(lambda: (ana.lattice_dir / "plans" / plan.name).read_text() == text, "the edit to be sent")
    assert not differences(server.lattice_dir(), other.lattice_dir)


def test_lattice_root_selects_the_project(clone: Client) -> None:
    elsewhere = clone.dir.parent / "elsewhere"
    elsewhere.mkdir()
    for root in (str(clone.dir), "../clone", "../elsewhere/../clone"):
        works_in(clone, cwd=elsewhere, env={"LATTICE_ROOT": root})
        status = clone.run("remote", "status", cwd=elsewhere, env={"LATTICE_ROOT": root})
        assert "project board" in status.stdout, status
    for root in ("", "/nowhere", str(elsewhere)):
        says(clone.run("list", cwd=clone.dir, env={"LATTICE_ROOT": root}), "LATTICE_ROOT")
        says(clone.run("remote", "status", cwd=clone.dir, env={"LATTICE_ROOT": root}), "LATTICE_ROOT")


ODD_NAMES = [b"with spaces", "naïve ☃".encode(), b"two\nlines", b"not \xff utf-8", b"-dash", b"'\"$(x)`;&|*?"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_directory_may_have_any_name(
    shared_board: tuple[Server, Client, Client], tmp_path: Path, name: bytes
) -> None:
    client = fresh(shared_board[1], tmp_path / os.fsdecode(name))
    works_in(client)
    task = client.ok("create", "With a file", *ANA, "--quiet").strip()
    file = client.dir / "notes.txt"
    file.write_text("text")
    assert client.run("attach", task, str(file), *ANA).returncode == 0
    assert client.run("remote", "status").returncode == 0


def test_a_path_may_be_longer_than_a_socket_path(shared_board: tuple[Server, Client, Client], tmp_path: Path) -> None:
    """The kernel limits socket paths to 108 bytes, so all programs use the same other place."""
    client = fresh(shared_board[1], tmp_path / ("d" * 200) / ("e" * 200))
    works_in(client)
    runtime = tmp_path / ("r" * 120)
    runtime.mkdir()
    env = {"LATTICE_REMOTE_RUNTIME_DIR": "", "XDG_RUNTIME_DIR": str(runtime)}
    works_in(client, env=env)
    status = json.loads(client.run("remote", "agent", "status", "--json", env=env).stdout)["data"]
    assert status["running"] and len(status["socket"]) < 108
    assert client.run("remote", "agent", "stop", env=env).returncode == 0


def test_a_cache_is_found_through_a_symlink(shared_board: tuple[Server, Client, Client], clone: Client) -> None:
    server, ana, _ = shared_board
    works_in(clone)
    link = clone.dir.parent / "link"
    link.symlink_to(clone.dir)
    works_in(ana.elsewhere(link))
    beside = ana.elsewhere(clone.dir.parent / "beside")
    beside.lattice_dir.symlink_to(clone.lattice_dir)
    works_in(beside)
    assert differences(clone.lattice_dir, server.lattice_dir()) == []


def test_a_removed_working_directory_is_reported(clone: Client) -> None:
    works_in(clone)

    def run_where_nothing_is(argv: str, **env: str) -> subprocess.CompletedProcess[str]:
        script = f'mkdir gone && cd gone && rmdir ../gone && exec "{BIN}/lattice" {argv}'
        return subprocess.run(
            ["sh", "-c", script], cwd=clone.dir, env={**clone.env, **env}, capture_output=True, text=True, check=False
        )

    says(run_where_nothing_is("remote status"), "the current directory was removed")
    says(run_where_nothing_is("remote add origin http://x --project y"), "the current directory was removed")
    done = run_where_nothing_is("list --quiet", LATTICE_ROOT=str(clone.dir))
    assert (done.returncode, done.stderr) == (0, "")


# --- several caches ---


def test_worktrees_and_projects_of_several_servers_share_one_agent(
    shared_board: tuple[Server, Client, Client], sandbox: Sandbox, tmp_path: Path
) -> None:
    """Git sees nothing of a cache but its address."""
    _, ana, _ = shared_board
    repository = fresh(ana, tmp_path / "repository")
    works_in(repository)
    git(repository.dir, "init", "-q")
    git(repository.dir, "add", ".")
    git(repository.dir, "commit", "-q", "-m", "a board")
    git(repository.dir, "worktree", "add", "-q", str(tmp_path / "worktree"))
    git(tmp_path, "clone", "-q", str(repository.dir), "cloned")
    other = sandbox.server("other")
    other.project("web", code="WEB")
    other.start()
    web = ana.elsewhere(tmp_path / "web")
    web.add_remote(other, other.token("human:ana", slug="web"), slug="web")
    worktree, cloned = ana.elsewhere(tmp_path / "worktree"), ana.elsewhere(tmp_path / "cloned")
    for client in (worktree, cloned, web, repository):
        works_in(client)
        agent = json.loads(client.ok("remote", "agent", "status", "--json"))["data"]
    looked_after = {cache["directory"] for cache in agent["caches"]}
    assert looked_after >= {str(one.lattice_dir) for one in (worktree, cloned, web, repository)}
    assert git(repository.dir, "status", "--porcelain") == git(worktree.dir, "status", "--porcelain") == ""
    listed = git(repository.dir, "ls-files").split()
    assert {name for name in listed if name != ".lattice/.gitignore"} == {".lattice/remote.json"}
    shutil.rmtree(worktree.dir)
    wait_for(
        lambda: str(worktree.lattice_dir) not in repository.ok("remote", "agent", "status", "--json"),
        "the agent to let it go",
    )


def git(directory: Path, *argv: str) -> str:
    identity = ("-c", "user.name=Ana", "-c", "user.email=ana@example.org", "-c", "init.defaultBranch=main")
    env = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    done = subprocess.run(
        ["git", *identity, *argv], cwd=directory, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- homes ---

NOWHERE = "/dev/null/nowhere"
"""A path that cannot be created, not even by root."""


def test_commands_work_with_a_home_that_cannot_be_written(
    shared_board: tuple[Server, Client, Client], tmp_path: Path
) -> None:
    server, ana, _ = shared_board
    token = server.token("human:ana")
    named = {"LATTICE_TOKEN": token, "LATTICE_REMOTE_URL": server.url}
    env = {"HOME": NOWHERE, "XDG_CONFIG_HOME": "", "LATTICE_REMOTE_AGENT": "off"}
    client = ana.elsewhere(tmp_path)
    added = client.run("remote", "add", "origin", server.url, "--project", "board", env={**env, **named})
    assert added.returncode == 0, added.stderr
    works_in(client, env={**env, **named})
    says(client.run("remote", "login", server.url, stdin=f"{token}\n", env=env), "cannot write", "LATTICE_TOKEN")
    says(client.run("create", "x", *ANA, env=env), "lattice remote login")
    assert "lattice remote login" in client.run("list", env=env).stderr


def test_commands_work_without_a_place_for_the_agent(clone: Client) -> None:
    """Commands run without an agent, and report it in one line."""
    env = {"LATTICE_REMOTE_RUNTIME_DIR": NOWHERE}
    made = clone.run("create", "Without an agent", *ANA, "--quiet", env=env)
    says(made, "no background agent", NOWHERE, "LATTICE_REMOTE_RUNTIME_DIR", "LATTICE_REMOTE_AGENT=off", code=0)
    listed = clone.run("list", "--quiet", env=env)
    says(listed, "no background agent", code=0)
    assert made.stdout.strip() in listed.stdout.split()
    assert "there is no place for it" in clone.run("remote", "agent", "status", env=env).stdout
    assert clone.run("list", env={**env, "LATTICE_REMOTE_AGENT": "off"}).stderr == ""


def test_commands_work_without_a_home(shared_board: tuple[Server, Client, Client], clone: Client) -> None:
    server = shared_board[0]
    env = {name: value for name, value in clone.env.items() if name not in ("HOME", "XDG_CONFIG_HOME")}
    env |= {"LATTICE_TOKEN": server.token("human:ana"), "LATTICE_REMOTE_URL": server.url, "LATTICE_REMOTE_AGENT": "off"}
    made = cold(clone, env, "create", "Homeless", *ANA, "--quiet")
    assert (made.returncode, made.stderr) == (0, "")


# --- read-only caches ---


@pytest.mark.parametrize("agent", ["on", "off"])
def test_a_read_only_cache_is_reported(shared_board: tuple[Server, Client, Client], clone: Client, agent: str) -> None:
    server = shared_board[0]
    works_in(clone)
    before = clone.ok("list", "--quiet")
    seen = count_tasks(server)
    protect(clone.lattice_dir, writable=False)
    runtime = clone.dir.parent / "run"
    runtime.mkdir(mode=0o700)
    env = {**clone.env, "LATTICE_REMOTE_AGENT": agent, "LATTICE_REMOTE_RUNTIME_DIR": str(runtime)}
    try:
        listed = without_privileges(clone, env, "list", "--quiet")
        says(listed, "cannot write the cache", "Permission denied", "showing data from", code=0)
        assert listed.stdout == before
        says(without_privileges(clone, env, "create", "x", *ANA), "cannot write the cache", "nothing was sent")
        assert count_tasks(server) == seen
    finally:
        protect(clone.lattice_dir, writable=True)
        cold(clone, env, "remote", "agent", "stop")
    works_in(clone)


def count_tasks(server: Server) -> int:
    return sum(1 for _ in (server.lattice_dir() / "tasks").iterdir())


def protect(directory: Path, *, writable: bool) -> None:
    for folder, _, names in os.walk(directory):
        for path in (Path(folder), *(Path(folder, name) for name in names)):
            path.chmod(path.stat().st_mode | 0o200 if writable else path.stat().st_mode & ~0o222)


def cold(
    client: Client, env: dict[str, str], *argv: str, prefix: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run ``lattice`` as a user starts it, in exactly this environment."""
    command = [*prefix, str(BIN / "lattice"), *argv]
    return subprocess.run(command, cwd=client.dir, env=env, capture_output=True, text=True, check=False, timeout=60)


def without_privileges(client: Client, env: dict[str, str], *argv: str) -> subprocess.CompletedProcess[str]:
    """Run a command so that file modes apply to root too."""
    drop = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
    return cold(client, env, *argv, prefix=drop)
