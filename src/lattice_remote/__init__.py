"""lattice-remote: the hosted remote for Lattice.

Run the command where the data is; ship back what it changed.

    errors      everything that can go wrong, by whose fault it is
    protocol    frames, operations and what a replica does with them; pure, shared by both sides
    server      one writer per project runs each command in order, journals what it changed, tells every client
    client      the plugin inside ``lattice``, the background agent, and the cache of plain files
    storage     the same for programs: a board, local or remote, as one Python interface
    livepage    lattice's dashboard page, refreshed as soon as the board changes
    textmerge   a text that several have edited, merged by line

The protocol imports neither side, neither side imports the other. Start reading at
``protocol/messages.py`` (what is said), then ``server/project/project.py`` and ``client/agent/process.py`` (who
says it).
"""

TYPE_CHECKING = False  # as typing has it, which every lattice command would have to import
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
"""Written here, and read from here by the build: looking it up in the installed metadata costs each command 1 ms."""

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
"""Where each name is; loaded when it is first asked for, since every ``lattice`` command imports this package."""


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
