"""Programs whose ``lattice`` is the launcher, with a record of the commands that the real ``lattice`` ran."""

from pathlib import Path

from lattice_remote.client.launcher import install as launchers
from sandbox import BIN, Client, Programs, wait_for

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

    def path(self, program: str) -> Path:
        return self.launcher if program == "lattice" else super().path(program)


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
