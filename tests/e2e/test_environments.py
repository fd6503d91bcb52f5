"""Several environments of one user: each command has its own token, network, mounts and directory (I13).

All share one runtime directory, as a user's homes, sandboxes and containers do.
"""

import json
import os
import shlex
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lattice_remote.client.connection.pool import digest_of_token
from sandbox import BIN, Client, Sandbox, Server, differences, wait_for

pytestmark = pytest.mark.e2e

Board = tuple[Server, Client, Client]
MOUNTS = ("unshare", "--mount") if os.geteuid() == 0 else ("unshare", "--map-root-user", "--mount")
NETWORK = ("unshare", "--net") if os.geteuid() == 0 else ("unshare", "--map-root-user", "--net")
RUNTIME = ("XDG_RUNTIME_DIR", "LATTICE_REMOTE_RUNTIME_DIR")


@pytest.fixture
def both(sandbox: Sandbox) -> Iterator[Board]:
    """Ana and Ben: two configurations with one runtime directory."""
    server = sandbox.started_server()
    ana, ben = sandbox.client("ana"), sandbox.client("ben")
    ben.env |= {name: ana.env[name] for name in RUNTIME}
    for client in (ana, ben):
        client.add_remote(server, server.token(f"human:{client.dir.name}"))
    yield server, ana, ben


def inside(client: Client, wall: tuple[str, ...], script: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script in its own namespaces; start ``lattice`` as a user does."""
    return subprocess.run(
        [*wall, "sh", "-ec", script],
        cwd=client.dir,
        env={**client.env, "PATH": f"{BIN}:{client.env['PATH']}", **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def quiet(done: subprocess.CompletedProcess[str]) -> str:
    """Require success and an empty stderr; return stdout."""
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def fresh(client: Client, directory: Path) -> Client:
    """Return a fresh ``git clone`` of a project with a remote."""
    other = client.elsewhere(directory)
    other.lattice_dir.mkdir()
    shutil.copy(client.lattice_dir / "remote.json", other.lattice_dir)
    return other


def agents(client: Client) -> list[dict[str, Any]]:
    """Return every responding agent of the runtime directory."""
    found = json.loads(client.ok("remote", "agent", "status", "--all", "--json"))["data"]
    own = [found] if found["running"] else []
    return own + list(found["agents"])


def log(client: Client) -> list[dict[str, Any]]:
    return list(json.loads(client.ok("remote", "log", "-n", "100", "--json"))["data"]["entries"])


def status(client: Client, env: dict[str, str] | None = None) -> dict[str, Any]:
    return dict(json.loads(client.run("remote", "status", "--json", env=env).stdout)["data"])


def plan(client: Client, short_id: str) -> Path:
    task = json.loads(client.ok("show", short_id, "--json"))["data"]["id"]
    return client.lattice_dir / "plans" / f"{task}.md"


# --- configurations ---


def test_two_configurations_write_at_once_each_in_its_own_name(both: Board) -> None:
    server, ana, ben = both
    people = {"human:ana": ana, "human:ben": ben}
    for actor, client in people.items():
        quiet(client.run("create", f"Of {actor}", "--actor", actor))

    def work(actor: str) -> None:
        client = people[actor]
        for number in range(5):
            quiet(client.run("comment", "LAT-1", f"{number} of {actor}", "--actor", actor))

    with ThreadPoolExecutor() as pool:
        list(pool.map(work, people))
    for short_id, client in (("LAT-1", ana), ("LAT-2", ben)):
        plan(client, short_id).write_text(f"# Plan of {client.dir.name}\n")
    wait_for(lambda: sum(entry["command"].startswith("edit") for entry in log(ana)) == 2, "both plans to be sent")
    for actor, client in people.items():
        assert status(client)["actor"] == actor
    assert status(ana, {"LATTICE_TOKEN": server.token("agent:x")})["actor"] == "agent:x"
    entries = log(ana)
    assert {(entry["actor"], entry["token_actor"]) for entry in entries if entry["token_actor"]} == {
        (actor, actor) for actor in people
    }
    edited = {entry["tasks"][0]["short_id"]: entry["actor"] for entry in entries if entry["command"].startswith("edit")}
    assert edited == {"LAT-1": "human:ana", "LAT-2": "human:ben"}
    texts = [line for line in ana.ok("comments", "LAT-1").splitlines() if " of human:" in line]
    assert len(texts) == 10
    assert len(agents(ana)) == 2
    wait_for(lambda: not differences(ana.lattice_dir, ben.lattice_dir), "the caches to be equal")
    assert not differences(ana.lattice_dir, server.lattice_dir())


def test_a_home_without_a_login_cannot_write(both: Board, tmp_path: Path) -> None:
    _server, ana, _ = both
    env = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config")}
    ana.ok("list")
    refused = ana.run("create", "As Ana", "--actor", "human:ana", env=env)
    assert refused.returncode == 1 and "no token for" in refused.stderr
    assert ana.ok("list", "--quiet") == ""


def test_an_edit_in_a_cache_of_two_configurations_waits_for_the_next_command(both: Board) -> None:
    """It does not wait if the other configuration has long been unused."""
    _server, ana, ben = both
    ana.ok("create", "Shared", "--actor", "human:ana")
    path = plan(ana, "LAT-1")
    ben_there = {"HOME": ben.env["HOME"], "XDG_CONFIG_HOME": ben.env["XDG_CONFIG_HOME"]}
    quiet(ana.run("list", "--quiet", env=ben_there))
    path.write_text("# By one of the two\n")
    wait_for(lambda: status(ana)["unsent_edits"], "the edit to be seen")
    for env in ({}, ben_there):
        assert "several tokens" in status(ana, env)["edits_wait_for"]
    quiet(ana.run("comment", "LAT-1", "done", "--actor", "human:ben", env=ben_there))
    assert {entry["actor"] for entry in log(ana)[:2]} == {"human:ben"}

    tokens = json.loads(Path(ana.env["XDG_CONFIG_HOME"], "lattice", "tokens.json").read_text())["tokens"]
    used = ana.lattice_dir / ".remote" / "tokens" / digest_of_token(next(iter(tokens.values()))["board"])
    os.utime(used, (time.time() - 3600,) * 2)
    path.write_text("# By Ben, who alone works here now\n")
    wait_for(lambda: log(ben)[0]["command"].startswith("edit"), "the edit to be sent")
    assert log(ben)[0]["actor"] == "human:ben"


def test_a_server_named_by_one_command_applies_to_that_command_only(both: Board, tmp_path: Path) -> None:
    server, ana, _ = both
    env = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config")}
    token = {"LATTICE_TOKEN": server.token("human:ana")}
    quiet(ana.run("create", "Named", "--actor", "human:ana", env={**env, **token, "LATTICE_REMOTE_URL": server.url}))
    refused = ana.run("create", "Unnamed", "--actor", "human:ana", env={**env, **token})
    assert refused.returncode == 1 and "this directory names that server, but you have not" in refused.stderr
    listed = ana.run("list", "--quiet", env={**env, **token})
    assert listed.stdout.split() and "you have not" in listed.stderr and len(listed.stderr.splitlines()) == 1


def test_a_configuration_created_during_a_command_leaves_one_agent(both: Board, tmp_path: Path) -> None:
    server, ana, _ = both
    client = ana.elsewhere(ana.dir)
    client.env = {**ana.env, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config")}
    token = server.token("human:ana")
    named = {"LATTICE_TOKEN": token, "LATTICE_REMOTE_URL": server.url}
    ana.ok("remote", "agent", "stop", "--all")
    quiet(client.run("list", "--quiet", env=named))
    before = agents(client)
    client.ok("remote", "login", server.url, stdin=f"{token}\n")
    quiet(client.run("list", "--quiet"))
    wait_for(lambda: len(agents(client)) == 1, "the former agent to leave")
    assert agents(client)[0]["pid"] != before[0]["pid"]


# --- namespaces ---


def test_two_projects_mounted_at_one_path_are_distinct(sandbox: Sandbox, both: Board, tmp_path: Path) -> None:
    """Two containers share the runtime directory."""
    server, ana, _ = both
    server.project("web", code="WEB")
    web = ana.elsewhere(tmp_path / "web")
    web.add_remote(server, server.token("human:ana", slug="web"), slug="web")
    work = tmp_path / "work"
    work.mkdir()
    for client, code in ((ana, "LAT"), (web, "WEB")):
        script = f"""mount --bind {shlex.quote(str(client.dir))} {work}; cd {work}
            lattice create Here --actor human:ana --quiet; lattice list --quiet; lattice list --quiet"""
        assert quiet(inside(client, MOUNTS, script)).split() == [f"{code}-1"] * 3
    assert [ana.ok("list", "--quiet"), web.ok("list", "--quiet")] == ["LAT-1\n", "WEB-1\n"]


def test_a_cache_mounted_over_another_is_distinct(both: Board, tmp_path: Path) -> None:
    """Both are in one namespace and under one agent."""
    server, ana, _ = both
    server.project("web", code="WEB")
    web = ana.elsewhere(tmp_path / "web")
    web.add_remote(server, server.token("human:ana", slug="web"), slug="web")
    script = f"""lattice create Board --actor human:ana --quiet
        mount --bind {shlex.quote(str(web.lattice_dir))} .lattice
        lattice create Web --actor human:ana --quiet; lattice list --quiet
        umount --lazy .lattice; lattice list --quiet; lattice remote agent status"""
    lines = quiet(inside(ana, MOUNTS, script)).splitlines()
    assert lines[:4] == ["LAT-1", "WEB-1", "WEB-1", "LAT-1"]


@pytest.mark.parametrize(
    ("wall", "script", "says"),
    [
        (NETWORK, "lattice list --quiet", "etwork is unreachable"),
        (MOUNTS, "mount --bind .lattice .lattice; mount -o remount,ro,bind .lattice; lattice list", "Read-only file"),
        (("setpriv", "--no-new-privs"), "lattice list", ""),
    ],
)
def test_an_agent_started_in_a_sandbox_damages_nothing_outside(
    both: Board, wall: tuple[str, ...], script: str, says: str
) -> None:
    _server, ana, _ = both
    ana.ok("create", "Before", "--actor", "human:ana")
    ana.ok("remote", "agent", "stop", "--all")
    done = inside(ana, wall, script)
    assert done.returncode == 0 and says in done.stderr and "LAT-1" in done.stdout, done
    assert len(done.stderr.splitlines()) == bool(says), done
    quiet(ana.run("create", "After", "--actor", "human:ana"))
    assert quiet(ana.run("list", "--quiet")).split() == ["LAT-1", "LAT-2"]
    assert len({agent["socket"] for agent in agents(ana)}) == 2


def test_an_agent_alone_in_a_sandbox_exits_soon(both: Board) -> None:
    _server, ana, _ = both
    script = """from lattice_remote.client.agent import main as process
process._ALONE_S, process._UNUSED_S = 0.5, 5.0
process.main()"""
    for start, is_alone in ((f"{BIN}/python -c '{script}'; true", False), (f"exec {BIN}/python -c '{script}'", True)):
        began = time.monotonic()
        done = inside(ana, NETWORK, start)  # without ``exec`` the shell would be a process of the sandbox too
        assert done.returncode == 0 and ("no other process" in done.stderr) == is_alone, done
        assert is_alone or time.monotonic() - began > 5


# --- modes, places, stale files ---


@pytest.mark.parametrize(("mode", "umask"), [(0o755, "077"), (0o700, "022"), (0o775, "077")])
def test_the_files_of_a_cache_keep_its_mode_under_any_umask(both: Board, tmp_path: Path, mode: int, umask: str) -> None:
    _server, ana, _ = both
    ana.ok("create", "Task", "--actor", "human:ana")
    ana.ok("remote", "agent", "stop", "--all")
    clone = fresh(ana, tmp_path / "clone")
    clone.lattice_dir.chmod(mode)
    quiet(inside(clone, (), f"umask {umask}; lattice list --quiet"))
    quiet(clone.run("comment", "LAT-1", "hello", "--actor", "human:ana"))
    for path in (clone.lattice_dir / "config.json", *(clone.lattice_dir / "events").glob("*.jsonl")):
        assert stat.S_IMODE(path.stat().st_mode) == mode & 0o666, path
    assert stat.S_IMODE((clone.lattice_dir / "plans").stat().st_mode) == mode


def test_without_a_temporary_directory_nothing_appears_in_the_repository(both: Board) -> None:
    _server, ana, _ = both
    ana = ana.elsewhere(ana.dir)
    ana.env = {name: value for name, value in ana.env.items() if name not in RUNTIME}
    script = """mount -t tmpfs -o ro none /tmp; mount -t tmpfs -o ro none /var/tmp
        lattice create Task --actor human:ana --quiet"""
    # The mount hides everything below /tmp, so the client must be outside it.
    place = Path(os.environ.get("HOME", "/root"), f"lattice-test-{os.getpid()}")
    try:
        client = fresh(ana, place / "clone")
        shutil.copytree(ana.env["XDG_CONFIG_HOME"], place / "config")
        done = inside(client, MOUNTS, script, XDG_CONFIG_HOME=str(place / "config"), TMPDIR="/nowhere")
        assert done.returncode == 0 and done.stdout == "LAT-1\n", done
        assert len(done.stderr.splitlines()) == 1 and "no writable directory for temporary files" in done.stderr
        assert os.listdir(client.dir) == [".lattice"]
    finally:
        shutil.rmtree(place, ignore_errors=True)


def test_a_runtime_directory_of_another_user_is_ignored_silently(both: Board, tmp_path: Path) -> None:
    _server, ana, _ = both
    short = Path("/tmp", f"lr-{os.getpid()}")
    short.mkdir(mode=0o700)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    if os.geteuid() == 0:
        os.chown(foreign, 12345, -1)
    else:
        foreign.chmod(0o500)
    ana = ana.elsewhere(ana.dir)
    ana.env = {name: value for name, value in ana.env.items() if name not in RUNTIME}
    ana.env |= {"TMPDIR": str(short), "XDG_RUNTIME_DIR": str(foreign)}
    try:
        quiet(ana.run("list", "--quiet"))
        [agent] = agents(ana)
        assert agent["socket"].startswith(f"{short}/lattice-remote-{os.getuid()}/")
        ana.env["XDG_RUNTIME_DIR"] = str(tmp_path / "missing")
        assert [found["pid"] for found in agents(ana)] == [agent["pid"]]
    finally:
        ana.ok("remote", "agent", "stop", "--all")
        shutil.rmtree(short)


def test_stale_files_of_former_environments_are_removed_when_an_agent_starts(both: Board) -> None:
    _server, ana, ben = both
    place = Path(ana.env["LATTICE_REMOTE_RUNTIME_DIR"])
    ben.ok("list")
    ana.ok("remote", "agent", "stop")
    ages = {"agent-0000000000": 7200, "agent-1111111111": 60}
    for name, age_s in ages.items():
        for ending in ("sock", "pid", "log", "lock"):
            left = place / f"{name}.{ending}"
            left.write_text("")
            os.utime(left, (time.time() - age_s,) * 2)
    for file in place.glob("agent-*.*"):
        if file.name[6] not in "01":
            os.utime(file, (time.time() - 7200,) * 2)  # belongs to a running agent of any age
    ana.ok("list")
    names = {file.stem for file in place.iterdir()}
    assert "agent-0000000000" not in names and "agent-1111111111" in names
    assert len(agents(ana)) == 2


def test_stop_ends_the_agent_of_this_environment_and_counts_the_others(both: Board) -> None:
    _server, ana, ben = both
    ana.ok("list")
    ben.ok("list")
    shown = ana.ok("remote", "agent", "status")
    assert "1 more agent of this user runs in other environments" in shown
    assert shown.count("pid ") == 1 and ana.ok("remote", "agent", "status", "--all").count("pid ") == 2
    stopped = ana.ok("remote", "agent", "stop")
    assert "Stopped the agent" in stopped and "lattice remote agent stop --all" in stopped
    assert [agent["configuration"] for agent in agents(ben)] == [f"{ben.env['XDG_CONFIG_HOME']}/lattice"]
    assert "of another environment" in ana.ok("remote", "agent", "stop", "--all")
    wait_for(lambda: not agents(ben), "both to leave")
