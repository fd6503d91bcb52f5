"""``/sign-in`` takes a token once and gives a cookie for it; ``/sign-out`` takes that back.

The token is in the body of one request, and neither in an address nor in an answer. Other sites can't sign anybody
in, with a token of theirs, nor out: both are only for forms on our own pages.
"""

from http import HTTPStatus
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from lattice_remote.server.data.logins import Login
from lattice_remote.server.network.door import Visit
from lattice_remote.server.network.refusal import Refusal
from lattice_remote.server.web.answers import TurnedAway
from lattice_remote.server.web.bodies import body_of
from lattice_remote.server.web.gate import cookies_of, hub_of, refuse_foreign, signed_in
from lattice_remote.server.web.origin import is_from_elsewhere
from lattice_remote.server.web.pages.next_path import local_path, wanted_path
from lattice_remote.server.web.pages.refusing import come_again
from lattice_remote.server.web.pages.rendering import page

__all__ = ["routes"]

_MAX_FORM_BYTES = 8 * 1024
_FORM_S = 10.0
_FIELDS = {"token", "next"}
_NOT_KNOWN = "This token is not known here. Was all of it pasted? Else ask your administrator for another."


async def _show(request: Request) -> Response:
    """Show the form; or go on at once, when somebody is signed in already."""
    following = local_path(request.query_params.get("next", "/"))
    who = signed_in(request)
    if who is None and is_from_elsewhere(request):
        return come_again(wanted_path(request))
    if isinstance(who, Login):
        return RedirectResponse(following, HTTPStatus.SEE_OTHER)
    if who is None:
        return page("sign_in", following=following, error="")
    shown = page("sign_in", following=following, error=f"You are signed out: {who.message}.")
    cookies_of(request).take_back(request, shown)
    return shown


async def _sign_in(request: Request) -> Response:
    refuse_foreign(request)
    form = await _form(request)
    following, token = local_path(form.get("next", "/")), form.get("token", "").strip()
    login = _admitted(request, token)
    if isinstance(login, Refusal):
        return _again(login, following)
    answer = RedirectResponse(following, HTTPStatus.SEE_OTHER)
    cookies_of(request).give(request, answer, login)
    return answer


def _admitted(request: Request, token: str) -> Login | Refusal:
    """Return whose token this is, if it may come in; a wrong one is counted."""
    visit: Visit = request.state.visit
    login = hub_of(request).identify(visit, token)
    return login if isinstance(login, Refusal) else visit.admit(login.token.id) or login


def _again(refusal: Refusal, following: str) -> Response:
    """Show the form once more, with what was wrong."""
    unknown = refusal.status is HTTPStatus.UNAUTHORIZED and refusal.message.startswith("no token")
    error = _NOT_KNOWN if unknown else f"{refusal.message[:1].upper()}{refusal.message[1:]}."
    headers = {} if refusal.retry_after_s is None else {"Retry-After": str(refusal.retry_after_s)}
    return page("sign_in", refusal.status, headers, following=following, error=error)


async def _form(request: Request) -> dict[str, str]:
    """Return the fields of the form that was sent, each once.

    Raises:
        TurnedAway: it is none, or larger than ours, or with other fields.
    """
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise _not_ours(HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
    text = (await body_of(request, _MAX_FORM_BYTES, within_s=_FORM_S)).decode("ascii", errors="replace")
    try:
        fields = parse_qs(text, keep_blank_values=True, max_num_fields=len(_FIELDS))
    except ValueError:
        raise _not_ours(HTTPStatus.BAD_REQUEST) from None
    if not fields.keys() <= _FIELDS or any(len(values) > 1 for values in fields.values()):
        raise _not_ours(HTTPStatus.BAD_REQUEST)
    return {name: value for name, [value] in fields.items()}


def _not_ours(status: HTTPStatus) -> TurnedAway:
    return TurnedAway(Refusal(status, "REMOTE_PROTOCOL", "this is not what the sign-in page sends"))


async def _sign_out(request: Request) -> Response:
    refuse_foreign(request)
    answer = RedirectResponse("/sign-in", HTTPStatus.SEE_OTHER)
    cookies_of(request).take_back(request, answer)
    return answer


routes = [
    Route("/sign-in", _show, methods=["GET"]),
    Route("/sign-in", _sign_in, methods=["POST"]),
    Route("/sign-out", _sign_out, methods=["POST"]),
]
