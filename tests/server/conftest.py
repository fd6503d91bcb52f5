"""Shared fixtures."""

from collections.abc import Iterator

import pytest
from rest_client import Rest, rest_server
from server_process import Process


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, Rest]]:
    """A server and a REST client. Tests must not stop the server or count all of its tasks."""
    with rest_server(tmp_path_factory.mktemp("rest")) as both:
        yield both


@pytest.fixture
def rest(served: tuple[Process, Rest]) -> Rest:
    return served[1]
