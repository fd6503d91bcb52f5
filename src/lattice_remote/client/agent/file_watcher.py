"""File system notifications for an agent's caches, from one thread for all caches.

Our own writes are reported too; listeners recognize them by ``fingerprints``.
"""

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Callable

import watchfiles

__all__ = ["Touched", "Watching"]

_STEP_MS = 50
"""The library's polling interval: 0.13 % of a processor, however many caches there are."""
_DEBOUNCE_MS = 100
_TICK_MS = 500
_AGAIN_S = 30.0
"""Delay before the watch is restarted after a failure."""
_log = logging.getLogger(__name__)

Touched = Callable[[set[str] | None], None]
"""Called with the paths that may have changed, relative to the cache; None for any of them."""


class Watching:
    """Watch on directories, from the first ``add()`` to ``close()``. Used in one event loop, which runs its
    callbacks."""

    def __init__(self) -> None:
        self.trouble: str | None = None
        """Reason why the system reports no changes; None while it does."""
        self._listeners: dict[str, Touched] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, directory: str, touched: Touched) -> None:
        """Watch a directory. ``touched(None)`` follows once the watch has begun, for earlier changes."""
        self._listeners[directory] = touched
        self._begin_anew()

    def remove(self, directory: str, touched: Touched) -> None:
        """Stop watching a directory, unless another listener has replaced this one."""
        if self._listeners.get(directory) == touched:
            del self._listeners[directory]
            self._begin_anew()

    def close(self) -> None:
        self._listeners.clear()
        self._stop.set()

    def _begin_anew(self) -> None:
        """Replace the thread: the library cannot add directories to a running watch."""
        self._stop.set()
        self._stop = threading.Event()
        if self._listeners:
            directories = [d for d in self._listeners if os.path.isdir(d)]
            arguments = (directories, self._stop, asyncio.get_running_loop())
            self._thread = threading.Thread(target=self._watch, args=arguments, name="watching", daemon=True)
            self._thread.start()

    # --- in the thread ---

    def _watch(self, directories: list[str], stop: threading.Event, loop: asyncio.AbstractEventLoop) -> None:
        def tell(function: Callable[..., None], *arguments: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(function, stop, *arguments)

        try:
            begun = False
            for changes in watchfiles.watch(
                *directories,
                watch_filter=None,
                debounce=_DEBOUNCE_MS,
                step=_STEP_MS,
                stop_event=stop,
                rust_timeout=_TICK_MS,
                yield_on_timeout=True,
                raise_interrupt=False,
                ignore_permission_denied=True,
            ):
                if not begun:
                    begun = True
                    tell(self._begun)
                if changes:
                    tell(self._report, _by_directory({name for _, name in changes}, directories))
        except (OSError, RuntimeError) as error:
            tell(self._failed, str(error))

    # --- in the loop; a replaced thread is ignored ---

    def _begun(self, thread: threading.Event) -> None:
        if thread is self._stop:
            self.trouble = None
            for touched in self._listeners.values():
                touched(None)

    def _failed(self, thread: threading.Event, why: str) -> None:
        """Report that every file may have changed. One undecodable file name in any directory is enough to fail."""
        if thread is self._stop:
            if self.trouble is None:
                _log.warning("cannot watch the caches (%s); they are compared periodically", why)
            self.trouble = why
            for touched in self._listeners.values():
                touched(None)
            asyncio.get_running_loop().call_later(_AGAIN_S, self._try_again, thread)

    def _try_again(self, thread: threading.Event) -> None:
        if thread is self._stop:
            self._begin_anew()

    def _report(self, thread: threading.Event, changes: dict[str, set[str]]) -> None:
        if thread is self._stop:
            for directory, paths in changes.items():
                if directory in self._listeners:
                    self._listeners[directory](paths)


def _by_directory(names: set[str], directories: list[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    prefixes = [(directory, directory + os.sep) for directory in directories]
    for name in names:
        for directory, prefix in prefixes:
            if name.startswith(prefix):
                path = name[len(prefix) :]
                if not path.startswith("."):  # .remote/ is ours
                    found.setdefault(directory, set()).add(path)
                break
    return found
