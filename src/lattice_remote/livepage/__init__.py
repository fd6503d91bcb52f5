"""Lattice's dashboard page, kept up to date by whoever serves it: a script for the page, and the events it listens to.

The script (``live.js``) is asked for as ``remote/live.js`` and listens to ``remote/events``, both relative to the page,
so that it does not matter under which path the page lies. Without the events the page does what it always did: it asks
every five seconds. No I/O here but reading the script.
"""

import json
from importlib.resources import files

__all__ = ["EVENTS", "KEEP_ALIVE", "RETRY_MS", "SCRIPT", "event", "script", "with_script"]

SCRIPT = "remote/live.js"
EVENTS = "remote/events"
"""Where the page finds them, relative to itself."""
RETRY_MS = 1000
"""A browser that has lost the events asks again after this time."""
KEEP_ALIVE = b": still here\n\n"
"""A comment: tells both sides that the other is there. Send one after some seconds of silence."""

_HEAD = b"<head>"


def with_script(page: bytes) -> bytes:
    """Return the page with the script before everything else that it runs; as it is if it has no head."""
    return page.replace(_HEAD, _HEAD + f'\n<script src="{SCRIPT}"></script>'.encode(), 1)


def script() -> bytes:
    """Return the script's text."""
    return files(__package__).joinpath("live.js").read_bytes()


def event(version: str, trouble: str = "") -> bytes:
    """Return one event of a stream: the board is at ``version`` (any text that differs after each change).

    ``trouble`` is one line for people on why the board may be older than it should be.
    """
    data = json.dumps({"version": version, "trouble": trouble})
    return f"retry: {RETRY_MS}\ndata: {data}\n\n".encode()
