"""The process that runs commands and owns a project's files; nobody else writes them (I1, I12).

process      requests in, outcomes out
policy       what a client's command line may do: one table
arguments    the kinds of its values, and what each may be
actors       whose name it may act in
attachments  a caller's files, put where a command can read them
executor     one command line, run by lattice itself
attribution  who did it, and with what words, for the log
store        tree, journal and undo as one thing that commits
committer    the thread that makes changes durable in groups
recovery     what happened while nobody looked
"""
