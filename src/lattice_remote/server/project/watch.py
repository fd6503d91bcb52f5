"""Watcher for changes that other programs make to a project's files: over SSH, by plain lattice, in an editor (I12).

It reports the worker's own writes too. The worker detects from mtimes and inodes, in microseconds, that nothing is new.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path

import watchfiles

from lattice_remote.protocol.paths import is_replicated

__all__ = ["watch_tree"]

_DEBOUNCE_MS = 500  # maximum delay while changes keep coming
_STEP_MS = 100  # quiet time after which changes are reported
_LOOK_MS = 1000  # interval of checks for a replaced directory

_log = logging.getLogger(__name__)


async def watch_tree(tree: Path, touched: Callable[[set[str] | None], None], stop: asyncio.Event) -> None:
    """Call ``touched`` with paths in ``tree`` that may have changed (None: any of them), until ``stop`` is set.

    Reports a changed file after about 0.1 s, and a replaced directory within about a second. If the system cannot watch
    (no inotify watches left), logs it and returns; only the periodic rescan then finds such changes.
    """
    while not stop.is_set():
        found = _identity(tree)
        try:
            if found is not None:
                await _watch_one(tree, found, touched, stop)
            else:
                await asyncio.sleep(_LOOK_MS / 1000)  # moved away, perhaps to be replaced
        except FileNotFoundError:
            continue
        except (OSError, RuntimeError) as error:
            _log.error("cannot watch %s (%s); only the periodic rescan finds changes there", tree, error)
            return
        if _identity(tree) not in (found, None):
            _log.warning("%s was replaced by another directory", tree)
            touched(None)


async def _watch_one(
    tree: Path, identity: tuple[int, int], touched: Callable[[set[str] | None], None], stop: asyncio.Event
) -> None:
    """Watch the directory that now has this name, until another takes its place."""
    start = len(str(tree)) + 1
    watching = watchfiles.awatch(
        tree,
        watch_filter=None,
        debounce=_DEBOUNCE_MS,
        step=_STEP_MS,
        stop_event=stop,
        recursive=True,
        rust_timeout=_LOOK_MS,
        yield_on_timeout=True,
    )
    async with contextlib.aclosing(watching):
        async for changes in watching:
            names = [name for _, name in changes if is_replicated(name[start:])]
            replicated = {name[start:] for name in names}
            if any(map(os.path.isdir, names)):
                touched(None)  # files moved in with a directory are not reported one by one
            elif replicated:
                touched(replicated)
            if _identity(tree) != identity:
                return


def _identity(tree: Path) -> tuple[int, int] | None:
    try:
        status = tree.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
