"""Lattice's other surfaces in a remote project: reads here, on the cache; writes carried out on the server.

calls      one operation of a surface, asked of the server through the agent
dashboard  lattice's own dashboard, served here
mcp        lattice's own MCP server
pulse      tells its pages when the cache has changed
"""
