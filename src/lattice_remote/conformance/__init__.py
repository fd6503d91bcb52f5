"""Conformance checks of ``lattice.v1``: try a server, or try a client with a scripted server (protocol/SPEC.md)."""
