"""lattice-remote: hosted remote for Lattice.

Each command runs where the data is; its changes are sent to every client. docs/inside/architecture.md names the parts.
Start with ``protocol/messages.py``, then ``server/project/project.py`` and ``client/agent/main.py``.
"""

TYPE_CHECKING = False  # typing's own would have to be imported by every lattice command
if TYPE_CHECKING:
    from lattice_remote.client.storage import Freshness, RemoteStorage, RemoteWarning, resolve_backend
    from lattice_remote.errors import RemoteError
    from lattice_remote.storage.events import Conflict, Merged, StorageBackend, Written
    from lattice_remote.storage.local import LocalStorage

__all__ = [
    "Conflict",
    "Freshness",
    "LocalStorage",
    "Merged",
    "RemoteError",
    "RemoteStorage",
    "RemoteWarning",
    "StorageBackend",
    "Written",
    "__version__",
    "resolve_backend",
]

__version__ = "0.1.0"
"""The build reads it from here. A look-up in the installed metadata costs each command 1 ms."""

_HOMES = {
    "Conflict": "storage.events",
    "Freshness": "client.storage",
    "LocalStorage": "storage.local",
    "Merged": "storage.events",
    "RemoteError": "errors",
    "RemoteStorage": "client.storage",
    "RemoteWarning": "client.storage",
    "StorageBackend": "storage.events",
    "Written": "storage.events",
    "resolve_backend": "client.storage",
}
"""Module of each public name, imported on first use because every ``lattice`` command imports this package."""


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
