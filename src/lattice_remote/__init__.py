"""lattice-remote: the hosted remote for Lattice.

Run the command where the data is; ship back what it changed.

    errors      everything that can go wrong, by whose fault it is
    protocol    frames, operations and what a replica does with them; pure, shared by both sides
    server      one writer per project runs each command in order, journals what it changed, tells every client
    client      the plugin inside ``lattice``, the background agent, and the cache of plain files

The protocol imports neither side, neither side imports the other. Start reading at
``protocol/messages.py`` (what is said), then ``server/project/project.py`` and ``client/agent/process.py`` (who
says it).
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
"""Written here, and read from here by the build: looking it up in the installed metadata costs each command 1 ms."""
