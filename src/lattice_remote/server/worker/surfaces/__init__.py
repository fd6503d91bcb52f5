"""The surfaces of lattice beside its command line: named operations that a client calls, one module each.

surface    what every surface is made of: what is asked, what it comes to, what it answers
registry   which there are, and which can be used with what is installed here
commands   several command lines as one, and the claiming of a named task: what REST asks beside single commands
dashboard  the POSTs of lattice's dashboard, in its own handlers
mcp        the tools of lattice's MCP server
storage    the writes of Python programs

A surface checks all of a call before anything runs (``arguments``, ``actors``): what its table does not list is refused
(I9). It does not know where the call comes from.
"""
