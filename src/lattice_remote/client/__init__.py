"""The client: the plugin inside ``lattice``, the background agent, and the cache of plain files.

Light, imported by every command of a remote project (standard library only):

    plugin        what ``lattice`` loads; decides whether there is a remote at all
    routing       reads stay here under the guard, everything else travels to the server
    guard         refuses what a local command would write into the cache
    settings      ``remote.json`` and the grammar of a remote's URL
    credentials   tokens, per user
    servers       which servers the user has named, and so where a token may go
    private_files what keeps both: nobody else may read or change it
    runtime       where the agent's socket is
    agent_client  the fast path: one line to the agent, one line back

Heavy, imported by the agent, or by a command that works without it:

    agent         the process: one service per cache behind a Unix socket
    direct        the same service inside a command's own process
    service       what can be asked of a cache: run, push, pull, sync, verify, status
    follower      drives a replica (``protocol/replica.py``) against a cache
    links         the connections of one cache, and with which token each
    link          one WebSocket that comes back after every cut
    connecting    opens it: TLS, and what a failure means
    pacing        when to try again
    inbox, outgoing   what has come and was not taken; what can't be sent
    cache         the directory as a tree: atomic, and what is known of it
    directory     how its files are reached, never through a link
    quota         how large a server may make it
    state         which point of the history the directory holds
    known         what each file was when one of ours last wrote it
    watching      tells which files somebody has touched
    survey        looks at every file, for what others have changed
    caretaker     keeps the files right without being asked
    healing       which file is put right when, and which is fought over
    keepsakes     what a person wrote where only the server may, kept aside
    comparing     files against the server's manifest
    history       who did what, asked of the server
    edits         plans and notes that people edit in place
    adding        a directory becomes a copy, or stops being one
    commands      ``lattice remote ...``
"""
