"""Tells who has started this process, systemd with ``Type=notify`` say, when it serves and when it stops."""

import logging
import os
import socket

__all__ = ["ServiceManager"]

_log = logging.getLogger(__name__)


class ServiceManager:
    """A service manager that wants to be told; with no address there is none."""

    def __init__(self, address: str = "") -> None:
        self._address = address

    @classmethod
    def from_environment(cls) -> "ServiceManager":
        """Return the one that ``NOTIFY_SOCKET`` names, a variable which workers and hooks are not to inherit."""
        return cls(os.environ.pop("NOTIFY_SOCKET", ""))

    def serving(self) -> None:
        """Say that requests are answered from now on."""
        self._tell("READY=1")

    def stopping(self) -> None:
        """Say that the end has begun."""
        self._tell("STOPPING=1")

    def _tell(self, state: str) -> None:
        if not self._address:
            return
        address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
                manager.setblocking(False)
                manager.connect(address)
                manager.send(state.encode())
        except OSError as error:
            _log.warning("cannot tell %s of the service manager %s: %s", self._address, state, error.strerror or error)
