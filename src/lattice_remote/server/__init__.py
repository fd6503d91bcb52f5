"""The server: one process for the network, and one worker process per project that owns its files.

Each folder may import those below it:

    cli         lattice-remote init, project, token, start, log
    app         HTTP on the same port, start and end
    monitoring/ how a running server is: figures, and status
    hub         all of a running server
    checks/     what an administrator asks for: everything checked, and mended
    project/    one project seen from the network: its queue, its followers, its log
    network/    who may come in, and how bytes leave
    worker/     the process that runs commands; the only writer of a project (I1, I12)
    journal/    the numbered changes on disk
    tree/       the files: what a command touches, and what that makes of them
    data/       the data directory, its settings and tokens; what the two processes say to each other

``network/`` and ``worker/`` don't know each other: they are two processes.
"""
