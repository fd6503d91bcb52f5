"""Starts the process that puts a candidate together and checks it, and listens to what it says."""

import asyncio
import contextlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from lattice_remote.errors import StorageError
from lattice_remote.server.intake.report import Report

__all__ = ["quarantine"]

_COMMAND = (sys.executable, "-P", "-X", "utf8", "-m", "lattice_remote.server.intake.check")
_TIMEOUT_S = 3600.0
"""5,000 tasks take half a minute."""
_MAX_SAID = 300


async def quarantine(
    place: Path,
    source: Sequence[str | Path],
    *,
    max_bytes: int,
    keep_hooks: bool = False,
    hooks_of: Path | None = None,
) -> Report:
    """Put a candidate together in ``place``, a directory that is made here, and have it checked.

    Once this returns a report with nothing ``refused``, ``place`` holds a whole project, on the disk, and nothing else;
    the caller puts it in place or removes it. In any other case there is no ``place`` any more.

    Args:
        place: it must not exist.
        source: ``--pack FILE`` or ``--from DIRECTORY``.
        max_bytes: how large the project, and any file of it, may be.
        keep_hooks: an administrator allows its hooks.
        hooks_of: a ``config.json`` whose hooks it gets in place of its own.

    Raises:
        StorageError: the check can't be made.
    """
    place.mkdir(parents=True)  # noqa: ASYNC240 - a directory, at once
    try:
        report = await _checked(place, source, max_bytes, keep_hooks=keep_hooks, hooks_of=hooks_of)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    if report.refused:
        await asyncio.to_thread(shutil.rmtree, place, ignore_errors=True)
    return report


async def _checked(
    place: Path, source: Sequence[str | Path], max_bytes: int, *, keep_hooks: bool, hooks_of: Path | None
) -> Report:
    options: list[str | Path] = [*source, "--max-bytes", str(max_bytes)]
    if keep_hooks:
        options.append("--keep-hooks")
    if hooks_of is not None:
        options += ["--hooks-of", hooks_of]
    process = await asyncio.create_subprocess_exec(
        *_COMMAND,
        "--into",
        place,
        *options,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C in the server's terminal is the server's to handle
    )
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            stdout, stderr = await process.communicate()
    except TimeoutError:
        return Report(refused=f"checking it takes longer than {_TIMEOUT_S / 60:.0f} minutes")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    try:
        return msgspec.json.decode(stdout, type=Report)
    except msgspec.DecodeError:
        pass
    if process.returncode is not None and process.returncode < 0:
        return Report(refused=f"checking it takes more than it may (ended by signal {-process.returncode})")
    said = " ".join(stderr.decode(errors="replace").split())[-_MAX_SAID:]
    raise StorageError(f"the project can't be checked: {said or f'exit {process.returncode}'}")
