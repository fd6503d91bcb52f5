"""Python interface to a local or remote project."""
