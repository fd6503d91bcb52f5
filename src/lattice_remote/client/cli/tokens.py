"""``lattice remote login``, ``trust`` and ``logout``: the user's tokens and trusted servers."""

import asyncio
import getpass
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from lattice_remote.client import credentials, trusted_servers
from lattice_remote.client.cli.common import (
    CaFile,
    Insecure,
    Json,
    Url,
    here,
    lattice_directory,
    notify,
    print_result,
)
from lattice_remote.client.cli.push import connected
from lattice_remote.client.config import Remote, below, parse_url
from lattice_remote.client.trusted_servers import Server
from lattice_remote.errors import ConnectionFailed, Misuse, Rejected, one_line
from lattice_remote.output import counted

__all__ = ["app", "ask_for_token", "hint_of_slash", "listed_projects"]

app = typer.Typer()


@app.command()
def login(url: Url = "", ca_file: CaFile = None, insecure: Insecure = False) -> None:
    """Store this user's token for a server or one project.

    It is typed without echo, or read from stdin, and replaces the previous one.

    Example: lattice remote login https://board.example.org < token.txt
    """
    server_url, slug = _server_and_slug(url)
    server = trusted_servers.name(server_url, insecure=insecure, ca_file=ca_file)
    trusted_servers.admit(server_url, server)
    token = ask_for_token(server_url)
    try:
        checked = asyncio.run(_check(server, slug, token)) if slug else _check_server(server, token)
    except Rejected as error:
        if error.code != "REMOTE_UNAUTHORIZED":
            raise
        raise Rejected(
            f"{server_url} does not accept this token; nothing was stored. An administrator creates one with: "
            f"lattice-remote token create --project {slug or 'SLUG'} --actor human:YOU",
            code=error.code,
        ) from error
    trusted_servers.record(server)
    replaced = credentials.stored(server_url, credentials.ANY_PROJECT) if slug is None else None
    credentials.store(server_url, slug or credentials.ANY_PROJECT, token)
    place = below(server_url, slug) if slug else server_url
    typer.echo(f"Token for {place} is stored in {credentials.tokens_path()} ({one_line(checked)}).")
    if credentials.from_environment() is not None:
        notify("LATTICE_TOKEN is set and precedes any stored token")
    if replaced not in (None, token):
        advice = f"to store a token for one project beside another: lattice remote login {below(server_url, 'PROJECT')}"
        notify(f"the previous token for {server_url} is replaced; {advice}")
    for project in credentials.projects(server_url) if slug is None else ():
        advice = f"replace it: lattice remote login {below(server_url, project)}"
        notify(f"{project} has its own token, which precedes this one; {advice}")


async def _check(server: Server, project: str, token: str) -> str:
    """Check a token. Raises Rejected if the server refuses it, or must not receive it."""
    try:
        async with connected(Remote("origin", server.url, project), token, server) as (_, welcome):
            return f"accepted, acting as {welcome.actor}"
    except ConnectionFailed:
        return "not checked: cannot reach the server"


def _check_server(server: Server, token: str) -> str:
    from lattice_remote.client.connection.dial import fetch_projects

    try:
        slugs = [str(project["slug"]) for project in fetch_projects(server.url, token, server)]
    except Rejected as error:
        if error.code != "REMOTE_NOT_FOUND":
            raise
        raise Rejected(f"there is no server at {server.url}{hint_of_slash(server.url)}", code=error.code) from error
    except ConnectionFailed as error:
        return f"not checked: {error.message}"
    if not slugs:
        return "accepted, for no project"
    try:
        return f"{asyncio.run(_check(server, slugs[0], token))}; for {', '.join(slugs)}"
    except Rejected as error:
        return f"accepted, for {', '.join(slugs)}; {error.message}"


def hint_of_slash(url: str) -> str:
    """Return the other meaning of a server's URL that ends in a slash, "" for another URL."""
    last = url.rstrip("/").rpartition("/")[2]
    return f"; without the slash at its end the URL means project {last!r}" if url.endswith("/") else ""


@app.command()
def projects(url: Url = "", as_json: Json = False) -> None:
    """List the projects that your token may use.

    Example: lattice remote projects https://board.example.org
    """
    server_url, slug = _server_and_slug(url)
    found = listed_projects(server_url, slug)
    if as_json:
        print_result({"url": server_url, "projects": found})
        return
    for project in found:
        typer.echo(f"{project['slug']}\t{one_line(str(project.get('name') or ''))}".rstrip())
    if not found:
        notify(f"the token is for no project of {server_url}")


def listed_projects(url: str, slug: str | None = None) -> list[dict[str, Any]]:
    """Return the projects of a server that this user's token may use. Raises as ``fetch_projects``; Misuse: no
    token.
    """
    known = credentials.projects(url)
    token = credentials.from_environment() or credentials.stored(url, slug or (known[0] if known else ""))
    if token is None:
        raise Misuse(f"no token for {url}; log in with: lattice remote login {url}", code="REMOTE_UNAUTHORIZED")
    from lattice_remote.client.connection.dial import fetch_projects

    named = trusted_servers.from_environment(os.environ.get("LATTICE_REMOTE_URL"))
    try:
        return fetch_projects(url, token, named)
    except ConnectionFailed as error:
        raise ConnectionFailed(f"cannot reach server {url} ({error.message})") from error


@app.command()
def trust(
    url: Url = "",
    *,
    ca_file: CaFile = None,
    insecure: Insecure = False,
    max_cache: Annotated[
        int | None,
        typer.Option("--max-cache", metavar="MIB", min=1, help="Size limit of a cache of this server; else 4096."),
    ] = None,
    header: Annotated[
        list[str] | None,
        typer.Option(metavar="'NAME: VALUE'", help="Sent to this server alone; - reads them, 'NAME:' removes one."),
    ] = None,
    client_cert: Annotated[
        str | None, typer.Option(metavar="FILE", help="Certificate (PEM) for a proxy that asks; '' for none.")
    ] = None,
    client_key: Annotated[str | None, typer.Option(metavar="FILE", help="Its private key, if in another file.")] = None,
    listing: Annotated[
        bool, typer.Option("--list", help="List the trusted servers, without the headers' values.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Trust a server with LATTICE_TOKEN, or set how to verify it.

    A proxy before it that authenticates gets headers or a client certificate.

    Example: lattice remote trust https://board.example.org --header 'CF-Access-Client-Id: 1234.access'
    """
    if listing:
        _list_servers(as_json=as_json)
        return
    server_url, _ = _server_and_slug(url)
    server = trusted_servers.name(
        server_url,
        insecure=insecure,
        ca_file=ca_file,
        max_cache_mib=max_cache,
        headers=_lines(header or []),
        client_cert=client_cert,
        client_key=client_key,
    )
    known = trusted_servers.admit(server_url, server)
    trusted_servers.record(server)
    if as_json:
        print_result(_server_fields(known))
    else:
        typer.echo(f"Tokens may be sent to {server_url} ({_how(known)}); stored in {trusted_servers.servers_path()}.")


def _lines(headers: list[str]) -> Iterator[str]:
    """Yield the header lines; ``-`` stands for those on stdin, as a command line is visible to others."""
    for header in headers:
        yield from filter(str.strip, sys.stdin) if header == "-" else [header]


def _list_servers(*, as_json: bool) -> None:
    servers = trusted_servers.known()
    if as_json:
        print_result({"servers": [_server_fields(server) for server in servers]})
        return
    for server in servers:
        typer.echo(f"{server.url}\t{_how(server)}")


def _server_fields(server: Server) -> dict[str, Any]:
    names = ("url", "insecure", "ca_file", "max_cache_mib", "client_cert", "client_key")
    return {name: getattr(server, name) for name in names} | {"headers": sorted(dict(server.headers))}


def _how(server: Server) -> str:
    how = "TLS"
    if server.url.startswith("http:"):
        how = "over plain HTTP, readable on the way" if server.insecure else "this machine only"
    by = f", verified with {server.ca_file}" if server.ca_file else ""
    as_ = f", with the client certificate {server.client_cert}" if server.client_cert else ""
    sent = f", with the headers {', '.join(sorted(dict(server.headers)))}" if server.headers else ""
    return how + by + as_ + sent


@app.command()
def logout(url: Url = "") -> None:
    """Remove this user's token for a server.

    With the last one, the server is no longer trusted.

    Example: lattice remote logout https://board.example.org
    """
    server_url, slug = _server_and_slug(url)
    gone = credentials.forget(server_url, slug)
    if not credentials.is_known(server_url):
        trusted_servers.forget(server_url)
    typer.echo(
        f"Forgot {counted(gone, 'token')} for {server_url}." if gone else f"There was no token for {server_url}."
    )


def ask_for_token(server_url: str) -> str:
    typed = getpass.getpass(f"Token for {server_url}: ") if sys.stdin.isatty() else sys.stdin.readline()
    if not typed.strip():
        raise Misuse("no token was given; type it, or give it on stdin", code="REMOTE_UNAUTHORIZED")
    return credentials.check_token(typed.strip())


def _server_and_slug(url: str) -> tuple[str, str | None]:
    if url:
        return parse_url(url)
    if lattice_directory() is None:
        raise Misuse("no server is named, and there is no project here; name one: https://board.example.org")
    _, found = here()
    return found.url, found.project
