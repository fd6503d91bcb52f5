"""The container's files, without an engine: all that they copy, run and start exists and works.

The steps run on this machine, in a directory that represents the container's. Stand-ins install this project as it is
installed here (``stand_ins/``).
"""

import json
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from machine import Machine
from proxies import DEPLOY, with_places

from sandbox import Sandbox, wait_for

ROOT = DEPLOY.parents[1]
LOOPBACK = {"0.0.0.0": "127.0.0.1"}  # noqa: S104 - what is not to be listened on here


def instructions(text: str) -> list[tuple[str, str]]:
    """Return a Dockerfile's instructions with their arguments."""
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1].strip()) for line in lines if line.strip()]


STEPS = instructions((DEPLOY / "Dockerfile").read_text())
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def only(name: str) -> str:
    [argument] = [argument for instruction, argument in STEPS if instruction == name]
    return argument


def copied() -> list[str]:
    """Return the paths that are copied from the repository."""
    sources = [argument.split()[:-1] for name, argument in STEPS if name == "COPY" and "--from" not in argument]
    return [source for line in sources for source in line]


def test_the_image_copies_the_whole_package_and_nothing_else() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert sorted(line[1:] for line in ignored if line.startswith("!")) == sorted(copied())
    project = (ROOT / "pyproject.toml").read_text()
    for source in copied():
        assert (ROOT / source).exists()
        assert source in {"pyproject.toml", "constraints.txt"} or source in project


def test_the_container_runs_as_an_unprivileged_user_and_forwards_signals() -> None:
    names = [name for name, _ in STEPS]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name in {"RUN", "COPY"})
    assert only("USER") == "lattice" and "useradd" in STEPS[7][1] + STEPS[6][1]
    for name in ("ENTRYPOINT", "CMD"):
        assert all(isinstance(word, str) for word in json.loads(only(name))), "no shell in between"
    for name, image in STEPS:
        if name == "FROM":
            assert re.fullmatch(r"[a-z]+:[\w.-]*\d[\w.-]*( AS \w+)?", image), f"{image} is of no version"


@pytest.fixture
def container(tmp_path: Path) -> Any:
    with Sandbox() as sandbox:
        machine = Machine(sandbox, "container")
        for source in copied():
            machine.copy(ROOT / source, f"/src/{source}")
        yield machine
        machine.end()


def test_build_steps_programs_and_health_check_work(container: Machine) -> None:
    for name, argument in STEPS:
        if name == "RUN":
            assert container.run(argument).returncode == 0, container.said
    environment = dict(pair.split("=", 1) for pair in shlex.split(only("ENV")))
    assert environment.keys() == {"PATH", "LATTICE_REMOTE_DATA"}
    assert environment["PATH"].startswith("/opt/lattice-remote/bin:")
    assert environment["LATTICE_REMOTE_DATA"] == only("VOLUME") == "/data"
    container.environment["LATTICE_REMOTE_DATA"] = str(container.path("/data"))

    [program] = json.loads(only("ENTRYPOINT"))
    program = f"/opt/lattice-remote/bin/{program}"
    check = shlex.join(json.loads(only("HEALTHCHECK").partition(" CMD ")[2]))
    assert container.run(f"{program} init").returncode == 0, container.said
    assert container.run(check).returncode != 0, "nobody is there yet"
    command = with_places(shlex.join(COMPOSE["services"]["server"]["command"]), LOOPBACK)
    assert command.startswith(with_places(shlex.join(json.loads(only("CMD"))), LOOPBACK))
    server = container.start(f"{program} {command}")
    wait_for(lambda: container.run(check).returncode == 0, f"the check to pass: {container.said}")
    server.send_signal(signal.SIGTERM)
    assert server.wait(20) == 0
    assert container.run(check).returncode != 0


def test_the_compose_file_is_consistent() -> None:
    services = COMPOSE["services"]
    server, proxy = services["server"], services["proxy"]
    assert "ports" not in server, "it is reached through the proxy alone"
    [network] = server["networks"]
    assert proxy["networks"] == [network]
    [subnet] = [part["subnet"] for part in COMPOSE["networks"][network]["ipam"]["config"]]
    assert server["command"][-2:] == ["--behind-proxy", subnet]
    [volume] = server["volumes"]
    assert volume.partition(":")[2] == only("VOLUME")
    named = {mount.partition(":")[0] for service in services.values() for mount in service["volumes"]}
    assert {name for name in named if not name.startswith("./")} == COMPOSE["volumes"].keys()
    assert (DEPLOY / "Caddyfile").exists() and "./Caddyfile" in named
    caddyfile = (DEPLOY / "Caddyfile").read_text()
    for variable in proxy["environment"]:
        assert f"{{${variable}:" in caddyfile
    assert proxy["environment"]["LATTICE_SERVER"] == f"server:{only('EXPOSE')}"
    assert (DEPLOY / server["build"]["context"] / server["build"]["dockerfile"]).resolve() == DEPLOY / "Dockerfile"


def test_no_file_names_a_private_registry_or_host() -> None:
    for path in DEPLOY.iterdir():
        hosts = set(re.findall(r"https?://([\w.-]+)", path.read_text()))
        assert hosts <= {"127.0.0.1", "lattice_remote"}, path
