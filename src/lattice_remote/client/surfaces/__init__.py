"""Lattice's dashboard and MCP server in a cache: reads are local, writes run on the server."""
