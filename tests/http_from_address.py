"""Requests over HTTP from another address of this machine: a server counts what each address has failed at."""

from typing import Any

import requests
from requests.adapters import HTTPAdapter

__all__ = ["session_from"]


class _From(HTTPAdapter):
    def __init__(self, address: str) -> None:
        self._address = address
        super().__init__()

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, source_address=(self._address, 0), **options)  # type: ignore[no-untyped-call] # it has no types


def session_from(address: str) -> requests.Session:
    """Return a session whose connections come from this address, of 127.0.0.0/8."""
    session = requests.Session()
    session.mount("http://", _From(address))
    return session
