"""Integrity monitor: detects and repairs files of one cache that other programs modify (I3, I4).

Touched files (``file_watcher``) that differ from the fingerprints of our own processes are fetched again. Changes made
while no agent ran are found after the first connection: by the files' times if the fingerprints are from this boot,
else by a comparison with the server's manifest.
"""

import asyncio
import contextlib
import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterable

from lattice_remote.client.cache.cache import LOCKS_FILE
from lattice_remote.client.cache.replicator import Replicator
from lattice_remote.client.cache.safe_directory import QUIET_S
from lattice_remote.client.cache.verify import foreign, read_gently
from lattice_remote.client.connection.connection import Connection
from lattice_remote.errors import RemoteError
from lattice_remote.file_watcher import FileWatcher
from lattice_remote.protocol.paths import is_editable, is_replicated

__all__ = ["IntegrityMonitor"]

RESCAN_S = 300.0
"""Interval of scans of all files' times, in case the system missed an event."""
_MIN_RESCAN_S = 2.0
"""The interval if the system reports nothing; scans take at most a twentieth of a processor."""
_RESCAN_SHARE = 20.0
_RETRY_S = 5.0
STRAY_S = 60.0
"""Delay after which a changed file of no task, such as ``plans/x (copy).md``, is rescued and removed."""
_BATCH = 256
_MANY = 1000
"""If more files differ at once (a backup may link them all), the manifest is compared instead."""
_EDITED_BY_HAND = ("plans/", "notes/")
_log = logging.getLogger(__name__)


class IntegrityMonitor:
    """Monitor of one cache; ``on_edits`` gets texts to check (None: all)."""

    def __init__(
        self,
        replicator: Replicator,
        connection: Connection,
        watching: FileWatcher,
        turn: asyncio.Semaphore,
        on_edits: Callable[[Iterable[str] | None], None],
    ) -> None:
        self._replicator = replicator
        self._cache = replicator.cache
        self._repairs = replicator.repairs
        self._connection = connection
        self._watching = watching
        self._on_edits = on_edits
        self._turn = turn  # one cache at a time reads all its files
        self._wake = asyncio.Event()
        self.has_looked = False
        """Whether all earlier changes were found: until then no file is known to be current."""
        self.is_awaited = False
        self._scan_at = 0.0
        self._scan_cost_s = 0.0
        self._vanished_at = -QUIET_S  # when a file was last found missing (monotonic)

    def touched(self, paths: set[str] | None) -> None:
        """Check these files (None: all); edits are reported at once, also without a server."""
        if paths is not None:
            self._on_edits(path for path in paths if is_editable(path) and self._is_foreign(path))
        elif self._cache.known.is_complete:  # else a base may be damaged, until the files are compared
            self._on_edits(None)
        if paths is None or not self._cache.known.is_complete or any(path.startswith(LOCKS_FILE) for path in paths):
            self._scan_at = 0.0
        else:
            for path in paths:
                self._touched(path)
        self._wake.set()

    def _is_foreign(self, path: str) -> bool:
        found = self._cache.signature(path)
        return found is not None and not self._cache.known.agrees(path, found)

    def _touched(self, path: str) -> None:
        found = self._cache.signature(path)
        if self._cache.known.agrees(path, found) and found is not None:
            return
        place = self._cache.absolute(path)
        if os.path.isdir(place) and not os.path.islink(place):
            self._scan_at = 0.0  # the contents of a moved directory are not reported file by file
        elif not os.path.lexists(place):
            self._missing(path)
        elif self._replicator.writer.is_strange(path):
            self._suspect(path)

    def _missing(self, path: str) -> None:
        if path in self._cache.known:
            self._vanished_at = time.monotonic()
            self._suspect(path)
        elif "." not in path.rpartition("/")[2] and self._cache.known.is_below(path):
            self._scan_at = 0.0  # a directory was moved away

    def _suspect(self, path: str) -> None:
        if not is_replicated(path):
            return
        if self.has_looked and (is_editable(path) or self._cache.signature(path) is None):
            self._repairs.suspect_missing([path])
        else:
            self._repairs.suspect([path], delay_s=self._stray_s(path))

    def _stray_s(self, path: str) -> float:
        """Return the seconds before a stray file, which an editor may use, is removed."""
        if not path.startswith(_EDITED_BY_HAND) or is_editable(path) or path in self._cache.known:
            return 0.0
        found = self._cache.signature(path)
        return 0.0 if found is None else min(STRAY_S, found[0] / 1e9 + STRAY_S - time.time())

    def _vanishing_s(self, path: str) -> float:
        """Return the seconds before a missing file is restored."""
        if self._cache.signature(path) is not None:
            return 0.0
        return max(0.0, self._vanished_at + QUIET_S - time.monotonic())

    # --- the task ---

    async def run(self) -> None:
        self._watching.add(self._cache.directory, self.touched)
        try:
            while True:
                await self._connection.changed.until(self._can_work, RESCAN_S)
                self._wake.clear()
                pause_s = _RETRY_S
                if self._can_work():
                    try:
                        await self.look()
                        pause_s = self._pause_s()
                    except RemoteError:
                        pass  # reported by the connection or the replicator
                    except Exception:  # noqa: BLE001 - a defect of ours must not end this silently
                        _log.exception("monitoring %s failed", self._cache.directory)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await self._wake.wait()
        finally:
            self._watching.remove(self._cache.directory, self.touched)

    def _can_work(self) -> bool:
        return self._connection.is_open and self._replicator.is_following

    def _pause_s(self) -> float:
        due_s = self._repairs.next_due_s()
        scan_s = max(0.0, self._scan_at - time.monotonic())
        return scan_s if due_s is None else min(due_s, scan_s)

    async def look(self) -> None:
        """Find and fetch the files that others changed. Raises RemoteError."""
        if not self._cache.known.is_complete:
            await self._compare_all()
            await self._replicator.store_known()
        if time.monotonic() >= self._scan_at:
            await self._scan()
        if self._repairs.count_due() > _MANY:
            await self._compare_all()
        while due := self._repairs.take_due(_BATCH):
            later = {path: wait_s for path in due if (wait_s := max(self._stray_s(path), self._vanishing_s(path))) > 0}
            for path, wait_s in later.items():
                self._repairs.suspect([path], delay_s=wait_s)
            await self._repair([path for path in due if path not in later])
        if not self.has_looked:
            self.has_looked = True
            self._connection.changed.notify()

    async def _repair(self, paths: list[str]) -> None:
        """Fetch these files. One that fails holds up no other and is tried again. Raises the last error."""
        try:
            await self._connection.carry_out(await self._replicator.repair(paths))
        except Exception as error:
            if len(paths) == 1:
                self._repairs.suspect(paths, delay_s=_RETRY_S)
                raise
            failed = error
        else:
            return
        for path in paths:
            try:
                await self._repair([path])
            except Exception as error:  # noqa: BLE001 - raised behind the others
                failed = error
        raise failed

    async def _compare_all(self) -> None:
        async with self._turn:
            began, is_first = time.monotonic(), not self._cache.known.is_complete
            earlier = await read_gently(self._cache, lambda: self.is_awaited)
            if is_first and self._cache.known.is_complete:  # a resync has compared everything since
                return
            outcome, done = await self._replicator.compare(repair=True, earlier=earlier)
            await self._connection.carry_out(outcome)
            comparison = await asyncio.shield(done)
            self._scan_at = 0.0
        if not comparison.is_clean:
            found = len(comparison.differing) + len(comparison.missing) + len(comparison.surplus)
            _log.info("%s: %d files differed from the server's", self._cache.directory, found)
        _log.info("%s: compared in %.1f s", self._cache.directory, time.monotonic() - began)

    async def _scan(self) -> None:
        self._scan_at = math.inf
        try:
            await self._check_all()
        except BaseException:
            self._scan_at = 0.0
            raise
        interval_s = RESCAN_S
        if self._watching.trouble is not None:
            interval_s = min(RESCAN_S, max(_MIN_RESCAN_S, self._scan_cost_s * _RESCAN_SHARE))
        if self._scan_at == math.inf:  # else a report came, perhaps of a file that was checked before
            self._scan_at = time.monotonic() + interval_s * random.uniform(0.8, 1.2)  # noqa: S311 - spreads load only

    async def _check_all(self) -> None:
        async with self._turn:
            began = time.monotonic()
            for path in await asyncio.to_thread(foreign, self._cache):
                if self._replicator.writer.is_strange(path):
                    self._suspect(path)
                elif is_editable(path):
                    self._on_edits([path])
            if not self._cache.is_whole():
                await self._connection.carry_out(await self._replicator.repair([]))
        self._scan_cost_s = time.monotonic() - began

    def how(self) -> str:
        if self._watching.trouble is None:
            return "the system reports changes"
        return f"compared every {max(_MIN_RESCAN_S, self._scan_cost_s * _RESCAN_SHARE):.0f} s: {self._watching.trouble}"
