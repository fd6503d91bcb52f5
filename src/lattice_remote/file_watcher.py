"""File system notifications for directories, from one thread. The owner's own writes are reported too."""

import asyncio
import contextlib
import logging
import os
import stat
import threading
from collections.abc import Callable, Iterable

import watchfiles

__all__ = ["FileWatcher", "Touched"]

_STEP_MS = 50
"""The library's polling interval: 0.13 % of a processor, however many directories there are."""
_DEBOUNCE_MS = 100
_TICK_MS = 500
_AGAIN_S = 30.0
"""Delay before the watch is restarted after a failure."""
_log = logging.getLogger(__name__)

Touched = Callable[[set[str] | None], None]
"""Called with the paths that may have changed, relative to the directory; None for any of them."""
_Identities = dict[str, tuple[int, int] | None]


class FileWatcher:
    """Watch on directories, from the first ``add()`` to ``close()``. Used in one event loop, which runs its callbacks.

    Reports a change after about ``step_ms`` of quiet, ``debounce_ms`` at most. A directory that is replaced is noticed
    within a second: every file in it may have changed. With ``is_scanned`` the owner reads each directory after
    ``add()`` anyway, and the report of the watch's beginning is omitted.
    """

    def __init__(self, *, step_ms: int = _STEP_MS, debounce_ms: int = _DEBOUNCE_MS, is_scanned: bool = False) -> None:
        self.trouble: str | None = None
        """Reason why the system reports no changes; None while it does."""
        self._step_ms, self._debounce_ms = step_ms, debounce_ms
        self._is_scanned = is_scanned
        self._listeners: dict[str, Touched] = {}
        self._stop = threading.Event()

    def add(self, directory: str, touched: Touched) -> None:
        """Watch a directory; ``touched(None)`` follows once the watch has begun, for earlier changes."""
        self._listeners[directory] = touched
        self._restart()

    def remove(self, directory: str, touched: Touched) -> None:
        """Stop watching a directory, unless another listener has replaced this one."""
        if self._listeners.get(directory) == touched:
            del self._listeners[directory]
            self._restart()

    def close(self) -> None:
        self._listeners.clear()
        self._stop.set()

    def _restart(self) -> None:
        """Replace the thread: the library cannot add directories to a running watch."""
        self._stop.set()
        self._stop = threading.Event()
        if self._listeners:
            arguments = (_identities(self._listeners), self._stop, asyncio.get_running_loop())
            threading.Thread(target=self._watch, args=arguments, name="watching", daemon=True).start()

    def _watch(self, watched: _Identities, stop: threading.Event, loop: asyncio.AbstractEventLoop) -> None:
        def tell(function: Callable[..., None], *arguments: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(function, stop, *arguments)

        try:
            begun = False
            for changes in watchfiles.watch(
                *(directory for directory, identity in watched.items() if identity is not None),
                watch_filter=None,
                debounce=self._debounce_ms,
                step=self._step_ms,
                stop_event=stop,
                rust_timeout=_TICK_MS,
                yield_on_timeout=True,
                raise_interrupt=False,
                ignore_permission_denied=False,  # it ignores every error, and leaves a part of the tree unwatched
            ):
                if not begun:
                    begun = True
                    tell(self._begun)
                if changes:
                    tell(self._report, _by_directory({name for _, name in changes}, list(watched)))
                gone = {name for kind, name in changes if kind is watchfiles.Change.deleted and name in watched}
                now = _identities(watched)
                if gone or now != watched:  # an inode may be used again at once
                    others = [
                        name for name in now if now[name] is not None and (name in gone or now[name] != watched[name])
                    ]
                    tell(self._replaced, others)
                    return
        except FileNotFoundError:  # a directory was moved or removed just now
            tell(self._replaced, [])
        except (OSError, RuntimeError) as error:
            tell(self._failed, str(error))

    # --- in the loop; a replaced thread is ignored ---

    def _begun(self, thread: threading.Event) -> None:
        if thread is self._stop:
            self.trouble = None
            if not self._is_scanned:
                self._touch_all()
            self._is_scanned = False

    def _touch_all(self) -> None:
        for touched in self._listeners.values():
            touched(None)

    def _replaced(self, thread: threading.Event, directories: list[str]) -> None:
        if thread is self._stop:
            for directory in directories:
                _log.warning("%s was replaced by another directory", directory)
            self._is_scanned = False
            self._restart()

    def _failed(self, thread: threading.Event, why: str) -> None:
        """Report that every file may have changed; one undecodable file name is enough to fail."""
        if thread is self._stop:
            if self.trouble is None:
                _log.warning("cannot watch files (%s); they are compared periodically", why)
            self.trouble, self._is_scanned = why, False
            self._touch_all()
            asyncio.get_running_loop().call_later(_AGAIN_S, self._try_again, thread)

    def _try_again(self, thread: threading.Event) -> None:
        if thread is self._stop:
            self._restart()

    def _report(self, thread: threading.Event, changes: dict[str, set[str]]) -> None:
        if thread is self._stop:
            for directory, paths in changes.items():
                if directory in self._listeners:
                    self._listeners[directory](paths)


def _identities(directories: Iterable[str]) -> _Identities:
    found: _Identities = {}
    for directory in directories:
        try:
            status = os.stat(directory)
        except OSError:
            found[directory] = None
        else:
            found[directory] = (status.st_dev, status.st_ino) if stat.S_ISDIR(status.st_mode) else None
    return found


def _by_directory(names: set[str], directories: list[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    prefixes = [(directory, directory + os.sep) for directory in directories]
    for name in names:
        for directory, prefix in prefixes:
            if name.startswith(prefix):
                path = name[len(prefix) :]
                if not path.startswith("."):  # most of the owner's writes are to temporary files
                    found.setdefault(directory, set()).add(path)
                break
    return found
