"""``lattice remote login``, ``trust`` and ``logout``: the user's tokens and trusted servers."""

import asyncio
import getpass
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from lattice_remote.client import credentials, trusted_servers
from lattice_remote.client.cli import add
from lattice_remote.client.cli.common import CaFile, Insecure, count, here
from lattice_remote.client.config import parse_url
from lattice_remote.errors import one_line

__all__ = ["app", "ask_for_token"]

app = typer.Typer()


@app.command()
def login(
    url: Annotated[str, typer.Argument(help="The project's server by default.")] = "",
    ca_file: CaFile = None,
    insecure: Insecure = False,
) -> None:
    """Store a token for this user, typed without echo or read from stdin; it replaces the previous one.

    Example: lattice remote login https://board.example.org < token.txt
    """
    server_url, slug = _server_and_slug(url)
    server = trusted_servers.name(server_url, insecure=insecure, ca_file=ca_file)
    trusted_servers.admit(server_url, server)
    token = ask_for_token(server_url)
    checked = asyncio.run(add.check_token(server, slug, token)) if slug else "not checked: no project given"
    trusted_servers.record(server)
    credentials.store(server_url, slug or credentials.ANY_PROJECT, token)
    place = f"{server_url}/{slug}" if slug else server_url
    typer.echo(f"Token for {place} is stored in {credentials.tokens_path()} ({one_line(checked)}).")
    for other in _preceding_tokens(server_url, slug):
        typer.echo(f"lattice-remote: {other}", err=True)


def _preceding_tokens(server_url: str, slug: str | None) -> Iterator[str]:
    """Yield remarks about other tokens that precede the one just stored."""
    if credentials.from_environment() is not None:
        yield "LATTICE_TOKEN is set and precedes any stored token"
    for project in credentials.projects(server_url) if slug is None else ():
        advice = f"replace it: lattice remote login {server_url}/{project}"
        yield f"{project} has its own token, which precedes this one; {advice}"


@app.command()
def trust(
    url: Annotated[str, typer.Argument(help="The project's server by default.")] = "",
    ca_file: CaFile = None,
    insecure: Insecure = False,
    max_cache: Annotated[
        int | None,
        typer.Option(
            "--max-cache", metavar="MIB", min=1, help="Size limit of a cache of this server; 4096 by default."
        ),
    ] = None,
) -> None:
    """Trust a server with LATTICE_TOKEN, and set how its certificate is verified.

    Example: lattice remote trust https://board.example.org --ca-file company.pem
    """
    server_url, _ = _server_and_slug(url)
    server = trusted_servers.name(server_url, insecure=insecure, ca_file=ca_file, max_cache_mib=max_cache)
    known = trusted_servers.admit(server_url, server)
    trusted_servers.record(server)
    by = f", verified with {known.ca_file}" if known.ca_file else ""
    how = (
        "over plain HTTP, readable on the way" if known.insecure else "this machine only" if _is_http(known) else "TLS"
    )
    typer.echo(f"Tokens may be sent to {server_url} ({how}{by}); stored in {trusted_servers.servers_path()}.")


@app.command()
def logout(url: Annotated[str, typer.Argument(help="The project's server by default.")] = "") -> None:
    """Remove this user's token; with the last one, the server is no longer trusted.

    Example: lattice remote logout https://board.example.org
    """
    server_url, slug = _server_and_slug(url)
    gone = credentials.forget(server_url, slug)
    if not credentials.is_known(server_url):
        trusted_servers.forget(server_url)
    typer.echo(f"Forgot {count(gone, 'token')} for {server_url}." if gone else f"There was no token for {server_url}.")


def ask_for_token(server_url: str) -> str:
    typed = getpass.getpass(f"Token for {server_url}: ") if sys.stdin.isatty() else sys.stdin.readline()
    return credentials.check_token(typed.strip())


def _is_http(server: trusted_servers.Server) -> bool:
    return server.url.startswith("http:")


def _server_and_slug(url: str) -> tuple[str, str | None]:
    if url:
        return parse_url(url)
    _, found = here()
    return found.url, found.project
