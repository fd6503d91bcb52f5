"""Launcher: an executable ``lattice`` that runs commands in a warm process instead of a new interpreter."""
