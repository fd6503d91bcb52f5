"""The server: one process for the network, and one worker process per project that owns its files.

The worker's half, which is the only writer of a project (I1, I12):

policy       what a client's command line may do: one table
capture      what a command touches, in order, and what it must not
undo         pre-images, so that a command is all or nothing
tree         the files as they were, and the operations that lead to what they are
attachments  a caller's files, put where a command can read them
textmerge    edited plans and notes, merged by line
executor     one command line, run by lattice itself
framing      length, checksum, payload: records on disk
manifest     the list of all files, on disk
journal      the numbered changes and replies, on disk
committer    the thread that makes them durable in groups
recovery     what happened while nobody looked
store        tree, journal and undo as one thing that commits
worker       the process: requests in, outcomes out

The network's half:

ipc          what the two halves say to each other
datadir      the directory that holds everything
tokens       who may do what, where
project      a project's queue, its worker, its followers
outbox       what one client has still to be sent
socket       the WebSocket endpoint
app          HTTP on the same port
hooks        config.json's hooks, after the commit
cli          lattice-remote init, project, token, start
"""
