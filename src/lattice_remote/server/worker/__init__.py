"""The process that runs commands and owns a project's files; nobody else writes them (I1, I12).

process      the process: its connection, its beginning and its end
requests     one request after the other, each once
running      a command or a call in a transaction: done as a whole, or not at all
editing      plans and notes that somebody has edited
surfaces/    what can be called beside the command line: the dashboard, MCP tools
policy       what a client's command line may do: one table
arguments    the kinds of its values, and what each may be
actors       whose name it may act in
attachments  a caller's files, put where a command can read them
owners       which token a session belongs to
executor     one command line, run by lattice itself
attribution  who did it, and with what words, for the log
confinement  what such a process may see
store        tree, journal and undo as one thing that commits
committer    the thread that makes changes durable in groups
recovery     what happened while nobody looked
"""
