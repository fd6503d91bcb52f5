"""Which point of the project's history the cache's files hold: ``.lattice/cache_state.json`` (I5).

Beside it, in ``.lattice/.away``, which contents of artifacts are left out. There may be many, and they change rarely.
"""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from lattice_remote.client.runtime import boot_time
from lattice_remote.client.settings import STATE_FILE, Remote
from lattice_remote.errors import HostilePath
from lattice_remote.protocol.effects import NOWHERE, Content, Position
from lattice_remote.protocol.paths import check_path

__all__ = [
    "AWAY_FILE",
    "STATE_FILE",
    "CacheState",
    "boot_id",
    "booted_at",
    "decode_state",
    "encode_away",
    "encode_state",
]

AWAY_FILE = ".away"


@dataclass(frozen=True, slots=True)
class CacheState:
    """What the last process that changed the cache knew of it."""

    position: Position = NOWHERE
    """Every change up to here is in the files, except in the ``wanted`` ones."""
    wanted: tuple[str, ...] = ()
    """Paths whose content is still to come from the server."""
    away: Mapping[str, Content | None] = field(default_factory=dict)
    """Contents of artifacts that are left out, see ``Replica.away``."""
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
        "away": len(state.away),
        "time": state.current_at,
        "boot_id": boot_id(),
        "url": remote.url,
        "project": remote.project,
    }
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


def encode_away(away: Mapping[str, Content | None]) -> bytes:
    """Return the content of the file that is written before the state, whenever it has changed."""
    entries = {path: content and [content[0], content[1].hex()] for path, content in sorted(away.items())}
    return (json.dumps(entries, indent=0) + "\n").encode()


def _decode_away(data: bytes) -> dict[str, Content | None]:
    entries: dict[str, list[object] | None] = json.loads(data)
    return {
        check_path(path): None if entry is None else (int(str(entry[0])), bytes.fromhex(str(entry[1])))
        for path, entry in entries.items()
    }


def decode_state(data: bytes, away: bytes, remote: Remote) -> CacheState:
    """Return what the two files say, as far as it can be relied on.

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
        left_out = _decode_away(away) if found.get("away") else {}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, HostilePath):
        return CacheState()
    if found["boot_id"] != boot_id():
        return CacheState(NOWHERE, (), {}, current_at)
    return CacheState(position, wanted, left_out, current_at)


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


def booted_at() -> float:
    """Return when this machine was started (seconds since 1970); 0 where the system does not identify its starts."""
    return time.time() - boot_time() if boot_id() else 0.0


_boot_id: str | None = None
