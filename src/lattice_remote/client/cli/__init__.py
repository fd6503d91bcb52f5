"""The commands of ``lattice remote``, one module a family."""
