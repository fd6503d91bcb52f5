"""The data directory and what is kept in it, and what the server's two kinds of processes say to each other.

datadir      the directory that holds everything
settings     config.json: every setting, its default and bounds
locks        one server, one writer
tokens       who may do what, where: the file
expiry       when something ends, as people write it
logins       the tokens as a running server sees them
signing_key  what browsers' cookies are signed with
lastuse      when each token was last in use
framing      length, checksum, payload: records on disk
ipc          requests and outcomes between server and worker
loglines     one line of log for each event
"""
