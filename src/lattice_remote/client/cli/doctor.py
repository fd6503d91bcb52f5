"""``lattice remote doctor``: checks of this machine's side, each with finding and remedy. Nothing is changed."""

import asyncio
import os
import shutil
import ssl
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from glob import glob
from pathlib import Path

import typer

from lattice_remote.client import agent_runtime, credentials, trusted_servers
from lattice_remote.client.agent_client import agent_enabled, send_if_running
from lattice_remote.client.cache.evidence import Repository
from lattice_remote.client.cli.common import Json, lattice_directory, print_result, tracking_problem
from lattice_remote.client.config import REMOTE_FILE, UNPUSHED_FILE, Remote, is_cache, is_unpushed, read_remote
from lattice_remote.client.launcher.install import is_ours
from lattice_remote.errors import ConnectionFailed, Misuse, Rejected, RemoteError, one_line
from lattice_remote.output import counted

__all__ = ["app"]

_MAX_SKEW_S = 60
_RENEW_DAYS = 14
_ENTRY_POINT = "lattice_remote.client.plugin:register"

app = typer.Typer()


@dataclass(frozen=True, slots=True)
class Diagnosis:
    name: str
    ok: bool
    found: str
    do: str = ""


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check configuration, token, server, clock, agent, git and PATH.

    Nothing is changed. The exit code is 1 if there is a problem.

    Example: lattice remote doctor --json
    """
    checks = list(_checks())
    problems = sum(not check.ok for check in checks)
    if as_json:
        print_result({"problems": problems, "checks": [asdict(check) for check in checks]})
    else:
        for check in checks:
            typer.echo(f"{'ok' if check.ok else 'PROBLEM':<9}{check.name + ':':<15}{one_line(check.found)}")
            if check.do:
                typer.echo(f"{'':<9}{'do:':<15}{one_line(check.do)}")
        typer.echo(f"{counted(problems, 'problem')} found." if problems else "No problems found.")
    if problems:
        raise SystemExit(1)


def _checks() -> Iterator[Diagnosis]:
    remote: Remote | None = None
    directory: str | None = None
    try:
        directory, remote, found = _configured()
        yield Diagnosis("configuration", True, found)
    except RemoteError as error:
        yield Diagnosis("configuration", False, *_split(error))
    token: str | None = None
    if remote is not None:
        try:
            token, found = _token(remote)
            yield Diagnosis("token", True, found)
        except RemoteError as error:
            yield Diagnosis("token", False, *_split(error))
    if remote is not None and token is not None:
        yield from _server(remote, token)
    yield _agent()
    yield _sockets()
    if directory is not None:
        yield _git(directory)
    for name in ("lattice", "lattice-mcp"):
        if (program := shutil.which(name)) is not None:
            yield _program(name, Path(program))
        elif name == "lattice":
            yield Diagnosis(
                name, False, "there is no lattice on the PATH", f"add {Path(sys.executable).parent} to the PATH"
            )


def _split(error: RemoteError, otherwise: str = "") -> tuple[str, str]:
    """Return an error's finding and its remedy, after the last semicolon."""
    finding, separator, remedy = error.message.rpartition("; ")
    return (finding, remedy) if separator else (error.message, otherwise)


def _configured() -> tuple[str, Remote, str]:
    """Return the surrounding ``.lattice``, its remote, and both in words. Raises RemoteError."""
    directory = lattice_directory()
    if directory is None:
        raise Misuse("there is no lattice project here; add one with: lattice remote clone URL")
    if not os.access(directory, os.R_OK | os.X_OK):
        raise Misuse(_foreign(directory, "read it", "lattice remote clone URL"))
    is_waiting = is_unpushed(directory)
    if not is_waiting and not is_cache(directory):
        raise Misuse(
            "this project has no remote: nothing is shared; add one with: lattice remote add origin URL --project SLUG"
        )
    remote = read_remote(directory, UNPUSHED_FILE if is_waiting else REMOTE_FILE)
    trusted_servers.known()
    trusted_servers.from_environment(os.environ.get(trusted_servers.URL_ENV))
    if not os.access(directory, os.W_OK):
        raise Misuse(_foreign(directory, "write there: reads are old", f"lattice remote clone {remote.place}"))
    return directory, remote, f"project {remote.project} on {remote.url}" + (", not pushed yet" if is_waiting else "")


def _foreign(directory: str, cannot: str, clone: str) -> str:
    owner = os.stat(directory).st_uid
    return (
        f"{directory} belongs to the user with id {owner}, and this one ({os.getuid()}) cannot {cannot}; give a common "
        f"group access, or clone your own: {clone}"
    )


def _token(remote: Remote) -> tuple[str, str]:
    given, stored = credentials.from_environment(), credentials.stored(remote.url, remote.project)
    token = given or stored
    if token is None:
        raise Rejected(f"no token for {remote.url}; log in with: lattice remote login {remote.place}")
    precedes = ", which precedes the stored one" if given and stored and given != stored else ""
    return token, f"from {credentials.TOKEN_ENV}{precedes}" if given else f"from {credentials.tokens_path()}"


def _server(remote: Remote, token: str) -> Iterator[Diagnosis]:
    began = time.monotonic()
    try:
        date, expires = asyncio.run(_connect(remote, token))
    except ConnectionFailed as error:
        yield Diagnosis(
            "server",
            False,
            *_split(
                ConnectionFailed(f"cannot reach {remote.url}: {error.message}"),
                "see whether it runs, and whether the URL is right: lattice remote get-url",
            ),
        )
        return
    except RemoteError as error:
        name = "TLS" if error.code == "REMOTE_UNTRUSTED" and "certificate" in error.message else "server"
        finding, remedy = _split(error, "ask its administrator")
        if error.code == "REMOTE_UNAUTHORIZED" and credentials.from_environment() is not None:
            remedy = f"replace or unset {credentials.TOKEN_ENV}, which precedes a login"
        yield Diagnosis(name, False, finding, remedy)
        return
    yield Diagnosis("server", True, f"{remote.url} accepts the token ({(time.monotonic() - began) * 1000:.0f} ms)")
    if remote.url.startswith("https:"):
        yield _certificate(expires)
    if date is not None:
        yield _clock(date)


async def _connect(remote: Remote, token: str) -> tuple[str | None, str | None]:
    """Return the server's clock, and the end of its certificate. Raises RemoteError."""
    from lattice_remote.client.connection.dial import open_socket

    named = trusted_servers.from_environment(os.environ.get(trusted_servers.URL_ENV))
    socket = await open_socket(remote, token, named, lambda: None)
    try:
        certificate = socket.transport.get_extra_info("peercert") or {}
        date = None if socket.response is None else socket.response.headers.get("Date")
        return date, certificate.get("notAfter")
    finally:
        await socket.close()


def _certificate(expires: str | None) -> Diagnosis:
    if expires is None:
        return Diagnosis("TLS", True, "the certificate is verified")
    days = int((ssl.cert_time_to_seconds(expires) - time.time()) // 86_400)
    until = f"the certificate is verified, and expires in {counted(days, 'day')}"
    if days >= _RENEW_DAYS:
        return Diagnosis("TLS", True, until)
    return Diagnosis("TLS", False, until, "its administrator must renew it; then nothing is to be done here")


def _clock(date: str) -> Diagnosis:
    try:
        ahead_s = time.time() - parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError):
        return Diagnosis("clock", True, "the server sends no date")
    if abs(ahead_s) <= _MAX_SKEW_S:
        return Diagnosis("clock", True, "agrees with the server's")
    which = "ahead of" if ahead_s > 0 else "behind"
    return Diagnosis(
        "clock",
        False,
        f"this machine's is {abs(ahead_s):.0f} s {which} the server's: ages and certificates are judged wrongly",
        "set this clock, or the server's: timedatectl set-ntp true",
    )


def _agent() -> Diagnosis:
    if not agent_enabled():
        return Diagnosis("agent", True, "switched off: each command does the same steps itself")
    try:
        answer = send_if_running({"do": "agent-status"})
    except ConnectionFailed as silent:
        return Diagnosis("agent", False, silent.message, "look at that process, and end it if it hangs")
    except RemoteError as error:
        return Diagnosis("agent", False, *_split(error, "lattice remote agent stop"))
    if answer is None:
        return Diagnosis("agent", True, "not running; the next command starts it")
    return Diagnosis(
        "agent", True, f"pid {answer['pid']}, {counted(len(answer['caches']), 'cache')}, log {answer['log']}"
    )


def _sockets() -> Diagnosis:
    advice = f"commands work without the agent, more slowly; set {agent_runtime.DIRECTORY_ENV} to a directory of yours"
    try:
        place = agent_runtime.locate()
        if os.path.lexists(place.directory):
            agent_runtime.check(place)
            if os.path.lexists(place.socket):
                agent_runtime.check_socket(place)
    except RemoteError as error:
        return Diagnosis("sockets", False, error.message, advice)
    except OSError as error:
        return Diagnosis("sockets", False, f"cannot use {place.directory}: {error.strerror}", advice)
    parent = place.directory
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK | os.X_OK):
        return Diagnosis("sockets", False, f"cannot write in {parent}", advice)
    return Diagnosis("sockets", True, place.directory)


def _git(directory: str) -> Diagnosis:
    repository = Repository(directory)
    if not repository.is_there():
        return Diagnosis("git", True, "no repository around this directory")
    if (problem := tracking_problem(repository)) is None:
        return Diagnosis("git", True, "the repository tracks nothing of the cache but its address")
    return Diagnosis("git", False, *problem)


def _program(name: str, path: Path) -> Diagnosis:
    """Check that the program that a shell runs is of an installation with this plugin."""
    real, own = path.resolve(), Path(sys.executable).parent  # not resolved: a venv's python is a link to another's
    if own in (path.parent, real.parent):
        return Diagnosis(name, True, str(path))
    if is_ours(path):
        return Diagnosis(name, True, f"{path}, the launcher")
    packages = [
        found for each in ("site", "dist") for found in glob(f"{real.parent.parent}/lib/python3*/{each}-packages")
    ]
    texts = [Path(found) for place in packages for found in glob(f"{place}/*.dist-info/entry_points.txt")]
    if not packages or any(_ENTRY_POINT in _text(text) for text in texts):
        return Diagnosis(
            name, True, str(path) if packages else f"{path}; its packages are not beside it, and were not checked"
        )
    instead = "lattice remote mcp" if name == "lattice-mcp" else str(own / name)
    return Diagnosis(
        name,
        False,
        f"{path} is of another installation, without lattice-remote: it reads this cache, and fails before it writes",
        f"install lattice-remote beside it, or run {instead} instead",
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
