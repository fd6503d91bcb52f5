"""Live updates of lattice's dashboard page: scripts for the page, and the events they listen to. No other I/O.

    requests.js    the page's paths, relative to its own; the results of its requests
    libraries.js   libraries from other servers, without which the page works
    cards.js       the board, drawn card by card
    redraw.js      when the page is redrawn, and what is kept
    indicator.js   whether the page is up to date, in a word
    live.js        the event stream
    keyboard.js    tabs and cards in reach of the keyboard
    hosted.js      project, person, signing in and out (this and the rest: hosted page only)
    listeners.js   listeners instead of the page's ``on…`` attributes, which its policy forbids
    editor.js      editor for plans and notes, where no external editor can be started

The page requests them as one file, ``remote/live.js``, with ``remote/live.css``, and listens to ``remote/events``.
These paths are relative to the page, so it works below any path. Without the events the page polls every five seconds,
as without these scripts.
"""

import html
import json
import re
from collections.abc import Iterable
from functools import cache
from importlib.resources import files

__all__ = [
    "EVENTS",
    "RETRY_MS",
    "SCRIPT",
    "STYLE",
    "event",
    "script",
    "style",
    "with_identity",
    "with_listeners",
    "with_relative_paths",
    "with_script",
    "without_handlers",
]

SCRIPT = "remote/live.js"
STYLE = "remote/live.css"
EVENTS = "remote/events"
RETRY_MS = 1000
"""Delay after which a browser reconnects."""

_PARTS = ("requests.js", "libraries.js", "cards.js", "redraw.js", "indicator.js", "live.js", "keyboard.js")
_HOSTED_PARTS = ("hosted.js", "listeners.js", "editor.js")
_HEAD = re.compile(rb"<head\b[^>]*>", re.IGNORECASE)
_FOREIGN = re.compile(rb"""(<script\s+)src=(?=["']https://)""", re.IGNORECASE)
_DEFERRED = re.compile(rb"""(<script\s+)src=(?=["'][^"'>]*["']\s+defer\s*>)""", re.IGNORECASE)
_TITLE = re.compile(rb"<title>[^<]*</title>", re.IGNORECASE)
_ABSOLUTE = re.compile(rb"""(\s(?:src|href|action|data-remote-src)\s*=\s*["'])/(?!/)""", re.IGNORECASE)


def with_script(page: bytes) -> bytes:
    """Return the page with the script before its own; unchanged if it has no head."""
    page = _FOREIGN.sub(rb'\1type="text/plain" data-remote-src=', page)
    page = _DEFERRED.sub(rb'\1type="text/plain" data-remote-src=', page)
    added = f'\n<link rel="stylesheet" href="{STYLE}">\n<script src="{SCRIPT}"></script>'.encode()
    return _HEAD.sub(lambda head: head[0] + added, page, count=1)


def with_relative_paths(page: bytes) -> bytes:
    """Return the page with paths relative to its own instead of the server's root."""
    return _ABSOLUTE.sub(rb"\1", page)


def with_identity(page: bytes, project: str, person: str, *, reads_only: bool) -> bytes:
    """Return the page with the project's name as its title, and the signed-in person for ``hosted.js``."""
    name, who = html.escape(project), html.escape(person)
    rights = ' data-reads-only=""' if reads_only else ""
    added = f'\n<meta name="remote-page" data-project="{name}" data-person="{who}"{rights}>'.encode()
    title = f"<title>{name} · Lattice</title>".encode()
    return _HEAD.sub(lambda head: head[0] + added, _TITLE.sub(lambda _: title, page, count=1), count=1)


@cache
def script(*, hosted: bool = False) -> bytes:
    return b"\n".join(_read(part) for part in (*_PARTS, *(_HOSTED_PARTS if hosted else ())))


@cache
def style() -> bytes:
    return _read("live.css")


def event(version: str, trouble: str = "") -> bytes:
    """Return one event of a local dashboard: the cache is at ``version``, a text that differs after each change.

    ``trouble`` is one line for users on why the cache may be out of date. Repeat the event after some seconds of
    silence:
    the page treats a silent stream as dead.
    """
    data = json.dumps({"trouble": trouble})
    return f"retry: {RETRY_MS}\nevent: position\nid: {version}\ndata: {data}\n\n".encode()


def _read(name: str) -> bytes:
    return files(__package__).joinpath(name).read_bytes()


# Lattice's ``on…`` attributes become listeners, so that a Content-Security-Policy can forbid inline handlers. The page
# builds markup from users' texts; should it fail to escape one, the usual attack is an attribute such as ``onerror``.
# The attributes are renamed to ``data-on-…``, which browsers ignore; ``listeners.js`` runs only calls of functions
# that the page itself names in such attributes, and four fixed statements. If a later version of the page has a handler
# of another form, all attributes stay and the policy must allow them.

_ATTRIBUTE = re.compile(r"""(?<=[\s'"])on([a-z]+)=(\\?)"((?:[^"\\]|\\(?!"))*)\2\"""")
"""In markup, or in a string from which a script makes markup."""
_LEFT = re.compile(r"""(?<=[\s'"])on[a-z]+=\\?["']""")
"""A handler in any other notation."""
_SPLICE = re.compile(r"' \+ .+? \+ '")
"""A value that a script inserts into such a string."""
_STATEMENT = re.compile(
    r"""\s*(?:location\.hash\s*=\s*'[^'\\]*'|location\.reload\(\)|this\.parentNode\.remove\(\)"""
    r"""|(?:window\.)?([A-Za-z_$][\w$]*)\((?:\s*(?:'[^'\\]*'|event)\s*,?)*\))\s*(?:;|$)"""
)
"""The same as in listeners.js."""
_HEAD_TAG = re.compile(r"<head\b[^>]*>", re.IGNORECASE)


def with_listeners(page: bytes, scripts: Iterable[bytes] = ()) -> bytes | None:
    """Return the page with renamed handlers and a list of the calls that ``listeners.js`` may make.

    ``scripts`` are the page's script files, to be served through ``without_handlers``. None if any handler in them has
    an unknown form, or the page has no head.
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
    return _renamed(script.decode()).encode()


def _renamed(text: str) -> str:
    return _ATTRIBUTE.sub(r'data-on-\1=\2"\3\2"', text)


def _calls(handler: str) -> set[str] | None:
    """Return the functions that a handler calls; None if it has another statement."""
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
