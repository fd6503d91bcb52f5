"""Looks at every file of a cache: what it holds, and whether other hands than ours have changed it."""

import asyncio
import contextlib
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from lattice_remote.client.cache.cache import Cache, explained
from lattice_remote.client.cache.known import Signature

__all__ = ["Reading", "foreign", "read_all", "read_gently"]

_SLICE = 200
_PAUSE_S = 0.01
_RACY_NS = 50_000_000
"""A file this young when it was read may change again under the same times."""


class Reading(NamedTuple):
    """A file as it was read at one moment."""

    size: int
    digest: bytes
    signature: Signature
    settled: bool
    """Whether a later change would show in the signature."""


def read_all(cache: Cache, earlier: Mapping[str, Reading] | None = None) -> dict[str, Reading]:
    """Return what each replicated file holds. Reads everything that is not as in ``earlier``; call it in a thread."""
    return _read(cache, cache.paths(), earlier or {})


async def read_gently(cache: Cache, is_urgent: Callable[[], bool]) -> dict[str, Reading]:
    """Like ``read_all``, without the cache's lock, and with pauses for other work unless it is urgent.

    What is changed after it was read is found by ``read_all`` with this as ``earlier``, at the cost of a look.
    """
    found: dict[str, Reading] = {}
    paths = cache.paths()
    while some := await asyncio.to_thread(lambda: list(itertools.islice(paths, _SLICE))):
        found |= await asyncio.to_thread(_read, cache, some, {})
        await asyncio.sleep(0 if is_urgent() else _PAUSE_S)
    return found


def foreign(cache: Cache) -> list[str]:
    """Return the files that are not as one of us left them, by their times only. May be called in a thread.

    What is being written at that moment may be among them: look again under the cache's lock.
    """
    present = set(cache.paths())
    changed = [path for path in present if not cache.known.agrees(path, cache.signature(path))]
    return changed + [path for path in cache.known.paths() if path not in present]


def _read(cache: Cache, paths: Iterable[str], earlier: Mapping[str, Reading]) -> dict[str, Reading]:
    found: dict[str, Reading] = {}
    for path in paths:
        with explained(path), contextlib.suppress(FileNotFoundError):
            signature = cache.signature(path)
            before = earlier.get(path)
            if signature is None:
                continue
            if before is not None and before.settled and before.signature == signature:
                found[path] = before
                continue
            settled = time.time_ns() - max(signature[0], signature[3]) > _RACY_NS
            size, digest = _digest(cache.absolute(path))
            found[path] = Reading(size, digest, signature, settled and size == signature[1])
    return found


def _digest(place: str) -> tuple[int, bytes]:
    handle = os.open(place, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0))
    with open(handle, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
        return file.tell(), digest
