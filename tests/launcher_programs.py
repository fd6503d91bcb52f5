"""Programs whose ``lattice`` is the launcher, with a record of the commands that the real ``lattice`` ran."""

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from lattice_remote.client.launcher import install as launchers
from sandbox import BIN, COMMAND_TIMEOUT_S, Client, Process, Programs, wait_for

__all__ = ["LauncherPrograms", "install", "wait_until_warm", "warm_processes"]


class LauncherPrograms(Programs):
    """Run ``lattice`` by a launcher.

    Attributes:
        launcher: path of the launcher.
    """

    def __init__(self, launcher: Path, record: Path) -> None:
        self.launcher = launcher
        self._record = record

    def executed(self) -> list[str]:
        """Return the command lines that the real ``lattice`` has run."""
        return self._record.read_text().splitlines() if self._record.exists() else []

    def run(
        self,
        program: str,
        argv: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdin: str = "",
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._path(program), *argv],
            cwd=cwd,
            env=env,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def start(
        self,
        program: str,
        argv: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdout: int | IO[bytes],
        stderr: int | IO[bytes],
    ) -> Process:
        return subprocess.Popen(
            [self._path(program), *argv], cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr
        )

    def _path(self, program: str) -> Path:
        return self.launcher if program == "lattice" else BIN / program


def install(directory: Path) -> LauncherPrograms:
    """Install a launcher for any client, with a record of the commands that it leaves to the real ``lattice``."""
    launcher, record, real = launchers.install(directory), directory / "executed", directory / "real"
    real.write_text(f'#!/bin/sh\necho "$*" >>{record}\nexec {BIN}/lattice "$@"\n')
    real.chmod(0o755)
    launcher.write_text(launcher.read_text().replace(repr(str(BIN / "lattice")), repr(str(real))))
    return LauncherPrograms(launcher, record)


def wait_until_warm(client: Client, programs: LauncherPrograms) -> None:
    """Wait until the warm process serves commands in the client's cache."""

    def is_warm() -> bool:
        before = len(programs.executed())
        done = programs.run("lattice", ["list"], cwd=client.dir, env=client.env)
        return done.returncode == 0 and len(programs.executed()) == before

    wait_for(is_warm, "the warm process", 60)


def warm_processes(client: Client) -> list[int]:
    """Return the process ids of the warm processes on the client's machine."""
    found = []
    for lock in Path(client.env["LATTICE_REMOTE_RUNTIME_DIR"]).glob("warm-*.lock"):
        text = lock.read_text().strip()
        if text and b"launcher.warm" in _command_line(int(text)):
            found.append(int(text))
    return found


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
