"""Whole projects with real programs: pushed, cloned, imported, exported, renamed."""

import json
import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from faultproxy import FaultProxy
from load_scenarios import fill
from preloaded_programs import warm
from sample_projects import ANA, add_hooks, lattice, sample_project
from sandbox import Client, Sandbox, Server, differences, tree_of, wait_for

pytestmark = pytest.mark.e2e
READS = (["list", "--json"], ["list"], ["show", "OWN-1", "--json"], ["show", "OWN-3"], ["comments", "OWN-1"], ["stats"])


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local project's ``.lattice``; tests copy it and must not change it."""
    return sample_project(tmp_path_factory.mktemp("master"))


@pytest.fixture
def server(sandbox: Sandbox) -> Iterator[Server]:
    made = sandbox.server()
    made.project()
    yield made.start()


def own(sandbox: Sandbox, master: Path, name: str = "ana") -> Client:
    """A machine with a directory that contains its own project."""
    client = sandbox.client(name)
    shutil.copytree(master, client.lattice_dir)
    return client


def answers(client: Client) -> list[str]:
    return [client.ok(*line) for line in READS]


def test_names_in_a_pushed_project_can_be_used_afterwards(sandbox: Sandbox, server: Server) -> None:
    """These are names that lattice accepted and that no rule of paths forbids."""
    resources, session = ("gpu.0", "con", "x.json", "two words", "-x", "a..b"), "Argus.1"
    ana = sandbox.client("ana")
    lattice(ana.dir, "init", "--project-code", "OWN", "--actor", "human:ana")
    for name in resources:
        lattice(ana.dir, "resource", "create", *ANA, "--", name)
    lattice(ana.dir, "session", "start", "--name", session, "--model", "human")
    ana.add_remote(server, server.token("human:ana", "agent:*", f"human:{session}"))
    ana.ok("remote", "push")
    for name in resources:
        for verb in ("acquire", "heartbeat", "release"):
            ana.ok("resource", verb, *ANA, "--", name)
        assert json.loads(ana.ok("resource", "status", "--json", "--", name))["data"]["holders"] == []
    ana.ok("create", "from a session", "--name", f"{session}-1")
    ana.ok("session", "end", f"{session}-1")
    assert not differences(ana.lattice_dir, server.lattice_dir())
    for argv, code in (
        (["link", "OWN-1", "blocks", "../../etc/passwd", *ANA], "INVALID_ID"),
        (["create", "T", "--id", "not_valid", *ANA], "INVALID_ID"),
        (["create", "T", "--actor", "ana"], "INVALID_ACTOR"),
        (["resource", "acquire", "../x", *ANA], "REMOTE_UNSUPPORTED"),
    ):
        refused = ana.run(*argv, "--json")
        assert (refused.returncode, json.loads(refused.stdout)["error"]["code"]) == (1, code)


def test_a_local_project_is_pushed_and_its_directory_becomes_a_cache(
    sandbox: Sandbox, server: Server, master: Path
) -> None:
    """I3, I4."""
    ana = own(sandbox, master)
    (ana.lattice_dir / "plans" / "scratch.md~").write_text("an editor's")
    before = tree_of(ana.lattice_dir)
    said = ana.add_remote(server, server.token("human:ana", "agent:*"))
    assert "not pushed yet. Next: lattice remote push" in said
    read = answers(ana)
    refused = ana.run("comment", "OWN-1", "no", *ANA)
    assert refused.returncode == 1 and "lattice remote push" in refused.stderr
    assert tree_of(ana.lattice_dir) == before, "nothing was touched"

    plan = json.loads(ana.ok("remote", "push", "--dry-run", "--json"))["data"]
    assert (plan["tasks"], plan["archived_tasks"], plan["files"]) == (2, 1, len(before))
    assert plan["skipped"] == ["plans/scratch.md~"] and plan["trouble"] is None
    assert server.lattice_dir().joinpath("ids.json").read_text().count("OWN") == 0, "a dry run sends nothing"

    assert "Pushed 2 tasks, 1 archived" in ana.ok("remote", "push")
    assert tree_of(ana.lattice_dir) == tree_of(server.lattice_dir()) == before, "byte for byte, on both sides"
    assert answers(ana) == read
    assert ana.ok("remote", "verify").startswith("Compared with the server at change 1: equal")
    assert "conflicts:      none" in ana.ok("remote", "status")
    [entry] = json.loads(ana.ok("remote", "log", "--json"))["data"]["entries"]
    assert entry["actor"] == "human:ana" and entry["command"].startswith("remote push: 2 tasks")

    ana.ok("comment", "OWN-1", "from here on, together", *ANA)
    ben = sandbox.client("ben")
    ben.ok("remote", "login", server.url, stdin=server.token("human:ben"))
    assert "2 tasks" in ben.ok("remote", "clone", f"{server.url}/board", "work")
    work = ben.elsewhere(ben.dir / "work")
    assert not differences(work.lattice_dir, server.lattice_dir())
    again = ben.run("remote", "clone", f"{server.url}/board", "work")
    assert again.returncode == 1 and "not an empty directory" in again.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_stopped_clone_leaves_nothing_behind(sandbox: Sandbox, server: Server, number: signal.Signals) -> None:
    ana = sandbox.client("ana")
    with FaultProxy(server.port) as proxy:
        proxy.stall()
        ana.ok("remote", "login", server.url, stdin=server.token("human:ana"))
        ana.ok("remote", "trust", proxy.url)
        process = ana.popen(
            "remote", "clone", f"{proxy.url}/board", "work", env={"LATTICE_TOKEN": server.token("human:a")}
        )
        wait_for(lambda: list(ana.dir.glob("work/.lattice.new-*")), "the clone to have begun")
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in errors
    assert list(ana.dir.iterdir()) == []


def test_an_interrupted_clone_resumes(sandbox: Sandbox, server: Server) -> None:
    """I3, I4, I5."""
    ana = sandbox.client("ana")
    ana.ok("remote", "login", server.url, stdin=(token := server.token("human:ana", "agent:*")))
    server.stop()
    fill_with_long_plans(server, 150)
    server.start()
    paths = list(tree_of(server.lattice_dir()))
    with FaultProxy(server.port) as proxy:
        ana.ok("remote", "trust", proxy.url)
        ana.env["LATTICE_TOKEN"], line = token, ("remote", "clone", f"{proxy.url}/board", "work")
        for end in (proxy.refuse, signal.SIGKILL, signal.SIGINT):
            proxy.flow()
            proxy.stall_after(1_200_000)
            had = len(list(ana.dir.glob("work/*/plans/*")))
            process = ana.popen(*line)
            wait_for(lambda: len(list(ana.dir.glob("work/*/plans/*"))) > had + 20, "some of the plans")  # noqa: B023
            wait_for(lambda: proxy.is_stalled, "the rest to be held back")
            (staging,) = ana.dir.glob("work/.lattice.new-*")
            if isinstance(end, signal.Signals):
                proxy.cut()
                wait_for(lambda: len(missing_in(staging)) < len(paths), "the state to be stored")  # noqa: B023
                process.send_signal(end)
            else:
                end()
            _, errors = process.communicate(timeout=60)
            assert process.returncode, "it did not end by itself"
            assert end == signal.SIGKILL or "repeat the command to continue" in errors
            missing = missing_in(staging)
            assert 0 < len(missing) < len(paths)
            paths = missing
            half = next(path for path in missing if path.startswith("plans/"))
            (staging / half).write_text("# cut off in the mid")  # as after a kill: a plan without its base
            (staging / ".remote/base" / half).unlink(missing_ok=True)
        sent, size = proxy.to_clients, sum(server.lattice_dir().joinpath(path).stat().st_size for path in paths)
        proxy.flow()
        ana.ok(*line)
        assert proxy.to_clients - sent < size + 50_000, "nothing else was sent again"
    work = ana.elsewhere(ana.dir / "work")
    assert [entry.name for entry in work.dir.iterdir()] == [".lattice"]
    assert not differences(work.lattice_dir, server.lattice_dir())


def missing_in(cache: Path) -> list[str]:
    """Return the files that a cache lacks according to its own records."""
    missing: list[str] = json.loads((cache / "cache_state.json").read_text())["missing"]
    return missing


def fill_with_long_plans(server: Server, tasks: int) -> None:
    """Add tasks with incompressible plans to a project of a stopped server."""
    lattice(server.lattice_dir().parent, "create", "One", *ANA)
    fill(server.lattice_dir(), tasks)
    for plan in server.lattice_dir().glob("plans/*.md"):
        plan.write_text(f"{plan.read_text()}{secrets.token_urlsafe(18000)}\n")


def test_two_clones_into_one_directory_do_not_disturb_each_other(sandbox: Sandbox, server: Server) -> None:
    ana = sandbox.client("ana")
    with FaultProxy(server.port) as proxy:
        proxy.stall()
        ana.ok("remote", "login", server.url, stdin=(token := server.token("human:ana")))
        ana.ok("remote", "trust", proxy.url)
        ana.env["LATTICE_TOKEN"] = token
        line = ("remote", "clone", f"{proxy.url}/board", "work")
        process = ana.popen(*line)
        wait_for(lambda: list(ana.dir.glob("work/.lattice.new-*/.remote/lock")), "the clone to have begun")
        other = ana.run(*line)
        assert other.returncode == 1 and "locked by another process" in other.stderr
        proxy.flow()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert not differences(ana.dir / "work" / ".lattice", server.lattice_dir())


def test_a_clone_under_nohup_survives_its_terminal(sandbox: Sandbox, server: Server) -> None:
    ana = sandbox.client("ana")
    with FaultProxy(server.port) as proxy:
        proxy.stall()
        ana.ok("remote", "login", server.url, stdin=server.token("human:ana"))
        ana.ok("remote", "trust", proxy.url)
        inherited = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            process = ana.popen(
                "remote", "clone", f"{proxy.url}/board", "work", env={"LATTICE_TOKEN": server.token("human:a")}
            )
        finally:
            signal.signal(signal.SIGHUP, inherited)
        wait_for(lambda: list(ana.dir.glob("work/.lattice.new-*")), "the clone to have begun")
        process.send_signal(signal.SIGHUP)
        proxy.flow()
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors


def test_a_push_to_a_server_project_with_tasks_is_refused_and_overwrites_nothing(
    sandbox: Sandbox, server: Server, master: Path
) -> None:
    ana, ben = own(sandbox, master), own(sandbox, master, "ben")
    for client in (ana, ben):
        client.add_remote(server, server.token(f"human:{client.dir.name}"))
    ana.ok("remote", "push")
    before = tree_of(server.lattice_dir())
    late = ben.run("remote", "push")
    assert late.returncode == 1 and "has 3 tasks" in late.stderr
    assert ben.run("remote", "push", "--dry-run").returncode == 1
    ben.ok("remote", "remove", "origin")
    assert tree_of(ben.lattice_dir) == tree_of(master)
    lattice(ben.dir, "comment", "OWN-1", "a local project as before", *ANA)
    third = own(sandbox, master, "cem")
    refused = third.run(*f"remote add origin {server.url} --project board --token {server.token('human:cem')}".split())
    assert refused.returncode == 1 and "nothing was touched" in refused.stderr
    assert sorted(os.listdir(third.lattice_dir)) == sorted(os.listdir(master))
    assert tree_of(server.lattice_dir()) == before


def test_a_push_removes_hooks_locally_and_rescues_the_configuration(
    sandbox: Sandbox, server: Server, master: Path
) -> None:
    """I9."""
    ana = own(sandbox, master)
    add_hooks(ana.lattice_dir)
    ana.add_remote(server, server.token("human:ana", "agent:*"))
    done = ana.run("remote", "push")
    assert done.returncode == 0 and "its hooks were removed" in done.stderr
    assert "hooks" not in json.loads((ana.lattice_dir / "config.json").read_text())
    (kept,) = ana.lattice_dir.glob(".remote/rescued/*/files/config.json")
    assert "hooks" in json.loads(kept.read_text()), "what was here is kept"
    assert not differences(ana.lattice_dir, server.lattice_dir())


def test_a_cut_push_resumes(sandbox: Sandbox, server: Server, master: Path) -> None:
    """I6: client and server are killed at any moment of the push; in the end it has run once."""
    ana = own(sandbox, master)
    (ana.dir / "big.bin").write_bytes(os.urandom(1 << 20) * 24)
    lattice(ana.dir, "attach", "OWN-1", "big.bin", *ANA)
    before = tree_of(ana.lattice_dir)
    ana.add_remote(server, server.token("human:ana", "agent:*"))
    uploads = server.lattice_dir().parent / "uploads"
    pushing = warm().start(
        "lattice", ["remote", "push"], cwd=ana.dir, env=ana.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: any(p.stat().st_size > 1 << 20 for p in uploads.glob("*.part")), "a part of the upload")
    pushing.kill()
    pushing.wait(10)
    [part] = uploads.iterdir()
    had = part.stat().st_size
    assert tree_of(ana.lattice_dir) == before
    server.kill()
    server.start()
    for delay in (0.05, 0.2, 0.5, 0.9):
        pushing = warm().start(
            "lattice",
            ["remote", "push"],
            cwd=ana.dir,
            env=ana.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            pushing.wait(delay)
        except subprocess.TimeoutExpired:
            server.kill()
            server.start()
        pushing.send_signal(signal.SIGINT)
        pushing.wait(60)
        sizes = [path.stat().st_size for path in uploads.iterdir()]
        assert not sizes or sizes[0] >= had, "what had come is kept"
    if not ana.lattice_dir.joinpath("remote.json").exists():
        ana.ok("remote", "push")
    ana.ok("remote", "pull")
    assert tree_of(ana.lattice_dir) == tree_of(server.lattice_dir()) == before
    [entry] = [
        e for e in json.loads(server.admin("log", "board", "--json"))["entries"] if "remote push" in e["command"]
    ]
    assert entry["actor"] == "human:ana"
    assert "all is well" in server.admin("fsck")


def test_removing_the_remote_leaves_a_plain_local_project(sandbox: Sandbox, server: Server, master: Path) -> None:
    server.admin("import", "--from", str(master.parent), "--project", "web")
    ana = sandbox.client("ana")
    ana.add_remote(server, server.token("human:ana", "agent:*", slug="web"), slug="web")
    plan = next((ana.lattice_dir / "plans").glob("task_*.md"))
    server.stop()
    text = plan.read_bytes()
    plan.write_bytes(b"# unsent\n")
    refused = ana.run("remote", "remove", "origin", "--keep-local")
    assert refused.returncode == 1 and "not sent yet" in refused.stderr
    plan.write_bytes(text)
    done = ana.run("remote", "remove", "origin", "--keep-local")
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(ana.lattice_dir)) == sorted(os.listdir(master)), "no trace of ours is left"
    assert tree_of(ana.lattice_dir) == tree_of(master)
    lattice(ana.dir, "comment", "OWN-1", "alone again", *ANA)
    assert "No issues found" in lattice(ana.dir, "doctor")


def test_hooks_of_a_server_do_not_become_local_ones_without_a_request(
    sandbox: Sandbox, server: Server, master: Path
) -> None:
    """I9: plain lattice would run them as shell commands on this machine."""
    copied = sandbox.root / "hooked"
    shutil.copytree(master, copied / ".lattice")
    add_hooks(copied / ".lattice")
    server.admin("import", "--from", str(copied), "--project", "web", "--keep-hooks")
    ana = sandbox.client("ana")
    ana.add_remote(server, server.token("human:ana", slug="web"), slug="web")
    refused = ana.run("remote", "remove", "origin", "--keep-local")
    assert refused.returncode == 1 and "--no-hooks" in refused.stderr
    ana.ok("remote", "remove", "origin", "--keep-local", "--no-hooks")
    assert "hooks" not in json.loads((ana.lattice_dir / "config.json").read_text())
    assert not (ana.lattice_dir / ".remote/rescued").exists()


def test_a_fresh_git_clone_is_filled_or_says_how_to_log_in(sandbox: Sandbox, server: Server, master: Path) -> None:
    server.admin("import", "--from", str(master.parent), "--project", "web")
    token = server.token("human:ana", slug="web")
    ana = sandbox.client("ana")
    git(ana, "init", "-q", "-b", "main")
    ana.add_remote(server, token, slug="web")
    assert git(ana, "status", "--porcelain", "-uall").split() == ["??", ".lattice/remote.json"], "git sees nothing else"
    git(ana, "add", ".")
    git(ana, "commit", "-qm", "the board's address")

    ben = sandbox.client("ben")
    git(ben, "clone", "-q", str(ana.dir), "clone")
    clone = ben.elsewhere(ben.dir / "clone")
    lost = clone.run("list")
    assert lost.returncode == 1 and f"lattice remote login {server.url}" in lost.stderr
    clone.ok("remote", "login", server.url, stdin=token)
    assert "Write the parser" in clone.ok("list"), "the first command fills the copy"
    assert not differences(clone.lattice_dir, server.lattice_dir("web"))
    assert git(clone, "status", "--porcelain", "-uall") == ""


def git(client: Client, *argv: str) -> str:
    identity = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment = {**client.env, **identity, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    done = subprocess.run(["git", *argv], cwd=client.dir, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_renamed_archived_and_deleted_projects_are_reported_to_their_clients(
    sandbox: Sandbox, server: Server, master: Path
) -> None:
    ana = sandbox.client("ana")
    ana.add_remote(server, server.token("human:ana", "agent:*"))
    ana.ok("create", "before", *ANA)
    server.admin("project", "rename", "board", "site")
    lost = ana.run("create", "lost", *ANA)
    assert lost.returncode == 1 and "'board' is now called 'site': lattice remote set-url" in lost.stderr
    ana.ok("remote", "set-url", "origin", server.url, "--project", "site")
    ana.ok("create", "after", *ANA)
    assert not differences(ana.lattice_dir, server.lattice_dir("site"))
    server.admin("project", "archive", "site")
    assert "is archived" in ana.run("create", "no", *ANA).stderr
    assert "before" in ana.ok("list"), "reads go on"
    server.admin("project", "unarchive", "site")
    wait_for(lambda: ana.run("create", "again", *ANA).returncode == 0, "the project to be back")
    with pytest.raises(RuntimeError, match="is in use"):
        server.admin("project", "delete", "site", "--confirm", "site")
    server.admin("project", "archive", "site")
    with pytest.raises(RuntimeError, match="--confirm"):
        server.admin("project", "delete", "site", "--confirm", "board")
    server.admin("project", "delete", "site", "--confirm", "site")
    assert "REMOTE_UNAUTHORIZED" in ana.run("create", "no", *ANA, "--json").stdout
    server.admin("project", "create", "site", "--code", "NEW")
    assert ana.run("create", "no", *ANA).returncode == 1, "who had the old one does not get in"
    assert len(list((server.data / "trash").iterdir())) == 1
    assert "all is well" in server.admin("fsck")


def test_an_export_of_a_busy_project_is_a_snapshot(sandbox: Sandbox, server: Server) -> None:
    """I12."""
    ana = sandbox.client("ana")
    ana.add_remote(server, server.token("human:ana", "agent:*"))
    ana.ok("create", "one", *ANA)
    writers = [
        warm().start(
            "lattice",
            ["create", f"task {number}", *ANA],
            cwd=ana.dir,
            env=ana.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for number in range(12)
    ]
    exported = json.loads(server.admin("export", "board", str(sandbox.root / "out"), "--json"))
    assert all(writer.wait(60) == 0 for writer in writers)
    assert not exported["findings"], exported
    out = sandbox.root / "out"
    assert "No issues found" in lattice(out, "doctor")
    assert len(json.loads(lattice(out, "list", "--json"))["data"]) == exported["tasks"] >= 1
    titles = [line.split('"')[1] for line in ana.ok("list").splitlines()]
    assert {line.split('"')[1] for line in lattice(out, "list").splitlines()} <= set(titles)
    lattice(out, "create", "on its own now", *ANA)
