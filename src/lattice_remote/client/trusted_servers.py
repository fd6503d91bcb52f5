"""Servers that this user trusts with a token. Standard library only.

``remote.json`` comes with a clone and may be anyone's: it says where a project is, never what to trust. A token is sent
only to a server that the user has named, in ``servers.json`` or ``LATTICE_REMOTE_URL``, or to the one for which it was
made (``token create --for``). Over plain HTTP it stays on this machine, unless the user chose ``--insecure`` for this
server. A certificate is always verified.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from lattice_remote.client import credentials
from lattice_remote.client.config import parse_url
from lattice_remote.errors import Misuse, Rejected, StorageError

__all__ = [
    "URL_ENV",
    "Server",
    "admit",
    "cache_limit",
    "forget",
    "from_environment",
    "is_loopback",
    "known",
    "name",
    "record",
    "servers_path",
]

URL_ENV = "LATTICE_REMOTE_URL"
"""Names this user's server for commands that find a fresh clone, for example in a container."""
DEFAULT_CACHE_MIB = 4096
_WHAT = "servers"
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}):[ \t]*([\x20-\x7e]{0,8000})")
_OWN_HEADERS = re.compile(
    "authorization|connection|content-.*|expect|host|keep-alive|origin|proxy-.*|sec-.*|te|trailer|transfer-encoding|upgrade"
)


@dataclass(frozen=True, slots=True)
class Server:
    url: str
    """In the form of ``parse_url``."""
    insecure: bool = False
    """Whether a token may be sent over plain HTTP to another machine."""
    ca_file: str | None = None
    """Absolute path of certificate authorities (PEM); None: the system's."""
    max_cache_mib: int | None = None
    """Size limit for a cache; None: ``DEFAULT_CACHE_MIB``."""
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """Secrets for a proxy before the server, sent with every request. An empty value removes one."""
    client_cert: str | None = None
    """Absolute path of this client's certificate (PEM); "" removes it."""
    client_key: str | None = None
    """Absolute path of its private key; None: in the same file."""


def servers_path() -> str:
    return credentials.path_of("servers.json")


def name(
    url: str,
    *,
    insecure: bool = False,
    ca_file: str | None = None,
    max_cache_mib: int | None = None,
    headers: Iterable[str] = (),
    client_cert: str | None = None,
    client_key: str | None = None,
) -> Server:
    """Return a server from options, not stored yet. Raises Misuse."""
    if client_key and not client_cert:
        raise Misuse("--client-key belongs to a certificate; name it too: --client-cert FILE")
    paths: list[str | None] = []
    for option, path in (("--ca-file", ca_file), ("--client-cert", client_cert), ("--client-key", client_key)):
        if path and not url.startswith("https:"):
            raise Misuse(f"{option} requires https; {url} has no TLS")
        if path and not os.path.isfile(path):
            raise Misuse(f"there is no file {path}")
        paths.append(os.path.abspath(path) if path else path)
    ca_path, cert, key = paths
    return Server(url, insecure, ca_path, max_cache_mib, tuple(map(_header, headers)), cert, key)


def _header(line: str) -> tuple[str, str]:
    """Return name and value of ``NAME: VALUE``. Raises Misuse, without the value, which is a secret."""
    match = _HEADER.fullmatch(line.strip())
    if match is None:
        raise Misuse("that is not a header; it looks like 'Name: value', in printable ASCII, or 'Name:' to remove it")
    if _OWN_HEADERS.fullmatch(match[1].lower()):
        raise Misuse(f"the header {match[1]} is lattice-remote's own; a proxy needs another one")
    return match[1].lower(), match[2].strip()


def known() -> list[Server]:
    found = credentials.read(servers_path(), _WHAT)
    return [server for url in sorted(found) if (server := _of(found, url)) is not None]


def record(server: Server) -> None:
    """Store a server; unset fields keep their stored values.

    Raises:
        StorageError: ``servers.json`` cannot be used, and ``LATTICE_REMOTE_URL`` does not name that server.
    """

    def with_it(found: dict[str, Any]) -> dict[str, Any]:
        fields = asdict(_merged(_of(found, server.url), server))
        fields["headers"] = dict(fields["headers"])
        url = fields.pop("url")
        return {**found, url: {name: value for name, value in fields.items() if value or name == "insecure"}}

    try:
        credentials.change(servers_path(), _WHAT, with_it)
    except StorageError:
        if from_environment(os.environ.get(URL_ENV)) != server:
            raise


def forget(url: str) -> None:
    def without(found: dict[str, Any]) -> dict[str, Any] | None:
        return {known: kept for known, kept in found.items() if known != url} if url in found else None

    credentials.change(servers_path(), _WHAT, without)


def admit(url: str, named: Server | None = None, token: str | None = None) -> Server:
    """Return the server at ``url`` if a token, or this one, may be sent there. ``named`` is not recorded yet.

    Raises:
        Rejected: it may not, ``REMOTE_UNTRUSTED``.
        StorageError: the user's files cannot be read.
    """
    known = _of(credentials.read(servers_path(), _WHAT), url)
    if named is not None and named.url == url:
        known = _merged(known, named)
    if known is None and credentials.is_known(url):
        known = Server(url)
    if known is None and token is not None and _is_made_for(token, url):
        known = Server(url)
    if known is None:
        raise Rejected(
            f"no token was sent to {url}: this directory names that server, but you have not; if it is yours: "
            f"lattice remote login {url}, or for LATTICE_TOKEN: lattice remote trust {url}",
            code="REMOTE_UNTRUSTED",
        )
    if url.startswith("http:") and not known.insecure and not is_loopback(url):
        raise Rejected(
            f"no token was sent to {url}: over plain HTTP it can be read on the way; use https, or if the "
            f"network is private: lattice remote trust {url} --insecure",
            code="REMOTE_UNTRUSTED",
        )
    return known


def _is_made_for(token: str, url: str) -> bool:
    from lattice_remote.protocol import mark_of_server

    mark = token.rpartition(".")[2] if token.startswith("ltr_") and "." in token else ""
    return bool(mark) and mark == mark_of_server(url)


def from_environment(given: str | None) -> Server | None:
    """Return the server of ``LATTICE_REMOTE_URL``'s value. Raises Misuse."""
    if not given or not given.strip():
        return None
    try:
        return Server(parse_url(given)[0])
    except Misuse as error:
        raise Misuse(f"{URL_ENV}: {error.message}") from error


def cache_limit(url: str) -> int:
    """Return the size limit in bytes of a server's cache. Raises StorageError."""
    known = _of(credentials.read(servers_path(), _WHAT), url)
    mib = known.max_cache_mib if known is not None and known.max_cache_mib is not None else DEFAULT_CACHE_MIB
    return mib * 1024 * 1024


def is_loopback(url: str) -> bool:
    from ipaddress import ip_address

    host = url.partition("://")[2].partition("/")[0]
    host = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _of(found: dict[str, Any], url: str) -> Server | None:
    kept = found.get(url)
    if kept is None:
        return None
    fields = kept if isinstance(kept, dict) else {"insecure": None}
    insecure, ca_file, mib = fields.get("insecure", False), fields.get("ca_file"), fields.get("max_cache_mib")
    headers, cert, key = fields.get("headers", {}), fields.get("client_cert"), fields.get("client_key")
    texts = [ca_file, cert, key, *(headers.values() if isinstance(headers, dict) else [headers])]
    if (
        not isinstance(insecure, bool)
        or not isinstance(mib, int | None)
        or not all(isinstance(text, str | None) for text in texts)
    ):
        raise StorageError(f"{servers_path()} is not valid; repair it, or remove it and name your servers again")
    try:
        secrets = tuple(_header(f"{name}: {value}") for name, value in (headers or {}).items())
    except Misuse as error:
        raise StorageError(f"{servers_path()}: {error.message}") from error
    return Server(url, insecure, ca_file, mib, secrets, cert, key)


def _merged(before: Server | None, server: Server) -> Server:
    certificate = (server.client_cert or None, server.client_key) if server.client_cert is not None else (None, None)
    before = before or Server(server.url)
    return Server(
        server.url,
        server.insecure or before.insecure,
        server.ca_file or before.ca_file,
        before.max_cache_mib if server.max_cache_mib is None else server.max_cache_mib,
        tuple(pair for pair in {**dict(before.headers), **dict(server.headers)}.items() if pair[1]),
        *((before.client_cert, before.client_key) if server.client_cert is None else certificate),
    )
