"""Commands of third-party plugins: reads run locally; writes run on the server if both sides declare them."""

import json
from pathlib import Path

import pytest

from sandbox import Client, Programs, Sandbox, Server

pytestmark = pytest.mark.e2e

PLUGIN = str(Path(__file__).resolve().parent.parent / "plugin")
ANA = ("--actor", "human:ana")
ALLOWED = ["deploy note", "deploy from", "deploy escape", "list", "no such"]


def people(sandbox: Sandbox, *, installed_there: bool, allowed: list[str]) -> tuple[Server, Client]:
    """A server, and a client with the plugin."""
    server = sandbox.server()
    server.project()
    (server.data / "config.json").write_text(json.dumps({"plugin_commands": allowed}))
    if installed_there:
        server.env["PYTHONPATH"] = PLUGIN
    server.start()
    ana = sandbox.client("ana")
    ana.env["PYTHONPATH"] = PLUGIN
    ana.add_remote(server, server.token("human:ana"))
    ana.ok("create", "One", *ANA)
    return server, ana


@pytest.fixture
def cold() -> Sandbox:
    """Start programs afresh; programs forked from a preloaded one have loaded their plugins already."""
    return Sandbox(Programs())


def test_a_plugin_reads_locally_is_refused_writes_with_advice_and_is_routed_if_both_sides_declare_it(
    cold: Sandbox,
) -> None:
    with cold as sandbox:
        server, ana = people(sandbox, installed_there=True, allowed=ALLOWED)
        note = ("deploy", "note", "LAT-1", "live", *ANA)
        assert ana.ok("deploy", "list") == "1 tasks\n"
        refused = ana.run(*note)
        task = json.loads(ana.ok("show", "LAT-1", "--json"))["data"]["id"]
        assert (refused.returncode, refused.stderr) == (
            1,
            "Error: 'lattice deploy note' is a plugin's and would write the project's files, but the files here are a "
            "cache of the server's; if the server has the plugin too: lattice remote route deploy note\n",
        )
        as_json = ana.run(*note, "--json")
        assert json.loads(as_json.stdout)["error"]["code"] == "REMOTE_GUARD"

        assert ana.ok("remote", "route", "deploy", "note") == "lattice deploy note runs on the server from now on.\n"
        ana.ok("remote", "set-url", "origin", server.url)
        assert ana.ok("remote", "route") == "deploy note\n", "another address changes nothing of it"
        assert ana.ok(*note) == "Deployed to live\n"
        events = (server.lattice_dir() / "events" / f"{task}.jsonl").read_text()
        assert '"type":"x_deployed"' in events and (ana.lattice_dir / "events" / f"{task}.jsonl").read_text() == events
        entry = json.loads(ana.ok("remote", "log", "-n", "1", "--json"))["data"]["entries"][0]
        assert (entry["actor"], entry["command"]) == ("human:ana", "deploy note LAT-1 live --actor human:ana")
        stranger = ana.run("deploy", "note", "LAT-1", "live", "--actor", "human:ben")
        assert "token may act as human:ana; not as human:ben" in stranger.stderr
        assert "Invalid value" in ana.run("deploy", "note", "LAT-1", "moon", *ANA).stderr

        for words, why in (
            (("deploy", "from", "/etc/hostname"), "this plugin command takes a file, file"),
            (("deploy", "escape", "read"), "does not allow"),
            (("deploy", "escape", "run"), "does not allow"),
            (("deploy", "escape", "write"), "does not allow"),
        ):
            ana.ok("remote", "route", *words[:2])
            done = ana.run(*words)
            assert done.returncode == 1 and why in done.stderr, (words, done)
        ana.ok("remote", "route", "deploy", "note", "--local")
        assert "is a plugin's and would write" in ana.run(*note).stderr
        log = server.log.read_text()
        assert 'allows "no such", which is not a command of an' in log and 'allows "list", which is not' in log


def test_a_plugin_that_is_not_allowed_or_not_installed_is_one_line(cold: Sandbox) -> None:
    with cold as sandbox:
        server, ana = people(sandbox, installed_there=True, allowed=[])
        note = ("deploy", "note", "LAT-1", "live", *ANA)
        ana.ok("remote", "route", "deploy", "note")
        allow = '"plugin_commands": ["deploy note"] in config.json'
        assert allow in ana.run(*note).stderr
        server.stop()
        del server.env["PYTHONPATH"]
        server.start()
        missing = ana.run(*note)
        assert missing.returncode == 1
        assert "the server's lattice has no command 'deploy': a plugin must be installed there too" in missing.stderr
        server.stop()
        offline = ana.run("deploy", "list")
        assert offline.returncode == 0 and offline.stdout == "1 tasks\n" and "showing data from" in offline.stderr
