"""A template to an answer. Everything that is put into one is escaped, whoever wrote it."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.responses import Response

from lattice_remote.server.web.headers import OUR_PAGES
from lattice_remote.server.web.pages.assets import asset

__all__ = ["page"]

_templates = Environment(
    loader=PackageLoader("lattice_remote.server.web.pages"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    auto_reload=False,
)
_templates.globals["asset"] = asset


def page(
    name: str, status: HTTPStatus = HTTPStatus.OK, headers: Mapping[str, str] | None = None, **values: Any
) -> Response:
    """Answer with a template, filled in."""
    html = _templates.get_template(f"{name}.html").render(values)
    given = {**(headers or {}), "Content-Security-Policy": OUR_PAGES}
    return Response(html, status, given, media_type="text/html")
