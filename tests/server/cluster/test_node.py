"""A cluster of real nodes on real NATS servers: one order, wherever the owner is."""

import asyncio
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_nodes import RunningCluster, running_cluster, wait_until
from harness import tree_of
from nats_servers import NatsCluster, nats_cluster
from server_process import COMMAND, Process
from test_server import make_data, make_token

from memory_client import MemoryClient


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[NatsCluster]:
    """One empty server."""
    with nats_cluster(1, tmp_path / "nats") as servers:
        yield servers


def equal_trees(cluster: RunningCluster, names: str) -> bool:
    trees = [tree_of(cluster.tree(name)) for name in names]
    return all(tree == trees[0] for tree in trees) and len({cluster.head(name) for name in names}) == 1


def test_a_write_through_any_node_is_on_all(nats: NatsCluster, tmp_path: Path) -> None:
    with running_cluster(nats, tmp_path) as cluster:
        for name in "abcabc":
            assert cluster.write(name, f"by {name}", key=f"{name}{cluster.position(name)}").status_code == 201
        wait_until(lambda: equal_trees(cluster, "abc"), "the nodes agree")
        assert len(list((cluster.tree("b") / "tasks").glob("*.json"))) == 6


def test_a_killed_owner_is_replaced(nats: NatsCluster, tmp_path: Path) -> None:
    with running_cluster(nats, tmp_path) as cluster:
        assert cluster.write("a", "before").status_code == 201
        cluster.kill("a")
        assert cluster.write("b", "without a").status_code == 201
        assert cluster.write("c", "before", key="k-before").status_code == 201, "a repeated request gets its reply"
        cluster.start("a")
        wait_until(lambda: cluster.is_open("a") and equal_trees(cluster, "abc"), "the nodes agree")
        assert len(list((cluster.tree("a") / "tasks").glob("*.json"))) == 2


def command(cluster: RunningCluster, name: str, *argv: str, code: int = 0) -> str:
    """Run an administrator's command on a node's data directory."""
    data = cluster.nodes[name].data.path
    done = subprocess.run([*COMMAND, "--data", data, *argv], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def status(cluster: RunningCluster, name: str, code: int = 0) -> dict[str, Any]:
    return dict(json.loads(command(cluster, name, "cluster", "status", "--json", code=code)))


def test_a_project_moves_and_leaves_with_its_numbers(nats: NatsCluster, tmp_path: Path) -> None:
    data = make_data(tmp_path / "a/data")
    token = make_token(data)
    single = Process(data)
    cache = followed(single, token)
    single.end()
    with running_cluster(nats, tmp_path, "ab") as cluster:
        assert cluster.write("b", "one").status_code == 201
        cache = followed(cluster.nodes["a"], token, cache)
        assert status(cluster, "b")["projects"][0]["owner"] == "a"
        assert "Node b owns web." in command(cluster, "a", "cluster", "move", "web", "b")
        found = status(cluster, "a")
        assert (found["projects"][0]["owner"], [node["name"] for node in found["nodes"]]) == ("b", ["a", "b"])
        assert cluster.write("a", "two").status_code == 201
        cache = followed(cluster.nodes["b"], token, cache)
        assert "no node 'x' runs in this cluster; these do: a, b" in command(
            cluster, "a", "cluster", "move", "web", "x", code=1
        )
        wait_until(lambda: equal_trees(cluster, "ab"), "the nodes agree")
        before = cluster.position("b")
        cluster.nodes["a"].end()
        assert "another server" in command(cluster, "b", "cluster", "leave", code=1)
        cluster.nodes["b"].end()
        wait_until(lambda: "Node b has left" in leave(cluster, "b"), "node a is known to be gone")
        alone = Process(cluster.nodes["b"].data)
        cluster.nodes["b"] = alone
        assert cluster.position("b") == before, "epoch and number stay"
        assert cluster.write("b", "three").status_code == 201
        cache = followed(alone, token, cache)
        assert cache.files == tree_of(cluster.tree("b"))
        stale = subprocess.run(
            [*COMMAND, "--data", cluster.nodes["a"].data.path, "start", "--port", "0"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert stale.returncode == 1
        assert "taken project 'web' out of the cluster" in stale.stderr


def followed(server: Process, token: str, after: MemoryClient | None = None) -> MemoryClient:
    """Return a cache that has caught up with a server; one that continues ``after`` another fetches no file again."""

    async def follow() -> MemoryClient:
        cache = MemoryClient(f"http://127.0.0.1:{server.port}", token, slug="web", after=after)
        cache.start()
        await cache.current(after.replica.position.seq + 1 if after is not None else 0)
        await cache.close()
        return cache

    cache = asyncio.run(follow())
    assert cache.resyncs == (after is None), "the cache was compared as a whole"
    return cache


def leave(cluster: RunningCluster, name: str) -> str:
    data = cluster.nodes[name].data.path
    argv = [*COMMAND, "--data", data, "cluster", "leave"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout + done.stderr


def test_a_token_revoked_on_one_node_ends_on_all(nats: NatsCluster, tmp_path: Path) -> None:
    with running_cluster(nats, tmp_path, "ab") as cluster:
        made = command(cluster, "b", "token", "create", "--project", "web", "--actor", "human:ben")
        token = next(word for word in made.split() if word.startswith("ltr_"))
        cluster.sessions["a"].headers["Authorization"] = f"Bearer {token}"
        wait_until(lambda: cluster.is_open("a"), "a knows the token")
        command(cluster, "a", "token", "revoke", token)
        cluster.sessions["b"].headers["Authorization"] = f"Bearer {token}"
        wait_until(lambda: cluster.ask("b", "GET", "").status_code == 401, "b refuses the token")


def test_a_rebuilt_project_goes_on_with_the_files_of_one_node(nats: NatsCluster, tmp_path: Path) -> None:
    with running_cluster(nats, tmp_path, "ab") as cluster:
        assert cluster.write("a", "one").status_code == 201
        wait_until(lambda: equal_trees(cluster, "ab"), "the nodes agree")
        epoch = cluster.position("a")[0]
        assert "with the files of node b" in command(cluster, "b", "cluster", "rebuild", "web", "--yes")
        assert cluster.write("a", "two").status_code == 201
        assert cluster.write("b", "three").status_code == 201
        wait_until(lambda: equal_trees(cluster, "ab"), "the nodes agree again")
        assert cluster.position("a")[0] not in ("", epoch)
        assert len(list((cluster.tree("a") / "tasks").glob("*.json"))) == 3
