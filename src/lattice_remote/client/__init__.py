"""The client: the plugin inside ``lattice``, the background agent, and the cache of plain files.

``plugin``, ``routing``, ``guard`` and ``agent_client`` are imported by every command of a remote project and use the
standard library, Click and lattice only. ``agent``, ``connection`` and ``cache`` run in the agent, or in a command
without one.
"""
