"""Status of a cluster whose NATS servers do not answer: the reason, and what to do."""

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from nats_servers import NatsCluster, nats_cluster
from test_server import make_data

from lattice_remote.server.cluster import commands
from lattice_remote.server.cluster.engine import EngineUnavailable
from lattice_remote.server.cluster.jetstream import server_problems
from lattice_remote.server.cluster.settings import ClusterSettings, save_settings


class _FullServer(BaseHTTPRequestHandler):
    """Monitoring port of a NATS server that has switched JetStream off, with the answers of a real one."""

    def do_GET(self) -> None:
        is_health = self.path == "/healthz"
        self.send_response(503 if is_health else 200)
        self.end_headers()
        health = {"status": "unavailable", "error": "JetStream not enabled (10076)"}
        self.wfile.write(json.dumps(health if is_health else {"server_name": "n9"}).encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def monitor() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _FullServer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


async def test_servers_with_a_problem_are_named(one_server: NatsCluster, monitor: str) -> None:
    silent = "http://127.0.0.1:1"
    assert await server_problems([monitor, silent, *one_server.monitor_urls]) == {
        "n9": "JetStream not enabled (10076)",
        silent: "Connection refused",
    }


def test_a_status_without_an_answer_says_which_server_to_restart(
    tmp_path: Path, monitor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_jetstream(nats: NatsCluster) -> None:
        config = nats.servers[0].directory / "nats.conf"
        config.write_text(re.sub(r"jetstream \{.*?\n\}", "", config.read_text(), flags=re.DOTALL))

    monkeypatch.setattr(commands, "_ANSWER_S", 0.5)
    data = make_data(tmp_path / "data")
    with nats_cluster(1, tmp_path / "nats", prepare=without_jetstream) as nats:
        save_settings(data.path, ClusterSettings(nats.urls, "a", "http://127.0.0.1:1", monitors=[monitor], replicas=1))
        with pytest.raises(EngineUnavailable) as raised:
            commands.cluster_status(commands.settings_of(data))
    assert raised.value.message == (
        "NATS does not answer; a majority of its servers must run; n9: JetStream not enabled (10076); "
        "a server whose disk is full switches JetStream off: make room there and restart it"
    )
