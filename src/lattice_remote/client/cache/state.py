"""Which point of the project's history the cache's files hold: ``.lattice/cache_state.json`` (I5)."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from lattice_remote.client.settings import Remote
from lattice_remote.errors import HostilePath
from lattice_remote.protocol.paths import check_path
from lattice_remote.protocol.replica import NOWHERE, Position

__all__ = ["STATE_FILE", "CacheState", "boot_id", "decode_state", "encode_state"]

STATE_FILE = "cache_state.json"


@dataclass(frozen=True, slots=True)
class CacheState:
    """What the last process that changed the cache knew of it."""

    position: Position = NOWHERE
    """Every change up to here is in the files, except in the ``wanted`` ones."""
    wanted: tuple[str, ...] = ()
    """Paths whose content is still to come from the server."""
    current_at: float | None = None
    """When the files were last known to be all that the server had (seconds since 1970); None: never yet."""

    @property
    def is_filled(self) -> bool:
        """Whether the files were ever complete, so that there is something to show."""
        return self.current_at is not None


def encode_state(state: CacheState, remote: Remote) -> bytes:
    """Return the file's content."""
    fields = {
        "epoch": state.position.epoch,
        "seq": state.position.seq,
        "mark": state.position.mark.hex(),
        "wanted": sorted(state.wanted),
        "time": state.current_at,
        "boot_id": boot_id(),
        "url": remote.url,
        "project": remote.project,
    }
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


def decode_state(data: bytes, remote: Remote) -> CacheState:
    """Return what the file says, as far as it can be relied on.

    Of another project it says nothing. After a reboot the files, which are not synced to the disk one by one,
    may hold less than the number says: the position is then nowhere, and they are compared as a whole.
    """
    try:
        found = json.loads(data)
        if (found["url"], found["project"]) != (remote.url, remote.project):
            return CacheState()
        position = Position(str(found["epoch"]), int(found["seq"]), bytes.fromhex(found["mark"]))
        current_at = None if found["time"] is None else float(found["time"])
        wanted = tuple(_checked(found["wanted"]))
    except (ValueError, TypeError, KeyError, HostilePath):
        return CacheState()
    if found["boot_id"] != boot_id():
        return CacheState(NOWHERE, (), current_at)
    return CacheState(position, wanted, current_at)


def _checked(paths: Iterable[object]) -> Iterable[str]:
    return (check_path(str(path)) for path in paths)


def boot_id() -> str:
    """Return what tells this start of the machine from others; empty where the system doesn't say."""
    global _boot_id  # noqa: PLW0603 - constant once read
    if _boot_id is None:
        try:
            with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
                _boot_id = file.read().strip()
        except OSError:
            _boot_id = ""
    return _boot_id


_boot_id: str | None = None
