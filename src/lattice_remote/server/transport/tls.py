"""TLS certificate of the server, read with helpful errors and reloaded after renewal."""

import logging
import os
import ssl
from pathlib import Path

from lattice_remote.errors import Misuse
from lattice_remote.files import signature_of

__all__ = ["Certificate"]

_log = logging.getLogger(__name__)


class _Encrypted(Exception):
    """The key asks for a password."""


class Certificate:
    """A certificate, its private key, and their TLS context: TLS 1.2 or newer."""

    def __init__(self, cert: Path, key: Path) -> None:
        """Read both files.

        Raises:
            Misuse: a file is unreadable, any user can read the key, it has a password, or they do not match.
        """
        self._cert, self._key = cert, key
        self._signature = self._stat()
        self.context = self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))

    def refresh(self) -> None:
        """Use changed files for new connections; log why if they are unusable.

        Files are renewed one after the other: a pair that does not match is tried again at the next call.
        """
        try:
            signature = self._stat()
            if signature == self._signature:
                return
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))  # a mismatched pair would leave the context unusable
            self._load(self.context)
        except Misuse as error:
            _log.warning("keeping the previous certificate: %s", error.message)
            return
        self._signature = signature
        _log.info("reloaded the certificate %s", self._cert)

    def _load(self, context: ssl.SSLContext) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self._cert, self._key, password=_no_password)
        except _Encrypted:
            raise Misuse(f"the key {self._key} has a password; store it without, readable by its owner alone") from None
        except ssl.SSLError as error:
            raise Misuse(_reason(error, self._cert, self._key)) from error
        except OSError as error:  # it existed a moment ago
            raise Misuse(f"cannot read {self._cert} or {self._key}: {error.strerror}") from error
        return context

    def _stat(self) -> tuple[int, ...]:
        """Return the signature of both files.

        Raises:
            Misuse: one is missing or unreadable, or any user can read the key.
        """
        numbers: list[int] = []
        for path in (self._cert, self._key):
            try:
                with path.open("rb") as file:
                    status = os.fstat(file.fileno())
            except OSError as error:
                raise Misuse(f"cannot read {path}: {error.strerror}") from error
            numbers += signature_of(status)
        if status.st_mode & 0o007:
            raise Misuse(f"the key {self._key} can be read by any user on this machine; run: chmod o= {self._key}")
        return tuple(numbers)


def _no_password() -> str:
    raise _Encrypted


def _reason(error: ssl.SSLError, cert: Path, key: Path) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"the key {key} is not that of the certificate {cert}; name a matching pair"
    return f"cannot use {cert} with {key}: both must be PEM files, the certificate first ({error.reason or error})"
