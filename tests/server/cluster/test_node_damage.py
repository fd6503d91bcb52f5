"""Damaged order as clients of the nodes see it: a refusal with advice, and nothing lost after a rebuild."""

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import requests
from cluster_nodes import RunningCluster, running_cluster, wait_until
from nats_servers import NatsCluster, nats_cluster
from server_process import children_of

from lattice_remote.server.cluster.engine import Engine
from lattice_remote.server.cluster.jetstream import StreamInfo
from lattice_remote.server.cluster.member import load_cursors
from lattice_remote.server.cluster.order import JetStreamOrder


@pytest.fixture(scope="module")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsCluster]:
    with nats_cluster(1, tmp_path_factory.mktemp("nats")) as servers:
        yield servers


@pytest.fixture(scope="module")
def cluster(nats: NatsCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    with running_cluster(nats, tmp_path_factory.mktemp("nodes"), "ab") as nodes:
        yield nodes


def with_order[T](cluster: RunningCluster, work: Callable[[Engine, JetStreamOrder], Awaitable[T]]) -> T:
    """Return the result of work on the project's order, with a connection of its own."""

    async def connected() -> T:
        engine = await Engine.connect(cluster.engine_urls, node="damage", replicas=1)
        try:
            return await work(engine, JetStreamOrder(engine, "web", cluster.position(cluster.names[0])[0]))
        finally:
            await engine.close()

    return asyncio.run(connected())


def delete(nats: NatsCluster, cluster: RunningCluster) -> None:
    del nats
    with_order(cluster, lambda engine, order: engine.delete_stream(order.name))


def write_foreign(nats: NatsCluster, cluster: RunningCluster) -> None:
    del nats
    with_order(cluster, lambda engine, order: engine.publish(f"{order.subject}.log", b"not ours"))


@contextmanager
def restored_from_older(nats: NatsCluster) -> Iterator[None]:
    """Restore the engine's files after the block to their state before it."""
    server = nats.servers[0]
    backup = server.directory.with_name("backup")
    server.stop()
    shutil.copytree(server.directory / "js", backup)
    server.start()
    yield
    server.stop()
    shutil.rmtree(server.directory / "js")
    backup.rename(server.directory / "js")
    server.start()


def restore_older(nats: NatsCluster, cluster: RunningCluster) -> None:
    cluster.nodes["b"].end()
    with restored_from_older(nats):
        for number in range(3):
            assert cluster.write("a", f"without b {number}").status_code == 201
    cluster.start("b")  # it agrees with the older order, and must not go on from there


DAMAGES = [delete, write_foreign, restore_older]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_order_is_refused_on_all_nodes_until_it_is_rebuilt(
    nats: NatsCluster, cluster: RunningCluster, damage: Callable[[NatsCluster, RunningCluster], None]
) -> None:
    assert cluster.write("b", f"before {damage.__name__}").status_code == 201
    wait_until(cluster.agree, "the nodes agree")
    epoch = cluster.position("a")[0]
    damage(nats, cluster)
    for name in "ab":
        wait_until(lambda name=name: is_refused(cluster, name, f"unwritten {damage.__name__}"), f"node {name} refuses")
    titles = titles_on(cluster, "a") | titles_on(cluster, "b")
    assert f"before {damage.__name__}" in titles
    most = max("ab", key=lambda name: len(titles_on(cluster, name)))
    cluster.command(most, "cluster", "rebuild", "web", "--yes")
    assert cluster.write("a", f"after {damage.__name__}").status_code == 201
    assert cluster.write("b", f"after {damage.__name__} too").status_code == 201
    wait_until(cluster.agree, "the nodes agree again")
    assert cluster.position("a")[0] not in ("", epoch)
    assert titles_on(cluster, "b") == titles | {f"after {damage.__name__}", f"after {damage.__name__} too"}


def test_a_node_with_changes_that_a_restored_order_lacks_stops_the_others_when_it_is_back(
    nats: NatsCluster, cluster: RunningCluster
) -> None:
    cluster.nodes["b"].end()
    with restored_from_older(nats):
        assert cluster.write("a", "without b").status_code == 201
        last = with_order(cluster, lambda engine, order: order.bounds())[1]
        journal = cluster.nodes["a"].data.project("web").journal
        wait_until(lambda: load_cursors(journal)[-1].seq == last, "node a notes the change")
        cluster.kill("a")
    cluster.start("b")
    assert cluster.write("b", "without a").status_code == 201
    cluster.start("a")
    wait_until(lambda: "node a reports: " in cluster.ask("b", "GET", "").text, "node b refuses")
    for name in "ab":
        wait_until(lambda name=name: is_refused(cluster, name, "unwritten"), f"node {name} refuses")
    cluster.command("a", "cluster", "rebuild", "web", "--yes")
    assert cluster.write("b", "after both").status_code == 201
    wait_until(cluster.agree, "the nodes agree again")
    assert {"without b", "after both"} <= titles_on(cluster, "b")


def is_refused(cluster: RunningCluster, name: str, title: str) -> bool:
    read = cluster.ask(name, "GET", "")
    written = cluster.ask(name, "POST", "/tasks", json={"title": title}, headers={"Idempotency-Key": title})
    assert written.status_code != 201, "a write was acknowledged without the order"
    return all(
        answer.status_code == 503 and "lattice-remote cluster rebuild web" in answer.json()["error"]["message"]
        for answer in (read, written)
    )


def titles_on(cluster: RunningCluster, name: str) -> set[str]:
    return {json.loads(path.read_bytes())["title"] for path in (cluster.tree(name) / "tasks").glob("*.json")}


def limit_stream(cluster: RunningCluster, free_bytes: int | None, name: str = "") -> None:
    """Limit a stream, by default the order, to this much free space; None removes the limit."""

    async def work(engine: Engine, order: JetStreamOrder) -> None:
        info = await engine.stream_info(name or order.name)
        limit = -1 if free_bytes is None else info.state.bytes + free_bytes
        await engine.api(f"STREAM.UPDATE.{name or order.name}", StreamInfo, {**info.config, "max_bytes": limit})

    with_order(cluster, work)


def test_a_full_order_refuses_writes_and_goes_on_with_more_room(cluster: RunningCluster) -> None:
    assert cluster.write("b", "before the order is full").status_code == 201
    limit_stream(cluster, 200)
    title = "into a full order"
    wait_until(lambda: is_full(cluster, "b", title), "the write is refused with the reason", 240)
    wait_until(lambda: cluster.is_open("a") and cluster.is_open("b"), "reads go on")
    limit_stream(cluster, None)
    assert cluster.write("a", "with more room").status_code == 201
    wait_until(cluster.agree, "the nodes agree")
    titles = titles_on(cluster, "b")
    assert {"before the order is full", "with more room"} <= titles
    assert title not in titles


def is_full(cluster: RunningCluster, name: str, title: str) -> bool:
    url = f"http://127.0.0.1:{cluster.nodes[name].port}/projects/web/tasks"
    headers = {"Idempotency-Key": title}
    answer = cluster.sessions[name].post(url, json={"title": title}, headers=headers, timeout=120)
    assert answer.status_code == 503, answer.text
    return "cannot store more: maximum bytes exceeded" in answer.text


@pytest.mark.parametrize("size", [300_000, 3_000_000])
def test_a_change_without_room_for_its_content_is_refused_alone(cluster: RunningCluster, size: int) -> None:
    title = f"{size} bytes"
    task = cluster.write("b", title).json()["data"]["id"]
    assert write_plan(cluster, task, "a" * size).ok  # the stream of contents is there
    limit_stream(cluster, 100, "lattice-contents")
    wait_until(lambda: "cannot store more" in write_plan(cluster, task, "b" * size).text, "the write is refused", 240)
    assert cluster.write("a", f"beside {title}").status_code == 201
    plan = cluster.tree("a") / f"plans/{task}.md"
    assert plan.read_text() == "a" * size
    limit_stream(cluster, None, "lattice-contents")
    wait_until(lambda: write_plan(cluster, task, "c" * size).ok, "the write is done with more room")
    wait_until(cluster.agree, "the nodes agree")
    assert plan.read_text() == "c" * size


def write_plan(cluster: RunningCluster, task: str, text: str, node: str = "b") -> requests.Response:
    url = f"http://127.0.0.1:{cluster.nodes[node].port}/projects/web/plans/{task}"
    headers = {"If-Match": "*", "Content-Type": "text/markdown"}
    return cluster.sessions[node].put(url, data=text, headers=headers, timeout=120)


def test_large_contents_that_change_again_at_once_reach_every_node(cluster: RunningCluster) -> None:
    task = cluster.write("b", "changed at once").json()["data"]["id"]
    url = f"http://127.0.0.1:{cluster.nodes['b'].port}/projects/web/tasks/{task}/comments"
    headers = dict(cluster.sessions["b"].headers)
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(
                lambda letter: requests.post(url, json={"body": letter * 300_000}, headers=headers, timeout=120),
                "abcdefgh",
            )
        )
    assert {answer.status_code for answer in answers} == {201}, [answer.text[:200] for answer in answers]
    wait_until(cluster.agree, "the nodes agree")
    for node in cluster.nodes.values():
        assert "follow ended" not in (node.data.path.parent / "log").read_text()
        contents = node.data.project("web").root / "contents"
        wait_until(lambda contents=contents: not any(contents.glob("*")), "the fetched contents are removed")


def test_changes_wait_for_the_next_worker_of_a_node_where_it_has_ended(cluster: RunningCluster) -> None:
    assert cluster.write("a", "before the worker ends").status_code == 201
    wait_until(cluster.agree, "the nodes agree")
    owner = cluster.owner()
    follower = "ab".replace(owner, "")
    log = cluster.nodes[follower].data.path.parent / "log"
    size = log.stat().st_size
    workers = children_of(cluster.nodes[follower], b"worker.main")
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    for number in range(5):
        assert cluster.write(owner, f"without a worker {number}").status_code == 201
    wait_until(cluster.agree, "the nodes agree")
    assert "follow ended" not in log.read_bytes()[size:].decode()


def test_a_content_that_the_cluster_lacks_is_copied_from_a_node(cluster: RunningCluster) -> None:
    task = cluster.write("b", "a content of yesterday").json()["data"]["id"]
    assert write_plan(cluster, task, "[ ] " * 100_000).ok
    wait_until(cluster.agree, "the nodes agree")
    absent = "a" if cluster.owner() == "b" else "b"
    cluster.nodes[absent].end()
    cluster.names = "ab".replace(absent, "")
    assert write_plan(cluster, task, "[x] " * 100_000, cluster.names).ok
    with_order(cluster, lambda engine, order: engine.purge("lattice-contents"))
    cluster.start(absent)
    cluster.names = "ab"
    wait_until(cluster.agree, "the nodes agree")
    assert (cluster.tree(absent) / f"plans/{task}.md").read_text() == "[x] " * 100_000
