"""Checks of one implementation: declared by section, run concurrently within a bound, reported in order."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from lattice_remote.errors import one_line

__all__ = [
    "Check",
    "CheckFailed",
    "CheckList",
    "NotOffered",
    "Outcome",
    "all_of",
    "expect",
    "run_checks",
    "summary",
    "within",
]

CHECK_TIMEOUT_S = 45.0
"""Of one check; the whole takes at most this for each ``concurrency`` checks."""


class CheckFailed(Exception):
    """The implementation violates the specification."""


class NotOffered(Exception):
    """The implementation lacks an optional part."""


def expect(condition: object, message: str) -> None:
    if not condition:
        raise CheckFailed(message)


@contextlib.asynccontextmanager
async def within(seconds: float, what: str) -> AsyncIterator[None]:
    """Bound a wait. Raises CheckFailed."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise CheckFailed(f"no {what} within {seconds:.0f} s") from None


async def all_of(parts: Iterable[Coroutine[None, None, None]]) -> None:
    """Run the parts of a check concurrently, until one fails."""
    try:
        async with asyncio.TaskGroup() as group:
            for part in parts:
                group.create_task(part)
    except* CheckFailed as failures:
        raise CheckFailed(str(failures.exceptions[0])) from None


@dataclass(frozen=True)
class Check[T]:
    section: str
    """Of SPEC.md, or the invariant."""
    name: str
    run: Callable[[T], Awaitable[None]]


class CheckList[T](list[Check[T]]):
    def __call__(
        self, section: str, name: str
    ) -> Callable[[Callable[[T], Awaitable[None]]], Callable[[T], Awaitable[None]]]:
        def add(run: Callable[[T], Awaitable[None]]) -> Callable[[T], Awaitable[None]]:
            self.append(Check(section, name, run))
            return run

        return add


class Outcome(msgspec.Struct, frozen=True):
    section: str
    name: str
    result: Literal["ok", "failed", "not offered"]
    message: str = ""
    seconds: float = 0.0

    def line(self) -> str:
        mark = {"ok": "ok     ", "failed": "FAILED ", "not offered": "-      "}[self.result]
        return f"{mark} {self.section:<8} {self.name}" + (f": {self.message}" if self.message else "")


def summary(outcomes: Sequence[Outcome], seconds: float) -> str:
    counts = {result: sum(each.result == result for each in outcomes) for result in ("ok", "failed", "not offered")}
    optional = f", {counts['not offered']} not offered" if counts["not offered"] else ""
    return f"{len(outcomes)} checks: {counts['ok']} ok, {counts['failed']} failed{optional}; {seconds:.0f} s"


async def run_checks[T](checks: Iterable[Check[T]], target: T, *, concurrency: int) -> AsyncIterator[Outcome]:
    turn = asyncio.Semaphore(concurrency)

    async def run(check: Check[T]) -> Outcome:
        async with turn:
            began = time.monotonic()
            result, message = await _judge(check, target)
            return Outcome(check.section, check.name, result, message, round(time.monotonic() - began, 3))

    tasks = [asyncio.create_task(run(check)) for check in checks]
    try:
        for task in tasks:
            yield await task
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


async def _judge[T](check: Check[T], target: T) -> tuple[Literal["ok", "failed", "not offered"], str]:
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            await check.run(target)
    except NotOffered as reason:
        return "not offered", str(reason)
    except TimeoutError:
        return "failed", f"not over after {CHECK_TIMEOUT_S:.0f} s"
    except CheckFailed as error:
        return "failed", one_line(str(error))
    except Exception as error:  # noqa: BLE001 - an implementation may surprise a check in any way
        return "failed", one_line(f"unexpected: {type(error).__name__}: {error}")
    return "ok", ""
