"""Routing of a remote project's commands: reads run here on the cache, everything else on the server.

Click parses every command line here, so usage errors and ``--help`` are its own. Imports only the standard library and
modules that lattice has imported.
"""

import atexit
import base64
import contextlib
import copy
import os
import sys
from functools import partial
from typing import Any, NoReturn

import click

from lattice_remote.client.agent_client import (
    ensure_current,
    request,
    request_id,
    send_request,
    stay_connected,
)
from lattice_remote.client.attachments import CallersFiles
from lattice_remote.client.config import UNPUSHED_FILE, is_unpushed, read_remote
from lattice_remote.errors import Misuse, RemoteError, one_line

__all__ = ["NeedsOwnProcess", "hooked", "in_warm_process", "is_plugins"]

in_warm_process = False
"""Whether this is the warm process's child: only reads of the cache and routed writes may run here."""

_READS = {
    ("comments",),
    ("dashboard",),
    ("doctor",),
    ("list",),
    ("next",),
    ("plan",),
    ("resource", "list"),
    ("resource", "status"),
    ("session", "list"),
    ("session", "show"),
    ("show",),
    ("stats",),
    ("weather",),
}
"""Commands that only read the project, with the exceptions in ``_is_read``."""
_PROJECTLESS = {
    ("demo", "init"),
    ("init",),
    ("plugins",),
    ("restart",),
    ("setup-claude",),
    ("setup-claude-skill",),
    ("setup-codex",),
    ("setup-openclaw",),
    ("setup-prompt",),
}
"""Commands independent of the project's data."""


class NeedsOwnProcess(BaseException):
    """The command must not run in the warm process; it has done nothing yet."""


def _note_requirement(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    ctx.meta[parameter.name] = value


_REQUIRE_CURRENT = click.Option(
    ["--require-current"],
    is_flag=True,
    expose_value=False,
    callback=_note_requirement,
    help="Fail if the cache cannot be brought up to date.",
)


def hooked(command: click.Command, path: tuple[str, ...], directory: str, argv: list[str]) -> click.Command:
    if in_warm_process and not isinstance(command, click.Group) and is_plugins(command):
        raise NeedsOwnProcess
    twin = copy.copy(command)
    if isinstance(command, click.Group):
        inner = command.resolve_command

        def resolve_command(ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
            name, found, rest = inner(ctx, args)
            if name is not None and found is not None:
                found = hooked(found, (*path, name), directory, argv)
            return name, found, rest

        twin.resolve_command = resolve_command  # type: ignore[attr-defined]
    else:
        if path in _READS:
            twin.params = [*command.params, _REQUIRE_CURRENT]
        twin.invoke = partial(_invoke, command, path, directory, argv)  # type: ignore[method-assign]
    return twin


def _invoke(command: click.Command, path: tuple[str, ...], directory: str, argv: list[str], ctx: click.Context) -> Any:
    if in_warm_process and not _may_run_warm(path, ctx, directory):
        raise NeedsOwnProcess
    try:
        if path == ("init",):
            _warn_of_init(ctx.params["target_path"], directory)
        if path in _PROJECTLESS:
            return _run_here(command, ctx, directory)
        if is_unpushed(directory):
            _require_read(path, ctx, directory)
            return _run_here(command, ctx, directory)
        if is_plugins(command) and " ".join(path) not in read_remote(directory).commands:
            return _run_plugin(command, path, ctx, directory)
        if _is_read(path, ctx):
            if path == ("dashboard",):
                read_remote(directory)  # without remote.json the page could not save
            is_required = ctx.meta.get(_REQUIRE_CURRENT.name, False)
            ensure_current(directory, partial(click.echo, err=True), _progress(), is_required=is_required)
            if path == ("dashboard",):
                return _serve_dashboard(command, ctx, directory)
            _run_here(command, ctx, directory)
            _leave(ctx, 0)
        return _run_there(command, path, ctx, directory, argv)
    except RemoteError as error:
        fail(error, is_json=bool(ctx.params.get("output_json")))


def _may_run_warm(path: tuple[str, ...], ctx: click.Context, directory: str) -> bool:
    """Return whether the warm process may run a command: it reads no file of the caller, serves nothing and starts no
    program but git.
    """
    if path in _PROJECTLESS or path == ("dashboard",) or is_unpushed(directory):
        return False
    return not CallersFiles.are_named(path, ctx)


def is_plugins(command: click.Command) -> bool:
    return not getattr(command.callback, "__module__", "").startswith("lattice.")


def _warn_of_init(target: str, directory: str) -> None:
    root = os.path.realpath(os.path.dirname(directory))
    inside = os.path.commonpath([root, os.path.realpath(target)]) == root
    has_one = os.path.isdir(os.path.join(target, ".lattice"))
    if not inside or (has_one and os.path.realpath(target) != root):
        return
    with contextlib.suppress(RemoteError):  # other commands report a damaged remote.json
        remote = read_remote(directory)
        this = f"a cache of project {remote.project} on {remote.url}"
        if has_one:
            notice = f"this is {this}: there is nothing to initialise, any lattice command fetches its files"
        else:
            notice = f"the directory is inside {root}, {this}; this creates a separate project, which is not shared"
        click.echo(f"lattice-remote: {one_line(notice)}", err=True)


def _is_read(path: tuple[str, ...], ctx: click.Context) -> bool:
    if path == ("doctor",):
        return not ctx.params.get("fix")
    if path == ("next",):
        # With a session's name even a read writes: it touches the session's file.
        session = ctx.params.get("session_name") or (ctx.obj or {}).get("_session_name")
        return not ctx.params.get("claim") and session is None
    return path in _READS


def _require_read(path: tuple[str, ...], ctx: click.Context, directory: str) -> None:
    """Allow only reads while the project waits to be pushed. Raises Misuse."""
    remote = read_remote(directory, UNPUSHED_FILE)
    if not _is_read(path, ctx):
        raise Misuse(
            f"this project is not pushed to {remote.place} yet: lattice remote push; or keep it local: "
            f"lattice remote remove {remote.name}"
        )
    click.echo(f"lattice-remote: not pushed to {remote.place} yet; next: lattice remote push", err=True)


def fail(error: RemoteError, *, is_json: bool) -> None:
    from lattice.cli.helpers import output_error

    output_error(error.message, error.code, is_json)


def _serve_dashboard(command: click.Command, ctx: click.Context, directory: str) -> Any:
    from lattice_remote.client.dashboard import remote_dashboard

    with stay_connected(), remote_dashboard(directory):
        return _run_here(command, ctx, directory)


def _run_plugin(command: click.Command, path: tuple[str, ...], ctx: click.Context, directory: str) -> Any:
    """Run a plugin's command here, on a cache as current as possible."""
    try:
        ensure_current(directory, partial(click.echo, err=True), _progress())
    except RemoteError as error:  # it may not need the project's files
        click.echo(f"lattice-remote: {one_line(error.message)}", err=True)
    return _run_here(command, ctx, directory, plugins=" ".join(path))


def _run_here(command: click.Command, ctx: click.Context, directory: str, *, plugins: str = "") -> Any:
    """Run under the guard; a refusal that the command swallowed still fails it."""
    from lattice_remote.client.guard import Guard  # a routed command needs none

    guard = Guard(directory, plugins=plugins)
    guard.start()
    try:
        result = command.invoke(ctx)
    finally:
        guard.stop()
    if guard.refused is not None:
        raise guard.refused
    return result


def _run_there(
    command: click.Command, path: tuple[str, ...], ctx: click.Context, directory: str, argv: list[str]
) -> None:
    with CallersFiles.of_command(command, path, ctx, argv) as files:
        # The id is created here, so that the command runs once even if the agent is killed and asked again (I6).
        asked = request("run", directory, argv=files.argv, files=files.described, **request_id())
        asked["own_connection"] = _waits(path, ctx)
        answer = send_request(asked, _progress())
    # The bytes as the server's lattice wrote them; Click handles a closed pipe.
    click.echo(base64.b64decode(answer["stdout"]), nl=False)
    click.echo(base64.b64decode(answer["stderr"]), nl=False, err=True)
    for notice in answer["notices"]:
        click.echo(f"lattice-remote: {one_line(notice)}", err=True)
    _leave(ctx, answer["exit_code"])


def _leave(ctx: click.Context, exit_code: int) -> NoReturn:
    """End the command, in its own process at once: interpreter shutdown takes a tenth of its time."""
    own = os.path.basename(sys.argv[0]) == "lattice" and sys.stdout is sys.__stdout__
    if own and sys.stdout is not None and sys.stderr is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()
        os._exit(exit_code)
    ctx.exit(exit_code)


def _waits(path: tuple[str, ...], ctx: click.Context) -> bool:
    return path == ("resource", "acquire") and bool(ctx.params.get("do_wait"))


def _progress() -> Any:
    if sys.stderr is None or not sys.stderr.isatty():
        return None

    def show(progress: dict[str, Any]) -> None:
        sys.stderr.write(f"\r\x1b[Klattice-remote: {progress['what']} {progress['done']}/{progress['total']}")
        if progress["done"] >= progress["total"]:
            sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()

    return show
