"""lattice-remote: the hosted remote for Lattice.

Run the command where the data is; ship back what it changed.

    errors      everything that can go wrong, by whose fault it is
    protocol    frames, operations and what a replica does with them; pure, shared by both sides
    server      one writer per project runs each command in order, journals what it changed, tells every client
    client      the plugin inside ``lattice``, the background agent, and the cache of plain files

The protocol imports neither side, neither side imports the other. Start reading at
``protocol/messages.py`` (what is said), then ``server/project.py`` and ``client/agent.py`` (who says it).
"""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("lattice-remote")
except PackageNotFoundError:  # a checkout on sys.path that was never installed
    __version__ = "0+unknown"
