"""``lattice-remote conformance``: try a server, or try a client with a scripted server (protocol/SPEC.md).

Checks are declared by section, run concurrently within a bound, and reported in order.
"""

import asyncio
import contextlib
import shlex
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer

from lattice_remote.errors import Misuse, one_line

__all__ = [
    "Check",
    "CheckFailed",
    "CheckList",
    "NotOffered",
    "Outcome",
    "all_of",
    "conformance",
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
    total = f"{len(outcomes)} check{'s' if len(outcomes) != 1 else ''}"
    return f"{total}: {counts['ok']} ok, {counts['failed']} failed{optional}; {seconds:.0f} s"


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


TOKEN_VARIABLE = "LATTICE_TOKEN"  # noqa: S105 - the variable's name


def conformance(  # noqa: PLR0917 - Typer calls it
    url: Annotated[
        str,
        typer.Argument(metavar="URL", help="A project: http://HOST:PORT/projects/SLUG.", show_default=False),
    ] = "",
    token: Annotated[
        str, typer.Option(metavar="TOKEN", help="A token of it.", envvar=TOKEN_VARIABLE, show_default=False)
    ] = "",
    client: Annotated[
        str, typer.Option(metavar="COMMAND", help="Try this client instead of a server.", show_default=False)
    ] = "",
    throw_away: Annotated[
        bool, typer.Option("--throw-away", help="The project may have tasks: further ones are added to it.")
    ] = False,
    only: Annotated[str, typer.Option(metavar="TEXT", help="Only checks whose section or name has this text.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a server or a client against the protocol.

    A server gets frames that the protocol allows and forbids. Use a project of its own: tasks, plans and artifacts are
    added. A client plays with a scripted server, in temporary directories: COMMAND URL DIR must keep DIR/.lattice
    current until it gets SIGTERM, COMMAND URL DIR ARGV... must run one command of lattice; the token is in
    LATTICE_TOKEN. Both take about a minute. Exit code 0: all checks hold; 1: some do not; 2: they cannot be made.

    Example: lattice-remote conformance http://127.0.0.1:8443/projects/scratch --token ltr_...

    Example: lattice-remote conformance --client "python3 examples/standalone_client.py"
    """
    if bool(url) == bool(client):
        raise typer.BadParameter("name a server's project or, with --client, a client")
    if client:
        raise typer.Exit(asyncio.run(_try_client(client, only=only, as_json=as_json)))
    if not url.startswith(("http://", "https://")) or "/projects/" not in url:
        raise typer.BadParameter("URL is the address of a project, such as http://127.0.0.1:8443/projects/scratch")
    if not token:
        raise typer.BadParameter(f"name a token of the project with --token or {TOKEN_VARIABLE}")
    raise typer.Exit(asyncio.run(_try_server(url, token, may_be_in_use=throw_away, only=only, as_json=as_json)))


async def _try_server(url: str, token: str, *, may_be_in_use: bool, only: str, as_json: bool) -> int:
    from lattice_remote.conformance import server_checks
    from lattice_remote.conformance.probe import ServerTarget

    checks, target = chosen(server_checks.CHECKS, only), ServerTarget(url, token)
    if not as_json:
        typer.echo(f"Trying {target.url}. The checks add tasks, plans and artifacts to this project.")
    try:
        await server_checks.prepare(target, may_be_in_use=may_be_in_use)
    except CheckFailed as error:
        typer.echo(f"Error: {one_line(str(error))}", err=True)
        return 2
    return await _report(run_checks(checks, target, concurrency=6), as_json=as_json)


async def _try_client(command: str, *, only: str, as_json: bool) -> int:
    from lattice_remote.conformance import client_checks

    checks, argv = chosen(client_checks.CHECKS, only), shlex.split(command)
    if not argv or shutil.which(argv[0]) is None:
        raise Misuse(f"there is no command {command!r}")
    if not as_json:
        typer.echo(f"Trying {command}. The server is a scripted one, the directories are temporary.")
    with tempfile.TemporaryDirectory(prefix="lattice-conformance-") as directory:
        target = client_checks.ClientTarget(argv, Path(directory))
        return await _report(run_checks(checks, target, concurrency=4), as_json=as_json)


def chosen[T](checks: CheckList[T], text: str) -> CheckList[T]:
    """Return the checks whose section or name has this text. Raises Misuse: there is none."""
    found = CheckList(check for check in checks if text.casefold() in f"{check.section} {check.name}".casefold())
    if not found:
        raise Misuse(f"no check has {text!r} in its section or name")
    return found


async def _report(outcomes: AsyncIterator[Outcome], *, as_json: bool) -> int:
    began, found = time.monotonic(), list[Outcome]()
    async for outcome in outcomes:
        found.append(outcome)
        if not as_json:
            typer.echo(outcome.line())
    failed = [outcome for outcome in found if outcome.result == "failed"]
    if as_json:
        report: dict[str, Any] = {"ok": not failed, "checks": found}
        typer.echo(msgspec.json.encode(report).decode())
    else:
        typer.echo(summary(found, time.monotonic() - began))
    return 1 if failed else 0
