"""The Python interface to a board, local or remote."""
