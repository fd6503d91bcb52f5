"""The client of lattice-remote as a command for ``lattice-remote conformance --client``: URL DIRECTORY [ARGV...].

Without ARGV the agent's service runs in this process, so that it can be killed. Each directory is a machine of its own.
"""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

from lattice_remote.client import trusted_servers
from lattice_remote.client.agent.service import Service
from lattice_remote.client.config import Remote, write_remote
from lattice_remote.file_watcher import FileWatcher


async def follow(lattice: Path, token: str) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    service = Service(str(lattice))
    service.start(token)
    service.look_after(FileWatcher(), asyncio.Semaphore(1))
    ready = asyncio.create_task(service.handle({"do": "ready", "token": token}, lambda _: None))
    await ended.wait()
    ready.cancel()
    await asyncio.gather(ready, return_exceptions=True)
    await service.close()


def main() -> None:
    url, place, *argv = sys.argv[1:]
    server, project = url.split("/projects/")
    directory = Path(place)
    home = directory.parent / "home"
    home.mkdir(exist_ok=True, mode=0o700)
    os.environ |= {
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home / "config"),
        "LATTICE_REMOTE_RUNTIME_DIR": str(home / "run"),
        "LATTICE_REMOTE_AGENT": "off",
    }
    lattice = directory / ".lattice"
    if not (lattice / "remote.json").exists():
        trusted_servers.record(trusted_servers.name(server))
        write_remote(str(lattice), Remote("origin", server, project))
    if not argv:
        asyncio.run(follow(lattice, os.environ["LATTICE_TOKEN"]))
        return
    os.chdir(directory)
    sys.exit(subprocess.run([Path(sys.executable).with_name("lattice"), *argv], check=False).returncode)


if __name__ == "__main__":
    main()
