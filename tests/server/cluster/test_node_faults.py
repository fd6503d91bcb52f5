"""Nodes of a cluster that reach each other through proxies: partitions, and leases that are lost during writes."""

from collections.abc import Iterator

import pytest
from cluster_nodes import RunningCluster, running_cluster
from nats_servers import NatsCluster, nats_cluster

from cluster_faults import Account, edit_beside, lose_lease, owner_with_minority


@pytest.fixture(scope="module")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsCluster]:
    with nats_cluster(3, tmp_path_factory.mktemp("nats"), proxied=True) as servers:
        yield servers


@pytest.fixture(scope="module")
def cluster(nats: NatsCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    with running_cluster(nats, tmp_path_factory.mktemp("nodes"), proxied=True) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def account(cluster: RunningCluster) -> Account:
    return Account(cluster)


def test_an_owner_with_a_minority_acknowledges_nothing_and_refuses_reads(
    nats: NatsCluster, cluster: RunningCluster, account: Account
) -> None:
    owner_with_minority(nats, cluster, account)


@pytest.mark.parametrize(("count", "kill_worker"), [(1, True), (64, False)])
def test_a_lost_lease_leaves_each_unacknowledged_command_once(
    nats: NatsCluster, cluster: RunningCluster, account: Account, count: int, *, kill_worker: bool
) -> None:
    lose_lease(nats, cluster, account, count=count, kill_worker=kill_worker)


def test_commands_whose_acknowledgement_by_the_engine_is_lost_are_there_once(
    nats: NatsCluster, cluster: RunningCluster, account: Account
) -> None:
    lose_lease(nats, cluster, account, count=16, answers_only=True, kill_worker=True)


def test_only_the_owners_edits_are_numbered_also_around_a_takeover(
    nats: NatsCluster, cluster: RunningCluster, account: Account
) -> None:
    edit_beside(nats, cluster, account)
