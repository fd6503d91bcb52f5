"""``config.json``: every setting of a server, its default and its bounds. People read docs/configuration.md.

An unknown name, a wrong type or a value out of bounds is an error at the start, so that a misspelt setting is
noticed. A setting that is left out has its default.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

__all__ = ["Config", "JournalSettings", "LimitSettings", "Tls"]

_Command = Annotated[str, Meta(pattern=r"^[\w-]{1,50}( [\w-]{1,50}){0,3}$")]
_Count = Annotated[int, Meta(ge=1, le=1_000_000)]
_Bytes = Annotated[int, Meta(ge=1, le=1 << 40)]


class LimitSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one token, one address and everybody together may take. An IPv6 address stands for its /64."""

    connections_per_token: _Count = 1_000
    connections_per_address: _Count = 2_000
    """Connections that have shown a valid token."""
    new_connections_per_second: _Count = 100
    """From one address, and further HTTP requests on them; ten seconds' worth may come at once. A request that shows a
    valid token is not refused for it."""
    waiting_connections: _Count = 2_048
    """Connections that have not shown a token yet. One more, and the address with the most loses its oldest."""
    waiting_connections_per_address: _Count = 1_024
    failed_logins_per_minute: _Count = 30
    """Requests with no token or an unknown one, from one address; further ones are told to come back later."""
    requests_per_connection: _Count = 256
    """Commands and edits that wait for their answer."""
    requests_per_token: _Count = 512
    """In one project, over all connections of the token."""
    command_seconds: Annotated[float, Meta(ge=1, le=600)] = 30.0
    """A command that takes longer is ended and undone. Waiting for a resource does not count."""
    messages_per_second: _Count = 1_000
    """WebSocket frames on one connection, and HTTP requests with one token; four seconds' worth may come at once."""
    answer_bytes_per_token: _Bytes = 32 * 1024 * 1024
    """Of answers over HTTP that are not taken yet. With so many outstanding no further one is made for the token."""
    answer_bytes: _Bytes = 256 * 1024 * 1024
    """The same of all tokens. A token that has none outstanding is still answered."""
    request_bytes: Annotated[int, Meta(ge=4 * 1024 * 1024, le=32 * 1024 * 1024)] = 32 * 1024 * 1024
    """The largest message that a client may send."""
    text_bytes: Annotated[int, Meta(ge=64 * 1024, le=15 * 1024 * 1024)] = 8 * 1024 * 1024
    """The largest plan or notes. With the text that an edit was made from it fits in one message."""
    unfinished_bytes_per_token: Annotated[int, Meta(ge=32 * 1024 * 1024, le=1 << 40)] = 256 * 1024 * 1024
    """What is kept of messages that have not come to their end, over all connections of the token."""
    attachment_bytes: _Bytes = 100 * 1024 * 1024
    """The largest file that a command may bring, as ``attach`` does."""
    project_bytes: _Bytes = 4 * 1024 * 1024 * 1024
    """The largest project that may be pushed."""
    uploads_per_token: _Count = 256
    """In one project: contents that are on their way, or not used yet."""
    upload_bytes_per_token: _Bytes = 8 * 1024 * 1024 * 1024
    """In one project: what these may take on the disk."""
    upload_bytes: _Bytes = 32 * 1024 * 1024 * 1024
    """In one project, of all tokens."""


class Tls(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The server's own certificate and private key, two PEM files; with neither it speaks plain HTTP."""

    cert: str = ""
    key: str = ""


class JournalSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How much of each project's journal is kept; a client that was away for longer compares all files when it is back.

    Raises ValueError when a segment would be more than the whole.
    """

    max_bytes: Annotated[int, Meta(ge=64 * 1024, le=1 << 40)] = 64 * 1024 * 1024
    """On disk are at most this and one segment."""
    max_age_days: Annotated[float, Meta(gt=0, le=36_500)] = 30.0
    segment_bytes: Annotated[int, Meta(ge=4096, le=256 * 1024 * 1024)] = 8 * 1024 * 1024
    """Its segments, which are dropped as a whole, are about this large."""

    def __post_init__(self) -> None:
        if self.segment_bytes > self.max_bytes:
            raise ValueError("`segment_bytes` is more than `max_bytes`")


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """All settings. ``DataDir.config()`` reads them."""

    hooks: bool = True
    """Whether the hooks of the projects' own ``config.json`` run on this server."""
    pushed_hooks: bool = False
    """Whether a project that a client pushes may bring hooks of its own."""
    journal: JournalSettings = JournalSettings()
    limits: LimitSettings = LimitSettings()
    metrics_listen: str = ""
    """``HOST:PORT`` on which the figures are served to whoever can reach it, and nothing else; "": nowhere."""
    plugin_commands: Annotated[list[_Command], Meta(max_length=256)] = []
    """Commands of this server's own lattice plugins that clients may run, as ``deploy note``."""
    sign_in_days: Annotated[float, Meta(gt=0, le=400)] = 30.0
    """After how long a browser must sign in again. Browsers keep no cookie for longer than 400 days."""
    tls: Tls = Tls()
    trusted_proxies: list[str] = []
    """Addresses and networks whose X-Forwarded-For is believed."""
