"""``lattice-remote``: the administrator's command line.

Errors are one line on stderr that names the remedy, exit 1; a wrong command line is exit 2. Output for scripts (a
token, a listing with --json, the address) is alone on stdout. A command imports only the modules that it needs.
"""

import contextlib
import os
import resource
import socket
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer

import lattice_remote
from lattice_remote.conformance import conformance
from lattice_remote.errors import Misuse, RemoteError
from lattice_remote.server.admin_cli import (
    DataOption,
    JsonOption,
    clusters,
    data_of,
    export_project,
    import_project,
    log,
    projects,
    show,
    tokens,
)
from lattice_remote.server.datadir import DataDir, administered, default_location, remember
from lattice_remote.server.logging import FORMAT_VARIABLE, LEVEL_VARIABLE, log_to_stderr

__all__ = ["NOT_RUNNING", "app", "main"]

NOT_RUNNING = 3
"""Exit code of ``status`` when no server runs, as with ``systemctl status``."""
_OPEN_FILES = 65_536
_FEW_PROJECTS = 3
"""Their processes need not share all memory."""

app = typer.Typer(
    help="The server of lattice-remote: Lattice projects shared by many machines.\n\n"
    "lattice-remote init ./board; lattice-remote --data ./board project create web; "
    "lattice-remote --data ./board start",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(projects, name="project")
app.add_typer(tokens, name="token")
app.add_typer(clusters, name="cluster")
app.command()(conformance)


def main() -> None:
    try:
        app(prog_name="lattice-remote")
    except RemoteError as error:
        print(f"Error: {error.message}", file=sys.stderr)  # noqa: T201 - a command line prints
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"Error: {where}{error.strerror or error}", file=sys.stderr)  # noqa: T201
        sys.exit(1)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"lattice-remote {lattice_remote.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    context: typer.Context,
    data: DataOption = None,
    version: Annotated[  # noqa: ARG001 - the callback prints it
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    context.obj = data


@app.command()
def init(
    context: typer.Context,
    directory: Annotated[Path | None, typer.Argument(metavar="DIR", show_default=False)] = None,
    data: DataOption = None,
) -> None:
    """Create a data directory.

    Example: lattice-remote init ./board
    """
    named = directory or data or context.find_root().obj
    target = administered(named)
    target.create()
    if named is not None:
        remember(target.path)
    target.admin_log.record("init", str(target.path))
    again = "" if _finds(target) else f" --data {target.path}"
    typer.echo(f"Created the data directory {target.path}. Next: lattice-remote{again} project create SLUG")


def _finds(target: DataDir) -> bool:
    try:
        return default_location().absolute() == target.path.absolute()
    except Misuse:
        return False


@app.command()
def start(  # noqa: PLR0917 - Typer calls it
    context: typer.Context,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="PORT", help="The port; 0 picks a free one.")] = 8443,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="PEM file of the TLS certificate.", show_default=False)
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="PEM file of its private key, without a password.", show_default=False),
    ] = None,
    behind_proxy: Annotated[
        list[str] | None,
        typer.Option(metavar="ADDRESS", help="A trusted proxy, or a network of them; may be repeated."),
    ] = None,
    metrics_listen: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Serve metrics on this address, without authentication.", show_default=False
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="URL,URL",
            help="Join a cluster, whose NATS servers these are; later starts remember it.",
            show_default=False,
        ),
    ] = None,
    node: Annotated[
        str | None, typer.Option(metavar="NAME", help="This node's name in the cluster.", show_default="host name")
    ] = None,
    advertise: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The address at which the other nodes reach this one.", show_default=False),
    ] = None,
    cluster_credentials: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="user:password, token or .creds file for NATS.", show_default=False),
    ] = None,
    cluster_ca: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="PEM file of the authorities of NATS and the nodes.", show_default=False),
    ] = None,
    cluster_monitor: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="Monitoring port of a NATS server, for its sync setting.", show_default=False),
    ] = None,
    cluster_replicas: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=5,
            metavar="N",
            help="Copies of each change in NATS; 1 for a trial with one server.",
            show_default="3",
        ),
    ] = None,
    log_format: Annotated[
        Literal["text", "json"], typer.Option(help="Log format: text or JSON.", envvar=FORMAT_VARIABLE)
    ] = "text",
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        typer.Option(help="Log level; warning omits the line per request.", envvar=LEVEL_VARIABLE),
    ] = "info",
    data: DataOption = None,
) -> None:
    """Run the server. Prints one line once it is ready; stops in order on SIGTERM and Ctrl-C.

    Options for TLS, proxies and metrics override tls, trusted_proxies and metrics_listen in config.json.

    Example: lattice-remote --data ./board start --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem
    """
    from lattice_remote.server.cluster.settings import ClusterSettings, load_settings
    from lattice_remote.server.config import Tls
    from lattice_remote.server.project.child_process import Template

    target = data_of(context, data)
    config = target.config()
    if tls_cert is not None or tls_key is not None:
        tls = Tls(cert=str(tls_cert.absolute()) if tls_cert else "", key=str(tls_key.absolute()) if tls_key else "")
        config = msgspec.structs.replace(config, tls=tls)
    if behind_proxy:
        config = msgspec.structs.replace(config, trusted_proxies=behind_proxy)
    if metrics_listen is not None:
        config = msgspec.structs.replace(config, metrics_listen=metrics_listen)
    lock = target.lock()
    assert lock >= 0, "held until this process ends"
    os.environ |= {FORMAT_VARIABLE: log_format, LEVEL_VARIABLE: log_level}
    log_to_stderr("%(asctime)s %(levelname)s %(name)s: %(message)s")
    _allow_many_connections()
    template = Template(is_for_many=len(target.slugs()) > _FEW_PROJECTS)
    template.prepare()  # it loads lattice while this process loads the rest
    from lattice_remote.server.server import bind, run

    with contextlib.closing(template):
        listener = bind(host, port)
        settings = load_settings(target.path)
        named: dict[str, Any] = {
            "servers": cluster.split(",") if cluster is not None else None,
            "node": node,
            "advertise": advertise,
            "credentials": str(cluster_credentials.absolute()) if cluster_credentials else None,
            "ca": str(cluster_ca.absolute()) if cluster_ca else None,
            "monitors": cluster_monitor,
            "replicas": cluster_replicas,
        }
        given = {name: value for name, value in named.items() if value is not None}
        if settings is None and given and cluster is None:
            raise Misuse(f"{target.path} belongs to no cluster yet; name its NATS servers with --cluster")
        if cluster is not None and advertise is None:
            given["advertise"] = f"{'https' if config.tls.cert else 'http'}://{host}:{listener.getsockname()[1]}"
        if settings is None and given:
            settings = ClusterSettings([], socket.gethostname().partition(".")[0], "")
        if settings is not None:
            settings = msgspec.structs.replace(settings, **given)
        run(target, config, listener, template, settings)


def _allow_many_connections() -> None:
    """Raise the limit on open files, often 1,024, as far as allowed and useful."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # the system has another, lower bound
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@app.command()
def status(context: typer.Context, as_json: JsonOption = False, data: DataOption = None) -> None:
    """Show the server's projects, its clients and their lag.

    Asks the server that runs on the data directory, as the same user, and exits with 0.
    If none runs, reads the projects' files and exits with 3.

    Example: lattice-remote --data ./board status --json
    """
    from lattice_remote.server.status import present_status, status_lines

    target = DataDir(data or context.find_root().obj or default_location())
    target.config()
    found = present_status(target)
    show(found, status_lines(found), as_json=as_json)
    raise typer.Exit(0 if found.running else NOT_RUNNING)


app.command()(log)
app.command("import")(import_project)
app.command("export")(export_project)


@app.command()
def fsck(
    context: typer.Context,
    project: Annotated[
        list[str] | None, typer.Option(metavar="SLUG", help="Only this project; may be repeated.", show_default=False)
    ] = None,
    repair: Annotated[bool, typer.Option("--repair", help="Repair the findings; the server must be stopped.")] = False,
    as_json: JsonOption = False,
    data: DataOption = None,
) -> None:
    """Check journals, files, tokens and settings, every byte. Exit code 0: no findings; 1: findings; 2: check failed.

    Example: lattice-remote fsck --project web --repair
    """
    from lattice_remote.server.maintenance import fsck as checking

    target = data_of(context, data)
    try:
        report = checking.fsck(target, checking.chosen(target, project), repair=repair)
    except RemoteError as error:
        typer.echo(f"Error: {error.message}", err=True)
        raise typer.Exit(2) from error
    typer.echo(checking.as_json(report) if as_json else "\n".join(checking.as_lines(report)))
    raise typer.Exit(1 if report.left else 0)
