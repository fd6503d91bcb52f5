"""The server: one process for the network, and one worker process per project that owns its files.

The worker's half, which is the only writer of a project (I1, I12):

policy       what a client's command line may do: one table
arguments    the kinds of its values, and what each may be
actors       whose name it may act in
audit_events what Python reports, and which of it is watched
capture      what a command touches, in order, and what it must not
undo         pre-images, so that a command is all or nothing
tree         the files as they were, and the operations that lead to what they are
jsondiff     the patch between two JSON files
attachments  a caller's files, put where a command can read them
textmerge    edited plans and notes, merged by line
executor     one command line, run by lattice itself
framing      length, checksum, payload: records on disk
manifest     the list of all files, on disk
segments     a piece of the journal: its file, and how much of it can be read
journal      the numbered changes and replies, on disk, as their writer sees them
attribution  who did it, and with what words, for the log
committer    the thread that makes them durable in groups
recovery     what happened while nobody looked
contents     what the journal tells of the content of files
repair       what a power cut took
copied       what a copy of a live directory lacks
store        tree, journal and undo as one thing that commits
worker       the process: requests in, outcomes out

The network's half:

ipc          what the two halves say to each other
datadir      the directory that holds everything
settings     config.json: every setting, its default and bounds
locks        one server, one writer
tokens       who may do what, where: the file
expiry       when something ends, as people write it
logins       the tokens as a running server sees them
lastuse      when each token was last in use
refusal      the answer to who is turned away
addresses    where a request comes from
bucket       how much at once, and in the long run
strangers    who has not shown a token yet
door         who may come in, and how much he may take
acceptor     connections, past the door
tls          the certificate
writer       the worker process, seen from here
project      a project's queue and its worker
journal_reader  the journal, as others read it
history      its head, the tree at the head, its followers
skew         what an older client is told in place of what it does not know
log          who did what, read back
job          one request on its way
turns        whose request is next
waiting      who waits for a resource
recent       the newest changes in memory
outbox       what one client has still to be sent
snapshot     a file as it was when it was opened
files        files of the tree, sent at a number
peer         one connected client
loglines     one line of log for each event
handoff      uvicorn's sockets, handed to websockets
watch        edits behind the server's back
hooks        config.json's hooks, after the commit
hub          all of a running server
app          HTTP on the same port, start and end
cli          lattice-remote init, project, token, start, log

What an administrator asks for:

fsck         everything checked, and mended
findings     what it found, and in which words
check_server, check_project, check_journal  what it looks at
"""
