"""``lattice remote ...``, one module a family of commands.

app       the Typer app, and how errors are shown
remotes   add, clone, show, set-url, remove
tokens    login, trust, logout
copy      status, pull, sync, verify, log
history   history
push      push
rescued   rescued list, show, apply, drop
watch     watch, and what is printed or run for each change
agent     agent status, agent stop
adding    a directory becomes a copy
pushing   a local project becomes the server's, and its directory a copy
leaving   a copy becomes a local project, or goes
describe  the state of a copy in words
shared    the copy around us, requests, results, progress
"""
