"""``lattice remote ...``, one module a family of commands.

app       the Typer app, and how errors are shown
remotes   add, show, set-url, remove
tokens    login, trust, logout
copy      status, pull, push, sync, verify, log
watch     watch, and what is printed or run for each change
agent     agent status, agent stop
adding    a directory becomes a copy, or stops being one
describe  the state of a copy in words
shared    the copy around us, requests, results, progress
"""
