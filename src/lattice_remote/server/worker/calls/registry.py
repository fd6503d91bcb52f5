"""Registry of the call surfaces. Lightweight: a surface's module is imported when a worker first needs it."""

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, cast

from lattice_remote.errors import Rejected

if TYPE_CHECKING:
    from lattice_remote.server.worker.calls.base import Surface

__all__ = ["is_offered", "surface_named"]


@dataclass(frozen=True)
class _Entry:
    """Module of a surface, the package that it ``needs``, and the distribution to install for that."""

    module: str
    needs: str = "lattice"
    install: str = "lattice-remote"


_SURFACES: Mapping[str, _Entry] = {
    "commands": _Entry("commands"),
    "dashboard": _Entry("dashboard"),
    "mcp": _Entry("mcp", needs="mcp", install="lattice-remote[mcp]"),
    "storage": _Entry("storage"),
}


@cache
def is_offered(name: str) -> bool:
    """Return whether a surface exists and its dependencies are installed."""
    entry = _SURFACES.get(name)
    return entry is not None and importlib.util.find_spec(entry.needs) is not None


def surface_named(name: str) -> "Surface":
    """Return a surface, loaded.

    Raises:
        Rejected: the surface is unknown or its dependencies are not installed.
    """
    if name not in _SURFACES:
        raise Rejected(f"the server has no surface {name!r}: upgrade the server", code="REMOTE_UNSUPPORTED")
    if not is_offered(name):
        message = f"the server can't serve {name!r}: install {_SURFACES[name].install} on the server"
        raise Rejected(message, code="REMOTE_UNSUPPORTED")
    return _loaded(name)


@cache
def _loaded(name: str) -> "Surface":
    surface = cast("Surface", importlib.import_module(f"{__package__}.{_SURFACES[name].module}"))
    surface.load()
    return surface
