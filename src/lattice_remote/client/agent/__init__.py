"""The background process of a user, and what can be asked of each cache.

process    one service per cache behind a Unix socket
direct     the same service inside a command's own process
service    run, call, push, pull, sync, verify, status
caretaker  keeps the files right without being asked
watching   tells which files somebody has touched
frames     what its requests become on the wire
rescuing   rescued files: listed, applied on the server, dropped
history    who did what, asked of the server
"""
