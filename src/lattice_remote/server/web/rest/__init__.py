"""REST: programs read and write a project in JSON, in the envelopes of ``lattice --json``."""
