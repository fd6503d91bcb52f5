"""The cache: a ``.lattice`` directory that equals the server's replicated tree (I3, I4)."""
