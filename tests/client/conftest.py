"""What the client's tests start from."""

from client_fixtures import directory, home, server, service

__all__ = ["directory", "home", "server", "service"]
