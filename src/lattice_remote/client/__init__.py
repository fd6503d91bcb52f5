"""The client: the plugin inside ``lattice``, the background agent, and the cache of plain files.

Light, imported by every command of a remote project (standard library only):

    plugin        what ``lattice`` loads; decides whether there is a remote at all
    routing       reads stay here under the guard, everything else travels to the server
    callers_files which argument is a file of the caller, and how the agent gets at it
    storage       reads and writes of a program, in Python
    resolve       which board a program means: a local one or a remote one
    guard         refuses what a local command would write into the cache
    settings      ``remote.json`` and the grammar of a remote's URL
    credentials   tokens, per user
    servers       which servers the user has named, and so where a token may go
    private_files what keeps both: nobody else may read or change it
    preferences   how one copy is kept
    quota         how large a server may make a cache
    runtime       where the agent's socket is
    freshness     a cache is current before it is read, or it is said how old it is
    agent_client  the fast path: one line to the agent, one line back

Heavy; each folder may import those below it:

    commands/     ``lattice remote ...``
    surfaces/     lattice's dashboard and MCP server, with their writes carried out on the server
    agent/        the background process: what can be asked of a cache
    link/         one WebSocket that comes back after every cut
    cache/        the directory as a tree that follows the server's
"""
