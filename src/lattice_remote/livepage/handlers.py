"""Lattice's ``on…`` attributes, turned into listeners, so that a policy may forbid attributes that run anything.

The page puts markup together from what people have written. Should it ever forget to escape some, the usual way in is
an attribute such as ``onerror``, and a page that needs its own ``on…`` attributes can't have a policy against those. So
they get other names on the way (``data-on-click``), which mean nothing to a browser, and ``listeners.js`` does what
they say: calls of functions that the page itself names in such attributes, and four little things more. It does nothing
else, whatever an attribute says.

A later version of the page may have a handler that is not understood here. Then all stay as they are, and the policy
must let them.
"""

import re
from collections.abc import Iterable

__all__ = ["with_listeners", "without_handlers"]

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
_HEAD = re.compile(r"<head\b[^>]*>", re.IGNORECASE)


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
    made, found = _HEAD.subn(lambda head: f"{head[0]}\n{allowed}", texts[0], count=1)
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
