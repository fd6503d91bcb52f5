"""Monitoring of a busy server: metrics, status and log agree with its journal."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from lattice_remote.server.journal.segment import JournalReader
from lattice_remote.server.status import CLUSTER_METRICS
from preloaded_programs import warm
from sandbox import Client, Sandbox, Server, wait_for

pytestmark = pytest.mark.e2e

TEXTS = ["Whisper of a title", "a comment in confidence", "private plan", "over-http-text", "what was looked for"]
DEPLOY = Path(__file__).parents[2] / "examples/deploy"
PREFIX = "lattice_remote_"


@dataclass
class Watched:
    """A server after every kind of event, and the expected figures."""

    server: Server
    ana: Client
    ben: Client
    tokens: dict[str, str]
    figures_url: str
    secrets: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"{self.server.url}/projects/board"

    def scraped(self) -> str:
        """Return the metrics as Prometheus scrapes them; each scrape must be well-formed."""
        answer = requests.get(self.figures_url, timeout=60)
        assert answer.status_code == 200
        return answer.text

    def figure(self, name: str, **labels: str) -> float:
        """Return the sum of all samples with this name and these labels."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.scraped())
            for sample in family.samples
            if sample.name == PREFIX + name and labels.items() <= sample.labels.items()
        )

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.server.admin("status", "--json"))
        return found

    def lines(self) -> list[dict[str, Any]]:
        """Return the log; every line must be JSON."""
        return [json.loads(line) for line in self.server.log.read_text().splitlines()]

    def changes(self) -> list[int]:
        records = JournalReader(self.server.data / "projects/board/journal").records()
        return [record.seq for record in records if record.change is not None]

    def ask(self, method: str, path: str, token: str, **options: Any) -> requests.Response:
        headers = {"Authorization": f"Bearer {token}"}
        return requests.request(method, self.server.url + path, headers=headers, timeout=20, **options)


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    with Sandbox(warm()) as sandbox:
        server = sandbox.server()
        server.project()
        server.start("--log-format", "json", "--metrics-listen", "127.0.0.1:0")
        [line] = [json.loads(line) for line in server.log.read_text().splitlines() if "serving metrics" in line]
        port = line["msg"].rsplit(":", 1)[1]
        tokens = {name: server.token(f"human:{name}", "agent:*") for name in ("ana", "ben", "web")}
        tokens["metrics"] = server.admin("token", "create", "--metrics")
        clients = [sandbox.client("ana"), sandbox.client("ben")]
        for name, client in zip(("ana", "ben"), clients, strict=True):
            client.add_remote(server, tokens[name])
        made = Watched(server, *clients, tokens, f"http://127.0.0.1:{port}/metrics")
        work(made)
        yield made


def work(watched: Watched) -> None:
    """Write in every way (commands, an edited plan, HTTP, a local file change), get refusals, and lose the worker."""
    ana, ben, server = watched.ana, watched.ben, watched.server
    by = ("--actor", "human:ana")
    ana.ok("create", TEXTS[0], *by)
    ana.ok("comment", "LAT-1", TEXTS[1], *by)
    assert ana.run("status", "LAT-99", "done", *by).returncode == 1  # refused by lattice
    assert ana.run("comment", "LAT-1", TEXTS[1], "--actor", "human:ben").returncode == 1  # refused by the server
    plan = next((ana.lattice_dir / "plans").glob("*.md"))
    plan.write_text(f"{plan.read_text()}\n{TEXTS[2]}\n")
    ana.ok("list")
    mine = server.lattice_dir() / plan.relative_to(ana.lattice_dir)
    wait_for(lambda: TEXTS[2] in mine.read_text(), "the plan, edited here, to be there")
    [worker] = [pid for pid in server.worker_pids() if b"reader" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(worker, signal.SIGKILL)
    made = watched.ask("POST", "/projects/board/tasks", watched.tokens["web"], json={"title": TEXTS[3]})
    assert made.status_code == 201, made.text
    assert watched.ask("GET", f"/nowhere/{TEXTS[4]}?token={watched.tokens['web']}", "").status_code == 404
    mine.write_text(mine.read_text() + "by hand\n")
    ben.ok("comment", "LAT-2", TEXTS[1], "--actor", "human:ben")
    wait_for(lambda: "by hand" in (ben.lattice_dir / "plans" / plan.name).read_text(), "what was written by hand")


def test_every_change_is_counted_once_and_logged_once(watched: Watched) -> None:
    changes = watched.changes()
    assert changes == list(range(1, len(changes) + 1))
    assert watched.figure("changes_total", project="board") == len(changes)
    assert watched.figure("head", project="board") == len(changes)
    logged = [line for line in watched.lines() if line.get("seq") is not None]
    # The next worker replied to requests that the lost one had run without a reply.
    assert sorted(line["seq"] for line in logged) == changes, logged


def test_requests_and_refusals_are_counted_by_result(watched: Watched) -> None:
    assert watched.figure("requests_total", kind="command", outcome="failed") == 1
    assert watched.figure("requests_total", outcome="refused") == watched.figure("refusals_total") == 1
    assert watched.figure("refusals_total", code="REMOTE_FORBIDDEN") == 1
    assert watched.figure("requests_total", kind="edit") >= 1
    written = watched.figure("requests_total", outcome="done") + watched.figure("requests_total", outcome="again")
    by_hand = sum(line.get("outcome") == "found" for line in watched.lines())
    assert by_hand >= 1
    assert written + by_hand == len(watched.changes())
    refused = next(line for line in watched.lines() if line.get("outcome") == "refused")
    assert (refused["command"], refused["code"], refused["actor"]) == ("comment", "REMOTE_FORBIDDEN", "human:ana")


def test_times_are_measured_and_a_lost_worker_is_counted(watched: Watched) -> None:
    carried_out = watched.figure("requests_total", outcome="done") + watched.figure("requests_total", outcome="failed")
    assert watched.figure("executor_seconds_count") == carried_out
    assert watched.figure("request_seconds_count") == carried_out
    assert 0 < watched.figure("executor_seconds_sum") < watched.figure("request_seconds_sum")
    assert watched.figure("journal_fsync_seconds_count") >= len(watched.changes()) / 2
    assert watched.figure("worker_starts_total", project="board") == 2


def test_clients_and_delivery_times_of_changes_are_measured(watched: Watched) -> None:
    wait_for(lambda: watched.figure("most_behind") == 0, "both clients to have said that they hold everything")
    assert watched.figure("clients", project="board", kind="cache") == 2
    count, total = watched.figure("delivery_lag_seconds_count"), watched.figure("delivery_lag_seconds_sum")
    assert count >= 2
    assert 0 < total / count < 5
    assert watched.figure("sent_bytes_total", project="board") > 1000
    assert watched.figure("queue_requests") == watched.figure("outbox_bytes") == 0


def test_http_is_counted_by_route_never_by_path(watched: Watched) -> None:
    for path in ("/projects/board", "/projects/board/tasks/LAT-1", "/projects/board/tasks/LAT-2", "/projects/x/y/z"):
        watched.ask("GET", path, watched.tokens["web"])
    watched.ask("BREW" * 10, "/projects/board", watched.tokens["web"])
    task, project = "/projects/{slug}/tasks/{id}", "/projects/{slug}"
    routes = set(re.findall(r'route="([^"]*)"', watched.scraped()))
    task = next(route for route in routes if re.fullmatch(r"/projects/\{slug\}/tasks/\{\w+\}", route))
    assert watched.figure("http_requests_total", method="GET", route=task, status="200") == 2
    assert watched.figure("http_requests_total", route=project, method="GET", status="200") >= 1
    assert watched.figure("http_requests_total", method="other") == 1
    assert watched.figure("http_requests_total", route="(none)", status="404") >= 2
    assert watched.figure("http_sent_bytes_total", route=project) > 100
    assert not any("board" in route or "LAT" in route for route in routes)


def test_metrics_need_a_token_of_their_own(watched: Watched) -> None:
    assert requests.get(watched.server.url + "/metrics", timeout=60).status_code == 401
    refused = watched.ask("GET", "/metrics", watched.tokens["ana"])
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "REMOTE_FORBIDDEN")
    got = watched.ask("GET", "/metrics", watched.tokens["metrics"])
    assert got.status_code == 200
    assert got.headers["Content-Type"].startswith("text/plain")
    assert f"{PREFIX}changes_total" in got.text
    openmetrics = {"Accept": "application/openmetrics-text; version=1.0.0"}
    assert requests.get(watched.figures_url, headers=openmetrics, timeout=60).text.endswith("# EOF\n")
    for path in ("/projects/board", "/projects/board/tasks"):
        assert watched.ask("GET", path, watched.tokens["metrics"]).status_code == 403
    for path in ("/projects/board", "/healthz", "/", "/projects/board/ws"):
        assert requests.get(watched.figures_url.replace("/metrics", path), timeout=60).status_code == 404
    assert "(metrics)" in watched.server.admin("token", "list")


def test_no_metric_has_a_label_that_a_client_can_choose(watched: Watched) -> None:
    labels = {
        name: {
            sample.labels.get(name)
            for family in text_string_to_metric_families(watched.scraped())
            for sample in family.samples
        }
        for name in ("actor", "token", "address", "path", "command")
    }
    assert all(values == {None} for values in labels.values())


def test_status_reports_projects_and_each_client(watched: Watched) -> None:
    wait_for(
        lambda: all(client["behind"] == 0 for client in watched.status()["projects"][0]["clients"]),
        "both clients to be current",
    )
    found = watched.status()
    [board] = found["projects"]
    assert (found["running"], found["pid"], found["address"]) == (
        True,
        watched.server.process and watched.server.process.pid,
        watched.server.url,
    )
    assert (board["slug"], board["state"], board["head"]) == ("board", "ready", len(watched.changes()))
    assert board["journal_bytes"] > 1000
    assert board["writes_per_minute"] >= 1
    assert [(c["kind"], c["actor"], c["applied"]) for c in board["clients"]] == [
        ("cache", f"human:{name}", board["head"]) for name in ("ana", "ben")
    ]
    assert all(client["address"] == "127.0.0.1" and client["client_version"] for client in board["clients"])
    shown = watched.server.admin("status")
    assert re.search(rf"(?m)^board +ready +{board['head']} ", shown)
    assert re.search(r"(?m)^board +human:ben +tok_\w+ +127.0.0.1 ", shown)
    assert all(len(line) <= 100 for line in shown.splitlines())


def test_an_open_stream_counts_as_a_client(watched: Watched) -> None:
    headers = {"Authorization": f"Bearer {watched.tokens['web']}"}
    with requests.get(watched.url + "/events/stream", headers=headers, stream=True, timeout=20) as stream:
        assert stream.status_code == 200
        events = stream.iter_content(1)  # closes the stream
        next(events)
        kinds = {client["kind"]: client["actor"] for client in watched.status()["projects"][0]["clients"]}
        assert kinds["stream"] == "human:web"
        assert watched.figure("clients", kind="stream", project="board") == 1
    wait_for(lambda: watched.figure("clients", kind="stream") == 0, "the stream to be gone")


def test_the_status_socket_is_private_to_its_owner(watched: Watched) -> None:
    place = watched.server.data / "status.sock"
    assert place.stat().st_mode & 0o777 == 0o600


def test_metrics_of_the_example_dashboard_and_alerts_exist(watched: Watched) -> None:
    endings = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}
    live = {
        family.name + ending
        for family in text_string_to_metric_families(watched.scraped())
        for ending in endings[family.type]
    }
    of_cluster = {f"lattice_remote_{name}" for name in CLUSTER_METRICS}  # only of a node of a cluster
    dashboard = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    asked += re.findall(r"(?m)^ +expr: (.+)$", (DEPLOY / "prometheus-alerts.yml").read_text())
    assert len(asked) > 30
    # An alert on an increase sees the first event only if the series started at 0.
    assert 'lattice_remote_refusals_total{code="REMOTE_STORAGE",project="board"} 0.0' in watched.scraped()
    for expression in asked:
        names = re.findall(r"\b(?:lattice_remote|process)_\w+", expression)
        assert names, expression
        assert set(names) <= live | of_cluster, expression


def test_every_metric_is_documented(watched: Watched) -> None:
    page = (DEPLOY.parents[1] / "docs/run/monitor.md").read_text()
    families = {
        family.name for family in text_string_to_metric_families(watched.scraped()) if family.name.startswith(PREFIX)
    }
    assert len(families) > 20
    for name in families:
        assert re.search(rf"`{name}(_total)?`", page), f"docs/run/monitor.md does not explain {name}"


def test_a_revoked_token_appears_in_the_metrics(watched: Watched) -> None:
    watched.server.admin("token", "revoke", watched.tokens["ben"])
    wait_for(lambda: watched.figure("clients", kind="cache") == 1, "the client to be sent away")
    assert watched.figure("goodbyes_total", code="REMOTE_UNAUTHORIZED") == 1
    assert watched.ben.run("comment", "LAT-1", TEXTS[1], "--actor", "human:ben").returncode == 1
    # A refused client retries after up to 30 s; a command makes it retry at once.
    wait_for(lambda: watched.figure("connections_refused_total", code="REMOTE_UNAUTHORIZED") >= 1, "it to be refused")
    assert watched.figure("changes_total") == len(watched.changes())


def test_no_token_and_no_typed_text_is_in_the_log(watched: Watched) -> None:
    log = watched.server.log.read_text()
    assert len(watched.lines()) > 10
    for secret in (*watched.tokens.values(), *TEXTS, "by hand"):
        assert secret not in log
        assert secret.replace(" ", "%20") not in log
    requests_ = [line for line in watched.lines() if line["logger"] == "lattice_remote.requests"]
    assert {"create", "comment", "status", "edit"} <= {line.get("command") for line in requests_}
    assert all(line["ms"] >= 0 for line in requests_ if line.get("outcome") != "found")


def test_unknown_clients_do_not_fill_the_log(watched: Watched) -> None:
    before = len(watched.lines())
    with requests.Session() as stranger:
        for _ in range(300):
            stranger.get(watched.server.url + "/healthz/x", timeout=60)
    assert watched.figure("http_requests_total", route="(none)", method="GET") >= 300
    watched.ask("GET", "/projects/board", watched.tokens["web"])  # a known client

    def told() -> int:
        lines = watched.lines()[before:]
        return sum(line.get("route") == "(none)" for line in lines) + sum(line.get("suppressed", 0) for line in lines)

    wait_for(lambda: told() == 300, "the line that says how many were left out")
    assert len(watched.lines()) - before < 150


def test_without_a_server_status_reads_the_files(watched: Watched) -> None:
    head, server = len(watched.changes()), watched.server
    server.kill()  # its socket remains, without a listener
    assert (server.data / "status.sock").exists()
    done = server.programs.run("lattice-remote", ["status", "--json"], cwd=server.log.parent, env=server.env)
    found = json.loads(done.stdout)
    assert (done.returncode, found["running"]) == (3, False)
    [board] = found["projects"]
    assert (board["state"], board["head"], board["oldest"]) == ("stopped", head, 1)
    shown = server.programs.run("lattice-remote", ["status"], cwd=server.log.parent, env=server.env)
    assert shown.stdout.startswith("No server runs on ")
    began = time.time()
    server.start("--log-format", "json")
    found = watched.status()
    assert found["running"]
    assert (found["projects"][0]["slug"], found["projects"][0]["head"]) == ("board", head)
    assert time.time() - began < 30
    assert server.stop() == 0
    assert not (server.data / "status.sock").exists()
