"""Notices what is done to the projects' files behind the server's back: over SSH, by plain lattice, in an editor (I12).

The worker's own writes are seen here as well. They are passed on all the same, since the worker can tell in
microseconds, by the files' times and inodes, that nothing is new.
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

_DEBOUNCE_MS = 500  # the most that changes are gathered while they keep coming: one look for many
_STEP_MS = 100  # this long without another, and they are passed on
_LOOK_MS = 1000  # how often to look whether the directory is still the same one

_log = logging.getLogger(__name__)


async def watch_tree(tree: Path, touched: Callable[[set[str] | None], None], stop: asyncio.Event) -> None:
    """Call ``touched`` with paths in ``tree`` that may have changed (None: any of them), until ``stop`` is set.

    A file is reported about 0.1 s after it was changed; within about a second, that the directory itself was
    replaced by another. Where the system can't watch (no inotify watches left) the log says so, and only the rescan
    now and then finds such changes.
    """
    while not stop.is_set():
        found = _identity(tree)
        try:
            if found is not None:
                await _watch_one(tree, found, touched, stop)
            else:
                await asyncio.sleep(_LOOK_MS / 1000)  # it was moved away, perhaps to be replaced
        except FileNotFoundError:
            continue
        except (OSError, RuntimeError) as error:
            _log.error("cannot watch %s (%s); edits there are found by the rescan only", tree, error)
            return
        if _identity(tree) not in (found, None):
            _log.warning("%s is another directory now", tree)
            touched(None)


async def _watch_one(
    tree: Path, identity: tuple[int, int], touched: Callable[[set[str] | None], None], stop: asyncio.Event
) -> None:
    """Watch the directory that has this name now, for as long as it is that one."""
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
                touched(None)  # what was moved in with a directory is not reported file by file
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
