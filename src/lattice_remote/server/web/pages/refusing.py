"""A refusal, said so that whoever asked can read it: a page for a browser that wants one, JSON for programs."""

from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from lattice_remote.server.network.refusal import Refusal
from lattice_remote.server.web.answers import refused, wants_page
from lattice_remote.server.web.origin import is_from_elsewhere
from lattice_remote.server.web.pages.next_path import local_path, sign_in_path, wanted_path
from lattice_remote.server.web.pages.rendering import page

__all__ = ["come_again", "say"]


def say(request: Request, refusal: Refusal) -> Response:
    """Answer a request that is turned away."""
    if not wants_page(request):
        return refused(refusal)
    if refusal.status is HTTPStatus.UNAUTHORIZED and request.method in ("GET", "HEAD"):
        if is_from_elsewhere(request):
            return come_again(local_path(wanted_path(request)))
        return RedirectResponse(sign_in_path(request), HTTPStatus.SEE_OTHER)
    headers = {name: value for name, value in refusal.headers.items() if name != "Content-Type"}
    return page("refused", refusal.status, headers, refusal=refusal, phrase=refusal.status.phrase)


def come_again(path: str) -> Response:
    """Let a browser that came from another site ask once more: from our own page it brings its cookie, if it has one.

    Somebody who follows a link in a mail to his board need not sign in again.
    """
    return page("onward", path=path)
