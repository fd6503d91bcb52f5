"""Projects of a cluster: created, renamed, archived, deleted and imported on one node, for all nodes."""

import asyncio
import json
import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import requests
from cluster_nodes import RunningCluster, running_cluster, wait_until
from harness import Copy, tree_of, upload
from nats_servers import nats_cluster
from server_process import COMMAND, children_of
from test_server import make_data
from typer.testing import CliRunner

from lattice_remote.errors import Misuse
from lattice_remote.protocol.messages import Push, Pushed, Refused
from lattice_remote.server.cli import app
from lattice_remote.server.cluster import shared_projects
from lattice_remote.server.cluster.directory import ClusterDirectory
from lattice_remote.server.cluster.engine import Engine
from lattice_remote.server.cluster.settings import ClusterSettings
from lattice_remote.server.datadir import DataDir
from sample_projects import pack_of, sample_project


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """Nodes a and b on one NATS server."""
    with (
        nats_cluster(1, tmp_path_factory.mktemp("nats")) as nats,
        running_cluster(nats, tmp_path_factory.mktemp("nodes"), "ab") as nodes,
    ):
        yield nodes


@pytest.fixture
def owner(cluster: RunningCluster) -> str:
    """The node that owns web, as both nodes know."""
    owners: set[str] = set()

    def is_known() -> bool:
        webs = [web_on(cluster, node) for node in "ab"]
        owners.clear()
        owners.update(web["owner"] for web in webs)
        return len(owners) == 1 and [web["role"] for web in webs].count("owner") == 1

    wait_until(is_known, "web has an owner")
    return owners.pop()


def web_on(cluster: RunningCluster, node: str) -> dict[str, str]:
    """Return the status of web on a node, without the engine."""
    status = json.loads(cluster.command(node, "status", "--json"))
    return dict(next(project for project in status["projects"] if project["slug"] == "web"))


def make_token(cluster: RunningCluster, slug: str) -> str:
    made = cluster.command("a", "token", "create", "--project", slug, "--actor", "human:ana", "--json")
    return str(json.loads(made)["token"])


def ask(cluster: RunningCluster, node: str, token: str, path: str, **body: str) -> requests.Response:
    url = f"http://127.0.0.1:{cluster.nodes[node].port}/projects/{path}"
    headers = {"Authorization": f"Bearer {token}"}
    return requests.request("POST" if body else "GET", url, headers=headers, json=body or None, timeout=30)


def is_served(cluster: RunningCluster, node: str, token: str, slug: str) -> bool:
    return ask(cluster, node, token, slug).status_code == 200


def write(cluster: RunningCluster, node: str, token: str, slug: str, title: str) -> None:
    """Create a task, once the node knows the token and has the project."""
    answers: list[requests.Response] = []

    def is_done() -> bool:
        answers.append(ask(cluster, node, token, f"{slug}/tasks", title=title))
        return answers[-1].status_code == 201

    wait_until(is_done, f"{title} is written through {node}")


def root_of(cluster: RunningCluster, node: str, slug: str, place: str = "projects") -> Path:
    return cluster.nodes[node].data.path / place / slug


def test_a_project_of_one_node_is_on_all_and_its_name_is_taken(cluster: RunningCluster) -> None:
    cluster.command("b", "project", "create", "made", "--code", "MAD")
    token = make_token(cluster, "made")
    write(cluster, "a", token, "made", "one")
    for node in "ab":
        assert "already exists" in cluster.command(node, "project", "create", "made", code=1)
    wait_until(
        lambda: (
            tree_of(cluster.nodes["a"].data.project("made").lattice)
            == tree_of(cluster.nodes["b"].data.project("made").lattice)
        ),
        "the nodes agree",
    )


def test_a_node_shows_its_role(cluster: RunningCluster, owner: str) -> None:
    roles = {node: web_on(cluster, node)["role"] for node in "ab"}
    assert roles == {"a": "follower", "b": "follower"} | {owner: "owner"}


def test_a_second_server_under_the_name_of_a_node_is_refused(cluster: RunningCluster, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    known = cluster.nodes["a"].data.path / "cluster.json"
    settings = json.loads(known.read_bytes())
    (data.path / "cluster.json").write_text(json.dumps({**settings, "directory": "another"}))
    start = [*COMMAND, "--data", str(data.path), "start", "--port", "0"]
    done = subprocess.run(start, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "node 'a' runs already" in done.stderr
    (data.path / "cluster.json").write_text(json.dumps({**settings, "node": "z", "cluster": "another"}))
    for argv in (("project", "archive", "web"), ("token", "create", "--project", "web", "--actor", "human:ben")):
        refused = CliRunner().invoke(app, ["--data", str(data.path), *argv])
        assert isinstance(refused.exception, Misuse)
        assert "belongs to another cluster" in refused.exception.message
    assert CliRunner().invoke(app, ["--data", str(data.path), "cluster", "status"]).exit_code == 1


@pytest.mark.parametrize(
    ("servers", "advertise", "why"),
    [
        (["localhost:4222"], "https://a", "expected for example nats://HOST:4222"),
        ([], "https://a", "name the NATS servers"),
        (["nats://n1:4222"], "a.example", "expected this node's address"),
        (["nats://n1:4222"], "http://0.0.0.0:8443", "--advertise https://HOST"),
    ],
)
def test_addresses_that_reach_no_server_are_refused(servers: list[str], advertise: str, why: str) -> None:
    with pytest.raises(Misuse, match=why):
        ClusterSettings(servers, "a", advertise).check()


def test_an_option_of_a_node_without_a_cluster_is_refused(tmp_path: Path) -> None:
    data = DataDir(tmp_path / "data")
    data.create()
    start = [*COMMAND, "--data", str(data.path), "start", "--port", "0", "--node", "a"]
    done = subprocess.run(start, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "name its NATS servers with --cluster" in done.stderr


def test_an_interrupted_creation_is_finished_by_the_node(
    cluster: RunningCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shared_projects, "place_parked", interrupt)
        cluster.command("b", "project", "create", "interrupted", code=130)
    for node in "ab":
        wait_until((root_of(cluster, node, "interrupted") / ".lattice").is_dir, f"{node} has the project")


def test_a_directory_with_the_name_of_a_project_is_neither_served_nor_replaced(cluster: RunningCluster) -> None:
    cluster.command("b", "project", "create", "known", "--code", "KNO")
    stranger = root_of(cluster, "a", "known")
    wait_until((stranger / ".lattice").is_dir, "a has a copy")
    before = stranger.with_name("mine")
    # A stopped node gets a directory of that name, as from a backup.
    cluster.nodes["a"].end()
    shutil.move(stranger, before)
    shutil.copytree(before / ".lattice", stranger / ".lattice")
    shutil.rmtree(before)
    files = tree_of(stranger / ".lattice")
    assert "the cluster has another project 'known'" in cluster.refused_start("a")
    assert tree_of(stranger / ".lattice") == files
    shutil.rmtree(stranger)
    cluster.start("a")
    wait_until((stranger / ".lattice").is_dir, "a copies the project again")


def test_a_renamed_project_keeps_its_numbers_and_its_tokens_follow(cluster: RunningCluster) -> None:
    cluster.command("a", "project", "create", "old-name", "--code", "OLD")
    token = make_token(cluster, "old-name")
    write(cluster, "a", token, "old-name", "one")
    before = ask(cluster, "a", token, "old-name").json()
    assert "1 token updated" in cluster.command("b", "project", "rename", "old-name", "new-name")
    for node in "ab":
        wait_until(lambda node=node: is_served(cluster, node, token, "new-name"), f"{node} has the new name")
        after = ask(cluster, node, token, "new-name").json()
        assert (after["epoch"], after["head"]) == (before["epoch"], before["head"])
        gone = ask(cluster, node, token, "old-name")
        assert gone.status_code == 404
        assert "is now called 'new-name'" in gone.text
        assert not root_of(cluster, node, "old-name").exists()
    write(cluster, "b", token, "new-name", "two")
    assert "no project 'old-name'" in cluster.command("a", "project", "rename", "old-name", "other", code=1)
    cluster.command("a", "project", "create", "old-name", "--code", "OLD")
    assert is_served(cluster, "b", token, "new-name"), "the name is free for another project"


def test_an_archived_project_comes_back_and_a_deleted_one_does_not(cluster: RunningCluster) -> None:
    cluster.command("a", "project", "create", "past", "--code", "PAS")
    token = make_token(cluster, "past")
    write(cluster, "b", token, "past", "one")
    assert "is in use" in cluster.command("b", "project", "delete", "past", "--confirm", "past", code=1)
    cluster.command("b", "project", "archive", "past")
    for node in "ab":
        wait_until(root_of(cluster, node, "past", "archived").is_dir, f"{node} archives it")
        assert ask(cluster, node, token, "past").status_code == 404
    assert "is archived" in cluster.command("a", "project", "create", "past", code=1)
    cluster.command("a", "project", "unarchive", "past")
    write(cluster, "a", token, "past", "two")
    cluster.command("a", "project", "archive", "past")
    wait_until(root_of(cluster, "b", "past", "archived").is_dir, "b archives it")
    deleted = cluster.command("b", "project", "delete", "past", "--confirm", "past")
    assert "1 token lost it" in deleted
    for node in "ab":
        trashed = root_of(cluster, node, "", "trash")
        wait_until(lambda trashed=trashed: [*trashed.glob("past-*")], f"{node} deletes it")
        assert not root_of(cluster, node, "past", "archived").exists()
        [trash] = trashed.glob("past-*")
        assert len(list((trash / ".lattice/tasks").glob("*.json"))) == 2
    wait_until(lambda: ask(cluster, "a", token, "past").status_code == 401, "its token is revoked")


def test_an_imported_project_is_on_all_nodes(cluster: RunningCluster, tmp_path: Path) -> None:
    source = sample_project(tmp_path)
    assert "is imported under a new name" in cluster.command(
        "b", "import", "--from", source, "--project", "web", code=1
    )
    assert "Imported imported: 2 tasks" in cluster.command("b", "import", "--from", source, "--project", "imported")
    for node in "ab":
        wait_until(
            lambda node=node: tree_of(root_of(cluster, node, "imported") / ".lattice") == tree_of(source),
            f"{node} has the project",
        )


def test_a_returning_node_applies_all_changes_of_projects(cluster: RunningCluster) -> None:
    for slug in ("first", "second"):
        cluster.command("b", "project", "create", slug)
    ids = {slug: name_in(root_of(cluster, "b", slug)) for slug in ("first", "second")}
    cluster.kill("b")
    for argv in (
        ("rename", "first", "between"),
        ("rename", "second", "first"),
        ("rename", "between", "third"),
        ("archive", "first"),
    ):
        cluster.command("a", "project", *argv)
    refused = cluster.command("b", "token", "create", "--project", "fourth", "--actor", "human:ana", code=None)
    assert "the cluster has no project 'fourth'; it has: first, " in refused
    cluster.command("b", "token", "create", "--project", "third", "--actor", "human:ana")  # it is not here yet
    cluster.command("a", "project", "rename", "third", "second")
    cluster.start("b")
    assert name_in(root_of(cluster, "b", "second")) == ids["first"]
    assert name_in(root_of(cluster, "b", "first", "archived")) == ids["second"]
    cluster.command("b", "project", "unarchive", "first")
    wait_until(root_of(cluster, "a", "first").is_dir, "a has it again")
    write(cluster, "b", make_token(cluster, "first"), "first", "one")


def name_in(root: Path) -> str:
    return str(json.loads((root / ".lattice/config.json").read_bytes())["project_name"])


async def lose_catalogue(cluster: RunningCluster) -> None:
    """Remove the catalogue, and restore it once each node has looked twice."""
    engine = await Engine.connect(cluster.nats_urls, node="test", replicas=1)
    bucket, directory = await engine.kv("lattice-directory"), await ClusterDirectory.open(engine)
    before = await bucket.get("catalogue")
    assert before is not None
    await bucket.delete("catalogue")
    for _ in range(2):
        reported = {name: node.at for name, node in (await directory.nodes()).items()}
        async with asyncio.timeout(60):
            while any(node.at == reported[name] for name, node in (await directory.nodes()).items()):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
    answers = [cluster.ask(node, "GET", "").status_code for node in "ab"]
    await bucket.put("catalogue", before.value)
    await engine.close()
    assert answers == [200, 200]


def test_without_the_catalogue_the_projects_go_on(cluster: RunningCluster, owner: str) -> None:
    assert owner in "ab"
    asyncio.run(lose_catalogue(cluster))


async def ask_for_push(cluster: RunningCluster, node: str, request: Push) -> Pushed | Refused:
    async with cluster.nodes[node].connected(cluster.token) as socket:
        copy = Copy(follow=False)
        await copy.greet(socket)
        await copy.send(request)
        answer = await copy.answer(request.id)
        assert isinstance(answer, Pushed | Refused)
        return answer


async def test_a_project_is_pushed_through_any_node_as_one_change(
    cluster: RunningCluster, owner: str, tmp_path: Path
) -> None:
    """I2, I3, I6."""
    own = tree_of(sample_project(tmp_path))
    other = "b" if owner == "a" else "a"
    follower = Copy()
    async with (
        cluster.nodes[owner].connected(cluster.token) as socket,
        cluster.nodes[other].connected(cluster.token) as own_socket,
    ):
        await follower.greet(socket)
        await follower.sync()
        epoch, before = follower.replica.position.epoch, follower.replica.position.seq
        copy = Copy(follow=False)
        await copy.greet(own_socket)
        request = await upload(copy, pack_of(own))
        await copy.send(request)
        pushed = await copy.answer(request.id)
        assert isinstance(pushed, Pushed), pushed
        assert (pushed.tasks, pushed.archived, pushed.files, pushed.notes) == (2, 1, len(own), [])
        while follower.replica.position.seq < pushed.seq:
            await follower.pump()
        await follower.sync()
        assert follower.tree == own
        assert (follower.replica.position.epoch, pushed.seq) == (epoch, before + 1)
    for node in "ab":
        wait_until(lambda node=node: tree_of(cluster.tree(node)) == own, f"{node} has the project")
        assert await ask_for_push(cluster, node, request) == pushed, "a repeated push gets its reply"
    refused = await ask_for_push(cluster, owner, Push(secrets.token_hex(16), request.digest, request.size))
    assert isinstance(refused, Refused)
    assert "has 3 tasks" in refused.message


def test_a_lagging_node_reads_changes_just_acknowledged_by_another(cluster: RunningCluster, owner: str) -> None:
    other = "ab".replace(owner, "")
    assert cluster.ask(other, "GET", "/tasks/none").status_code == 422  # its reader has started
    workers = children_of(cluster.nodes[other], b"worker.main")
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    try:
        task = cluster.write(owner, "seen by the owner alone").json()["data"]["id"]
        with ThreadPoolExecutor(2) as pool:
            requested = [
                pool.submit(cluster.ask, other, "GET", f"/tasks/{task}"),
                pool.submit(cluster.ask, other, "PUT", f"/plans/{task}", data="# Plan", headers={"If-Match": "*"}),
            ]
            wait(requested, timeout=0.5)  # an answer from the files here comes at once
            for worker in workers:
                os.kill(worker, signal.SIGCONT)
            answers = [each.result() for each in requested]
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGCONT)
    assert [answer.status_code for answer in answers] == [200, 200], [answer.text for answer in answers]
