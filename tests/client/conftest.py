"""What the client's tests start from."""

from client_fixtures import directory, guarded, home, server, service

__all__ = ["directory", "guarded", "home", "server", "service"]
