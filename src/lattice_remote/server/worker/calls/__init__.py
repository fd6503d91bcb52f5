"""Calls: operations of the dashboard, MCP, storage and commands surfaces, run by lattice's own code."""
