"""Server settings: ``config.json``, with defaults and bounds. docs/run/configure.md is for people.

An unknown name, a wrong type or a value out of bounds is an error at the start, so that a misspelt setting is noticed.
An omitted setting has its default.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

__all__ = ["Config", "JournalSettings", "LimitSettings", "Tls"]

_Command = Annotated[str, Meta(pattern=r"^[\w-]{1,50}( [\w-]{1,50}){0,3}$")]
_Count = Annotated[int, Meta(ge=1, le=1_000_000)]
_Bytes = Annotated[int, Meta(ge=1, le=1 << 40)]


class LimitSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Limits per token, per address and in total.

    Enforced in ``transport/admission`` (connections, rates, answers), ``transport/websocket`` (messages),
    ``project/connection`` (frames), ``project/queue`` and ``project/uploads``.
    """

    connections_per_token: _Count = 1_000
    connections_per_address: _Count = 2_000
    """Connections that have shown a valid token."""
    new_connections_per_second: _Count = 100
    """From one address, and further HTTP requests on them; ten seconds' worth may come at once. A request with a
    valid token is not refused for it."""
    waiting_connections: _Count = 2_048
    """Connections that have not shown a token yet. Beyond it, the address with the most loses its oldest."""
    waiting_connections_per_address: _Count = 1_024
    failed_logins_per_minute: _Count = 30
    """Requests with no token or an unknown one, from one address; further ones are refused for a time."""
    requests_per_connection: _Count = 256
    """Commands and edits that wait for their reply."""
    requests_per_token: _Count = 512
    """In one project, over all connections of the token."""
    command_seconds: Annotated[float, Meta(ge=1, le=600)] = 30.0
    """Time limit of a command; then it is ended and undone. Waiting for a resource does not count."""
    messages_per_second: _Count = 1_000
    """WebSocket frames on one connection, and HTTP requests with one token; four seconds' worth may come at once."""
    answer_bytes_per_token: _Bytes = 32 * 1024 * 1024
    """Unread HTTP responses of one token. Beyond it no further response is made for the token."""
    answer_bytes: _Bytes = 256 * 1024 * 1024
    """The same of all tokens. A token that has none outstanding is still answered."""
    request_bytes: Annotated[int, Meta(ge=4 * 1024 * 1024, le=32 * 1024 * 1024)] = 32 * 1024 * 1024
    """The largest message that a client may send."""
    text_bytes: Annotated[int, Meta(ge=64 * 1024, le=15 * 1024 * 1024)] = 8 * 1024 * 1024
    """The largest plan or notes. Together with its base text it fits in one message."""
    unfinished_bytes_per_token: Annotated[int, Meta(ge=32 * 1024 * 1024, le=1 << 40)] = 256 * 1024 * 1024
    """Bytes held of unfinished messages and of HTTP requests, over all connections of the token."""
    attachment_bytes: _Bytes = 100 * 1024 * 1024
    """The largest file that a command such as ``attach`` may send."""
    project_bytes: _Bytes = 4 * 1024 * 1024 * 1024
    """The largest project that may be pushed."""
    uploads_per_token: _Count = 256
    """In one project: uploads that are incomplete or not used yet."""
    upload_bytes_per_token: _Bytes = 8 * 1024 * 1024 * 1024
    """In one project: disk space of these."""
    upload_bytes: _Bytes = 32 * 1024 * 1024 * 1024
    """In one project, of all tokens."""


class Tls(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The server's own certificate and private key, two PEM files; without them it speaks plain HTTP."""

    cert: str = ""
    key: str = ""


class JournalSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bounds of each project's journal; a client that was away for longer compares all files on its return.

    Raises ValueError if a segment would exceed the whole.
    """

    max_bytes: Annotated[int, Meta(ge=64 * 1024, le=1 << 40)] = 64 * 1024 * 1024
    """At most this and one segment are on disk."""
    max_age_days: Annotated[float, Meta(gt=0, le=36_500)] = 30.0
    """Also the time for which request ids and idempotency keys are known."""
    segment_bytes: Annotated[int, Meta(ge=4096, le=256 * 1024 * 1024)] = 8 * 1024 * 1024
    """Approximate size of a segment; segments are dropped as a whole."""

    def __post_init__(self) -> None:
        if self.segment_bytes > self.max_bytes:
            raise ValueError("`segment_bytes` is more than `max_bytes`")


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    hooks: bool = True
    """Whether the hooks of the projects' own ``config.json`` run on this server."""
    pushed_hooks: bool = False
    """Whether a project that a client pushes may bring hooks of its own."""
    idle_seconds: Annotated[float, Meta(gt=0, le=31_536_000)] = 300.0
    """Time without a request after which a project's worker and readers end; the next request starts them."""
    journal: JournalSettings = JournalSettings()
    limits: LimitSettings = LimitSettings()
    metrics_listen: str = ""
    """``HOST:PORT`` that serves the metrics, without authentication, and nothing else; "": none."""
    plugin_commands: Annotated[list[_Command], Meta(max_length=256)] = []
    """Commands of lattice plugins installed on this server that clients may run, for example ``deploy note``."""
    sign_in_days: Annotated[float, Meta(gt=0, le=400)] = 30.0
    """Days until a browser must sign in again. Browsers keep no cookie for longer than 400 days."""
    tls: Tls = Tls()
    trusted_proxies: list[str] = []
    """Addresses and networks whose X-Forwarded-For is trusted."""
