"""Hooks of ``config.json`` run once, on the server, after the commit, with the environment of a local lattice."""

import json
from pathlib import Path

import pytest

from sandbox import Client, Sandbox, wait_for

pytestmark = pytest.mark.e2e

_TELL = 'env | grep ^LATTICE_ | sort > "{0}.env"; cat > "{0}.event"; ' + (
    'grep -c "$LATTICE_EVENT_ID" "{1}"/events/*.jsonl > "{0}.count"'
)


def set_hooks(lattice_dir: Path, **hooks: object) -> None:
    config = lattice_dir / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "hooks": hooks}, sort_keys=True, indent=2) + "\n")


def told(file: Path, lattice_dir: Path) -> tuple[list[str], dict[str, object]]:
    """Return the names in a hook's environment, the values that do not differ by run, and the event."""
    count = Path(f"{file}.count")
    wait_for(lambda: count.exists() and ":1\n" in count.read_text(), "the hook to have found its event in the log")
    lines = Path(f"{file}.env").read_text().splitlines()
    event = json.loads(Path(f"{file}.event").read_text())
    values = {line.partition("=")[0]: line.partition("=")[2] for line in lines}
    assert values["LATTICE_ROOT"] == str(lattice_dir) and values["LATTICE_EVENT_ID"] == event["id"]
    kept = {"LATTICE_ACTOR", "LATTICE_EVENT_TYPE", "LATTICE_FROM_STATUS", "LATTICE_TO_STATUS"}
    variables = [f"{name}={value}" if name in kept else name for name, value in values.items()]
    # These belong to the process that runs the hook.
    own = {"LATTICE_REMOTE_SERVER", "LATTICE_REMOTE_DATA", "LATTICE_REMOTE_RUNTIME_DIR"}
    event = {key: value for key, value in event.items() if key not in ("id", "ts", "task_id")}
    return sorted(set(variables) - own), event


def test_hooks_get_the_environment_of_a_local_lattice_and_run_only_on_the_server(sandbox: Sandbox) -> None:
    server, root = sandbox.server(), sandbox.root
    there = server.project()
    server.start()
    remote, local = sandbox.client("ana"), sandbox.client("alone")
    local.ok("init", "--project-code", "LAT", "--no-setup-claude", "--no-setup-agents", "--actor", "human:ana")
    remote.add_remote(server, server.token("human:ana"))

    def use(client: Client, lattice_dir: Path, name: str) -> tuple[object, object]:
        client.ok("create", "One", "--actor", "human:ana")
        set_hooks(lattice_dir, transitions={"* -> planned": _TELL.format(root / name, lattice_dir)})
        client.ok("status", "LAT-1", "in_planning", "--actor", "human:ana")
        client.ok("status", "LAT-1", "planned", "--actor", "human:ana")
        return told(root / name, lattice_dir)

    assert use(remote, there, "remote") == use(local, local.lattice_dir, "local")
    configs = [lattice_dir / "config.json" for lattice_dir in (remote.lattice_dir, there)]
    wait_for(
        lambda: configs[0].read_bytes() == configs[1].read_bytes(), "the settings, which are a change of their own"
    )


def test_a_slow_hook_delays_no_command_and_a_failing_one_is_logged_with_its_change(sandbox: Sandbox) -> None:
    server = sandbox.server()
    there, ran, gate = server.project(), sandbox.root / "ran", sandbox.root / "gate"
    wait = f'while [ ! -e "{gate}" ]; do sleep 0.05; done'
    set_hooks(there, post_event=f'{wait}; echo "$LATTICE_EVENT_TYPE" >> "{ran}"; echo "no good" >&2; exit 4')
    server.start()
    ana = sandbox.client("ana")
    ana.add_remote(server, server.token("human:ana"))
    ana.ok("create", "One", "--actor", "human:ana")
    ana.ok("comment", "LAT-1", "two", "--actor", "human:ana")
    assert len(json.loads(ana.ok("comments", "LAT-1", "--json"))["data"]) == 1
    assert not ran.exists(), "both commands were answered before the first hook ended"
    gate.touch()
    wait_for(lambda: server.log.read_text().count("no good") == 2, "both hooks to have failed")
    assert ran.read_text() == "task_created\ncomment_added\n"
    entries = json.loads(ana.ok("remote", "log", "--json"))["data"]["entries"]
    numbers = {entry["command"].split()[0]: entry["seq"] for entry in entries}
    log = server.log.read_text()
    for command, event in (("create", "task_created"), ("comment", "comment_added")):
        said = f"board: change {numbers[command]}: hook hooks.post_event of {event} ended with 4: no good"
        assert said in log
