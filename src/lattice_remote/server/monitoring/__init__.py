"""How a running server is, for those who look after it: figures for Prometheus, and ``lattice-remote status``.

status        what a server says of itself, and what its files say when it does not run
statussocket  the socket through which it says so
showing       that, for a terminal
gauges        what is looked up whenever the figures are asked for
command       ``lattice-remote status``
"""
