"""Lattice's dashboard page, kept up to date by whoever serves it: scripts for the page, and the events they listen to.

    requests.js    the page's own paths, below whatever path the page lies; and what came of its requests
    redraw.js      when the page is drawn anew, and what stays as it is
    indicator.js   says in a word whether what is shown is up to date
    live.js        listens to the events
    hosted.js      the way to one's projects, and to signing in (the hosted page only, as what follows)
    listeners.js   the page's handlers, whose own attributes the page's policy forbids (handlers.py)
    editor.js      plan and notes, edited in the page where no editor can be started

They are asked for as one, ``remote/live.js``, with ``remote/live.css``, and listen to ``remote/events``: all relative
to the page, so that it does not matter under which path that lies. Without the events the page does what it always did:
it asks every five seconds. No I/O here but reading the scripts.
"""

import json
import re
from collections.abc import Iterable
from functools import cache
from importlib.resources import files

__all__ = [
    "EVENTS",
    "KEEP_ALIVE",
    "RETRY_MS",
    "SCRIPT",
    "STYLE",
    "event",
    "script",
    "style",
    "with_listeners",
    "with_relative_paths",
    "with_script",
    "without_handlers",
]

SCRIPT = "remote/live.js"
STYLE = "remote/live.css"
EVENTS = "remote/events"
"""Where the page finds them, relative to itself."""
RETRY_MS = 1000
"""A browser that has lost the events asks again after this time."""
KEEP_ALIVE = b": still here\n\n"
"""A comment, for streams whose listeners need no more than that the connection is used."""

_PARTS = ("requests.js", "redraw.js", "indicator.js", "live.js")
_HOSTED_PARTS = ("hosted.js", "listeners.js", "editor.js")
_HEAD = re.compile(rb"<head\b[^>]*>", re.IGNORECASE)
_ABSOLUTE = re.compile(rb"""(\s(?:src|href|action)\s*=\s*["'])/(?!/)""", re.IGNORECASE)


def with_script(page: bytes) -> bytes:
    """Return the page with the script before everything else that it runs; as it is if it has no head."""
    added = f'\n<link rel="stylesheet" href="{STYLE}">\n<script src="{SCRIPT}"></script>'.encode()
    return _HEAD.sub(lambda head: head[0] + added, page, count=1)


def with_relative_paths(page: bytes) -> bytes:
    """Return the page such that what it names from the root of its server is below the page's own path."""
    return _ABSOLUTE.sub(rb"\1", page)


@cache
def script(*, hosted: bool = False) -> bytes:
    """Return the script's text, for a page that the server itself shows or for one on somebody's own machine."""
    return b"\n".join(_read(part) for part in (*_PARTS, *(_HOSTED_PARTS if hosted else ())))


@cache
def style() -> bytes:
    """Return the style sheet's text."""
    return _read("live.css")


def event(version: str, trouble: str = "") -> bytes:
    """Return one event of a stream: the board is at ``version`` (any text that differs after each change).

    ``trouble`` is one line for people on why the board may be older than it should be. Send the same again after some
    seconds of silence: the page takes a stream that says nothing to be dead.
    """
    data = json.dumps({"version": version, "trouble": trouble})
    return f"retry: {RETRY_MS}\ndata: {data}\n\n".encode()


def _read(name: str) -> bytes:
    return files(__package__).joinpath(name).read_bytes()


# Lattice's ``on…`` attributes become listeners, so that a Content-Security-Policy can forbid inline handlers. The page
# builds markup from users' texts; should it fail to escape one, the usual attack is an attribute such as ``onerror``.
# The attributes are renamed to ``data-on-…``, which browsers ignore; ``listeners.js`` runs only calls of functions
# that the page itself names in such attributes, and four fixed statements. If a later version of the page has a handler
# of another form, all attributes stay and the policy must allow them.

_ATTRIBUTE = re.compile(r"""(?<=[\s'"])on([a-z]+)=(\\?)"((?:[^"\\]|\\(?!"))*)\2\"""")
"""In markup, or in a text from which a script makes markup."""
_LEFT = re.compile(r"""(?<=[\s'"])on[a-z]+=\\?["']""")
"""One that is written in another way."""
_SPLICE = re.compile(r"' \+ .+? \+ '")
"""Where a script puts something into such a text."""
_STATEMENT = re.compile(
    r"""\s*(?:location\.hash\s*=\s*'[^'\\]*'|location\.reload\(\)|this\.parentNode\.remove\(\)"""
    r"""|(?:window\.)?([A-Za-z_$][\w$]*)\((?:\s*(?:'[^'\\]*'|event)\s*,?)*\))\s*(?:;|$)"""
)
"""As in listeners.js."""
_HEAD_TAG = re.compile(r"<head\b[^>]*>", re.IGNORECASE)


def with_listeners(page: bytes, scripts: Iterable[bytes] = ()) -> bytes | None:
    """Return the page with other names for its handlers, and with what ``listeners.js`` may do for them.

    ``scripts`` are its own script files, of which ``without_handlers`` is to be served. None when a handler in any of
    this is not understood, or the page has no head.
    """
    try:
        texts = [page.decode(), *(script.decode() for script in scripts)]
    except UnicodeDecodeError:
        return None
    events, calls = set(), set()
    for text in texts:
        if _LEFT.search(_renamed(text)):
            return None
        for event, _, handler in _ATTRIBUTE.findall(text):
            named = _calls(_SPLICE.sub("x", handler).replace("\\'", "'"))
            if named is None:
                return None
            events.add(event)
            calls |= named
    allowed = f'<meta name="remote-handlers" data-events="{_joined(events)}" data-calls="{_joined(calls)}">'
    made, found = _HEAD_TAG.subn(lambda head: f"{head[0]}\n{allowed}", texts[0], count=1)
    return _renamed(made).encode() if found else None


def without_handlers(script: bytes) -> bytes:
    """Return a script of such a page with other names for the handlers that it makes."""
    return _renamed(script.decode()).encode()


def _renamed(text: str) -> str:
    return _ATTRIBUTE.sub(r'data-on-\1=\2"\3\2"', text)


def _calls(handler: str) -> set[str] | None:
    """Return the functions that a handler calls; None when it does anything that is not understood."""
    calls, at = set(), 0
    while at < len(handler):
        statement = _STATEMENT.match(handler, at)
        if statement is None or statement.end() == at:
            return None
        if statement[1]:
            calls.add(statement[1])
        at = statement.end()
    return calls


def _joined(names: set[str]) -> str:
    return " ".join(sorted(names))
