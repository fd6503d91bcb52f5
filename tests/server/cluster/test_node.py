"""A cluster of real nodes on real NATS servers: one order, wherever the owner is."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_nodes import RunningCluster, running_cluster, wait_until
from harness import tree_of
from nats_servers import NatsCluster, nats_cluster


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[NatsCluster]:
    """One server without anything."""
    with nats_cluster(1, tmp_path / "nats") as servers:
        yield servers


def equal_trees(cluster: RunningCluster, names: str) -> bool:
    trees = [tree_of(cluster.tree(name)) for name in names]
    return all(tree == trees[0] for tree in trees) and len({cluster.head(name) for name in names}) == 1


def test_a_write_through_any_node_is_on_all(nats: NatsCluster, tmp_path: Path) -> None:
    with running_cluster(nats, tmp_path) as cluster:
        for name in "abcabc":
            assert cluster.write(name, f"by {name}", key=f"{name}{cluster.head(name)}").status_code == 201
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
