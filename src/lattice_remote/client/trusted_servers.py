"""Servers that this user trusts with a token. Standard library only.

``remote.json`` comes with a clone and may be anyone's: it says where a project is, never what to trust. A token is sent
only to a server that the user has named, in ``servers.json`` beside the tokens or in ``LATTICE_REMOTE_URL``, or to the
one for which it was made (``token create --for``). Over plain
HTTP it stays on this machine, unless the user chose ``--insecure`` for this server. A certificate is always verified.
"""

import os
from dataclasses import asdict, dataclass
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
    "name",
    "record",
    "servers_path",
]

URL_ENV = "LATTICE_REMOTE_URL"
"""Names this user's server for commands that find a fresh clone, for example in a container."""
DEFAULT_CACHE_MIB = 4096
_WHAT = "servers"


@dataclass(frozen=True, slots=True)
class Server:
    """A trusted server."""

    url: str
    """In the form of ``parse_url``."""
    insecure: bool = False
    """Whether a token may be sent over plain HTTP to another machine."""
    ca_file: str | None = None
    """Absolute path of the certificate authorities (PEM) to use instead of the system's; None: the system's."""
    max_cache_mib: int | None = None
    """Size limit for a cache of this server; None: ``DEFAULT_CACHE_MIB``."""


def servers_path() -> str:
    return credentials.path_of("servers.json")


def name(url: str, *, insecure: bool = False, ca_file: str | None = None, max_cache_mib: int | None = None) -> Server:
    """Return a server from the user's options; only ``record`` stores it. Raises Misuse."""
    if ca_file is not None and not url.startswith("https:"):
        raise Misuse(f"--ca-file requires https; {url} is not verified")
    if ca_file is not None and not os.path.isfile(ca_file):
        raise Misuse(f"there is no file {ca_file}")
    return Server(url, insecure, None if ca_file is None else os.path.abspath(ca_file), max_cache_mib)


def record(server: Server) -> None:
    """Store a server; unset fields keep their stored values.

    Raises:
        StorageError: ``servers.json`` cannot be read or written, and ``LATTICE_REMOTE_URL`` does not name that server.
    """

    def with_it(found: dict[str, Any]) -> dict[str, Any]:
        fields = asdict(_merged(_of(found, server.url), server))
        return {**found, fields.pop("url"): fields}

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
        Rejected: it may not, ``REMOTE_UNTRUSTED``; the message names the remedy.
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
    from lattice_remote.text import mark_of_server

    mark = token.rpartition(".")[2] if token.startswith("ltr_") and "." in token else ""
    return bool(mark) and mark == mark_of_server(url)


def from_environment(given: str | None) -> Server | None:
    """Return the server of the value of ``LATTICE_REMOTE_URL``, None if unset or empty. Raises Misuse."""
    if not given or not given.strip():
        return None
    try:
        return Server(parse_url(given)[0])
    except Misuse as error:
        raise Misuse(f"{URL_ENV}: {error.message}") from error


def cache_limit(url: str) -> int:
    """Return the size limit in bytes for one cache of a server. Raises StorageError."""
    known = _of(credentials.read(servers_path(), _WHAT), url)
    mib = known.max_cache_mib if known is not None and known.max_cache_mib is not None else DEFAULT_CACHE_MIB
    return mib * 1024 * 1024


def is_loopback(url: str) -> bool:
    """Return whether traffic to this URL certainly stays on this machine."""
    from ipaddress import ip_address

    host = url.partition("://")[2]
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
    if not isinstance(insecure, bool) or not isinstance(ca_file, str | None) or not isinstance(mib, int | None):
        raise StorageError(f"{servers_path()} is not valid; repair it, or remove it and name your servers again")
    return Server(url, insecure, ca_file, mib)


def _merged(before: Server | None, server: Server) -> Server:
    if before is None:
        return server
    return Server(
        server.url,
        server.insecure or before.insecure,
        server.ca_file or before.ca_file,
        before.max_cache_mib if server.max_cache_mib is None else server.max_cache_mib,
    )
