"""Power cut of all servers of the engine, on file system images that keep only synced data."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_nodes import running_cluster, wait_until
from nats_servers import NatsCluster, nats_cluster
from test_node_damage import is_refused

from cluster_faults import Account
from power_cut import make_image, mounted


class Disks:
    """A file system for each server; only fsync writes to its disk."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self._directory = directory
        self._mounts = stack.enter_context(contextlib.ExitStack())
        self.stores = [directory / f"store{number}" for number in range(3)]
        for number, store in enumerate(self.stores):
            make_image(self._image(number))
            self._mounts.enter_context(mounted(self._image(number), store, "commit=600"))

    def _image(self, number: int, cuts: int = 0) -> Path:
        return self._directory / f"image{number}.{cuts}"

    def keep(self, nats: NatsCluster) -> None:
        """Keep the disks as they are now for the next cut.

        The kernel may write at any time, for example when another program syncs all file systems.
        """
        for server in nats.servers:
            server.pause()
        os.sync()
        self._copy()
        for server in nats.servers:
            server.resume()

    def cut(self, nats: NatsCluster) -> None:
        """Stop all servers at once, with the contents of their disks now or at ``keep()``."""
        for server in nats.servers:
            server.pause()
        if not self._image(0, 1).exists():
            self._copy()
        nats.kill_all()
        self._mounts.close()
        for number, store in enumerate(self.stores):
            self._mounts.enter_context(mounted(self._image(number, 1), store, "commit=600"))

    def _copy(self) -> None:
        for number in range(3):
            shutil.copyfile(self._image(number), self._image(number, 1))


@contextlib.contextmanager
def on_disks(directory: Path, sync: str | None) -> Iterator[tuple[Disks, NatsCluster]]:
    """Run three servers, each on a file system of its own."""
    with contextlib.ExitStack() as stack:
        try:
            disks = Disks(directory, stack)
        except OSError as error:
            pytest.skip(f"needs root's rights and loop devices: {error}")
        stores = [store / "js" for store in disks.stores]
        yield disks, stack.enter_context(nats_cluster(3, directory / "nats", sync=sync, max_file="40MB", stores=stores))


def test_with_sync_always_a_power_cut_of_all_servers_loses_nothing(tmp_path: Path) -> None:
    with on_disks(tmp_path, "always") as (disks, nats), running_cluster(nats, tmp_path, "ab", proxied=True) as cluster:
        account = Account(cluster)
        with account.running(writers="ab", readers=""):
            account.wait_for("a", 20)
            account.wait_for("b", 20)
            disks.cut(nats)
            nats.heal()
            account.wait_for("a")
            account.wait_for("b")
        account.check()


def test_with_the_default_sync_a_power_cut_of_all_servers_is_detected(tmp_path: Path) -> None:
    with on_disks(tmp_path, None) as (disks, nats), running_cluster(nats, tmp_path, "ab", monitored=False) as cluster:
        log = (cluster.nodes["a"].data.path.parent / "log").read_text()
        assert "the sync setting is known of 0 of 3 NATS servers" in log
        disks.keep(nats)
        for number in range(20):
            assert cluster.write("b", f"before {number}").status_code == 201
        epoch = cluster.position("a")[0]
        disks.cut(nats)
        nats.heal()
        for name in "ab":
            wait_until(lambda name=name: is_refused(cluster, name, "unwritten"), f"node {name} refuses")
        cluster.command("b", "cluster", "rebuild", "web", "--yes")
        assert cluster.write("a", "after").status_code == 201
        wait_until(cluster.agree, "the nodes agree")
        assert cluster.position("a")[0] not in ("", epoch)
        tasks = [json.loads(path.read_bytes())["title"] for path in (cluster.tree("a") / "tasks").glob("*.json")]
        assert {f"before {number}" for number in range(20)} | {"after"} <= set(tasks)
