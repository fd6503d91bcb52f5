"""Fixtures for the client's tests."""

from client_fixtures import directory, guarded, home, server, service

__all__ = ["directory", "guarded", "home", "server", "service"]
