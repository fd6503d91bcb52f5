"""Lattice's own handlers under other names: those of the installed page are all understood, and nothing else is."""

import re
from importlib.resources import files

import pytest

from lattice_remote.livepage import with_listeners, without_handlers

STATIC = files("lattice.dashboard") / "static"
PAGE, CUBE = (STATIC / "index.html").read_bytes(), (STATIC / "cube3d.js").read_bytes()


def page(body: str) -> bytes:
    return f"<html><head></head><body>{body}</body></html>".encode()


def test_the_installed_page_has_no_handler_left() -> None:
    made = with_listeners(PAGE, [CUBE])
    assert made is not None
    handlers = re.compile(rb"""\son[a-z]+=\\?["']""")
    assert handlers.search(PAGE) and handlers.search(CUBE)
    assert not handlers.search(made) and not handlers.search(without_handlers(CUBE))
    [events, calls] = re.findall(rb'data-(?:events|calls)="([^"]*)"', made)
    assert {b"click", b"dragstart", b"drop"} <= set(events.split())
    assert {b"openPlans", b"_boardDrop"} <= set(calls.split())
    assert not {b"eval", b"fetch", b"setTimeout"} & set(calls.split())


def test_nothing_else_of_it_is_changed() -> None:
    made = with_listeners(PAGE, [CUBE])
    assert made is not None
    back = re.sub(rb'\n<meta name="remote-handlers"[^>]*>', b"", made).replace(b"data-on-", b"on")
    assert back == PAGE


@pytest.mark.parametrize(
    "handler",
    [
        "location.reload()",
        "location.hash='#/web'",
        "this.parentNode.remove()",
        "open1('a', 'b'); window.two(event); three();",
    ],
)
def test_handlers_are_replaced_by_listeners(handler: str) -> None:
    made = with_listeners(page(f'<b onclick="{handler}">'))
    assert made is not None and f'<b data-on-click="{handler}">'.encode() in made


@pytest.mark.parametrize(
    "body",
    [
        '<b onclick="a.b()">',
        '<b onclick="a(b)">',
        '<b onclick="a(1)">',
        '<b onclick="a() || b()">',
        '<b onclick="return a()">',
        '<b onclick="x=1">',
        "<b onclick=\"location='http://evil.example'\">",
        "<b onclick=\"a('\\x27')\">",
        '<b onclick="a(); b">',
        "<b onclick='a()'>",
        '<script>x = "<b onclick=\\"a(" + b + ")\\">"</script>',
    ],
)
def test_a_page_that_is_not_understood_stays_as_it_is(body: str) -> None:
    assert with_listeners(page(body)) is None
    assert with_listeners(page(""), [body.encode()]) is None


def test_a_page_that_is_none_stays_as_it_is() -> None:
    assert with_listeners(b"<b>no head</b>") is None
    assert with_listeners(b"<head>\xff") is None
