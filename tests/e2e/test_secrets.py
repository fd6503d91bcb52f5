"""Tokens appear only in the file that stores them and the variable that names them."""

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from preloaded_programs import warm
from sandbox import Client, Sandbox, Server, wait_for

pytestmark = pytest.mark.e2e


class Watcher:
    """Repeatedly reads the command line of every process, and the environment of the agents."""

    def __init__(self) -> None:
        self.command_lines: set[bytes] = set()
        self.environments: set[bytes] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            for pid in filter(str.isdecimal, os.listdir("/proc")):
                line = read(Path(f"/proc/{pid}/cmdline"))
                self.command_lines.add(line)
                if b"client.agent" in line or b"lattice-remote" in line:
                    self.environments.add(read(Path(f"/proc/{pid}/environ")))


def read(place: Path) -> bytes:
    try:
        return place.read_bytes()
    except OSError:
        return b""  # the process has exited


def said(done: subprocess.CompletedProcess[str]) -> bytes:
    return (done.stdout + done.stderr).encode()


def everything_a_person_does(server: Server, ana: Client, tokens: list[str]) -> Iterator[bytes]:
    """Yield the output of each command: successes, errors and crashes."""
    first, second, wrong = tokens
    url, by = server.url, ("--actor", "human:ana")
    secret_url = url.replace("http://", f"http://user:{wrong}@")
    yield said(ana.run("remote", "login", url, stdin=first + "\n"))
    yield said(ana.run("remote", "add", "origin", url, "--project", "board", "--token", "-", stdin=first + "\n"))
    yield said(ana.run("create", "One", *by))
    yield said(ana.run("comment", "LAT-1", "with another token", *by, env={"LATTICE_TOKEN": second}))
    for words in (["list"], ["remote", "-v"], ["remote", "show", "origin"], ["remote", "verify"], ["remote", "log"]):
        yield said(ana.run(*words))
    for words in (["remote", "status"], ["remote", "status", "--json"], ["remote", "agent", "status", "--json"]):
        yield said(ana.run(*words, env={"LATTICE_TOKEN": second}))
    yield said(ana.run("comment", "LAT-1", "x", *by, "--json", env={"LATTICE_TOKEN": wrong}))
    yield said(ana.run("comment", "LAT-1", "x", *by, env={"LATTICE_TOKEN": wrong, "LATTICE_REMOTE_AGENT": "off"}))
    yield said(ana.run("comment", "LAT-1", "x", *by, env={"LATTICE_TOKEN": f"{wrong} {wrong}"}))
    yield said(ana.run("remote", "login", url, stdin=f"{wrong}\n"))
    yield said(ana.run("remote", "login", url, stdin=f"{wrong} {wrong}\n"))
    remote = ana.lattice_dir / "remote.json"
    good = remote.read_text()
    remote.write_text(good.replace(url, secret_url))
    yield said(ana.run("list"))
    yield said(ana.run("remote", "status"))
    remote.write_text(good)
    server.stop()
    yield said(ana.run("list"))
    yield said(ana.run("comment", "LAT-1", "x", *by, "--json"))
    server.start()
    server.admin("token", "revoke", server_id(server))
    wait_for(lambda: ana.run("comment", "LAT-1", "x", *by).returncode == 1, "the token to be refused")
    yield said(ana.run("comment", "LAT-1", "x", *by))
    yield said(ana.run("list"))
    yield said(ana.run("remote", "status"))
    tokens_file = Path(ana.env["XDG_CONFIG_HOME"]) / "lattice" / "tokens.json"
    kept = tokens_file.read_text()
    tokens_file.write_text(kept.replace("}", "", 1))
    yield said(ana.run("comment", "LAT-1", "x", *by))
    tokens_file.write_text(kept)
    yield said(ana.run("remote", "logout"))
    yield said(ana.run("comment", "LAT-1", "x", *by))


def server_id(server: Server) -> str:
    """Return the id of the first token, which a command line may contain."""
    return next(word for word in server.admin("token", "list").split() if word.startswith("tok_"))


def files_below(root: Path) -> Iterator[Path]:
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            yield path


def test_a_token_appears_only_where_it_is_stored() -> None:
    with Sandbox() as sandbox:
        server, ana = sandbox.server(), sandbox.client("ana")
        ana.programs = warm()  # server, worker and agent are started as usual
        server.project()
        server.start()
        tokens = [server.token("human:ana"), server.token("human:ana"), "ltr_" + "w" * 43]
        with Watcher() as watcher:
            outputs = list(everything_a_person_does(server, ana, tokens))
        assert any(b"client.agent" in line for line in watcher.command_lines)
        assert any(b"HOME=" in environment for environment in watcher.environments)
        assert sum(b"Error: " in output for output in outputs) >= 8
        kept = Path(ana.env["XDG_CONFIG_HOME"]) / "lattice" / "tokens.json"
        found = {str(path): path.read_bytes() for path in files_below(sandbox.root) if path != kept}
        assert len(found) > 20 and any(name.endswith(".log") for name in found)
        for token in tokens:
            mark = token.encode()
            assert not [output for output in outputs if mark in output]
            assert not [line for line in watcher.command_lines if mark in line]
            assert not [environment for environment in watcher.environments if mark in environment]
            assert not [name for name, content in found.items() if mark in content]
        assert kept.stat().st_mode & 0o777 == 0o600


def test_a_token_in_a_command_line_causes_a_warning(sandbox: Sandbox) -> None:
    server, ana = sandbox.server(), sandbox.client("ana")
    server.project()
    server.start()
    token = server.token("human:ana")
    done = ana.run("remote", "add", "origin", server.url, "--project", "board", "--token", token)
    assert done.returncode == 0 and token not in done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and "--token - prompts for it" in done.stderr
