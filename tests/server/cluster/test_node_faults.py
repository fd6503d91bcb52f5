"""Nodes of a cluster that reach each other through proxies: partitions, and leases that are lost during writes."""

from collections.abc import Iterator

import pytest
from cluster_nodes import RunningCluster, running_cluster
from nats_servers import NatsCluster, nats_cluster

from cluster_faults import Account, owner_with_minority


@pytest.fixture(scope="module")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsCluster]:
    with nats_cluster(3, tmp_path_factory.mktemp("nats"), proxied=True) as servers:
        yield servers


@pytest.fixture(scope="module")
def cluster(nats: NatsCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    with running_cluster(nats, tmp_path_factory.mktemp("nodes"), proxied=True) as nodes:
        yield nodes


def test_an_owner_with_a_minority_acknowledges_nothing_and_refuses_reads(
    nats: NatsCluster, cluster: RunningCluster
) -> None:
    owner_with_minority(nats, cluster, Account(cluster))
