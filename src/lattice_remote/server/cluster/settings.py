"""``DATA/cluster.json``: a data directory's place in a cluster. While it exists, the directory never starts alone."""

import re
from importlib.util import find_spec
from pathlib import Path

import msgspec

from lattice_remote.errors import Misuse
from lattice_remote.files import write_atomically

__all__ = ["ClusterSettings", "load_settings", "save_settings", "settings_file"]

_SERVER = re.compile(r"(nats|tls)://[A-Za-z0-9.:\[\]_-]{1,255}", re.ASCII)
_URL = re.compile(r"https?://[A-Za-z0-9.:\[\]_-]{1,255}", re.ASCII)


class ClusterSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Settings of a node.

    Attributes:
        servers: ``nats://HOST:PORT`` or ``tls://HOST:PORT`` of the engine's servers.
        node: this node's name.
        advertise: URL at which the other nodes reach this one.
        credentials: file with the engine's user and password, its token, or a ``.creds`` file; "": none.
        ca: PEM file of the authorities of the engine's and the nodes' certificates; "": the system's.
        monitors: URLs of the engine's monitoring ports, where its sync setting is read.
        replicas: copies of each stream in the engine.
        cluster: identity of the cluster; "": the directory has not joined one yet.
        directory: identity of this data directory.

    Raises Misuse if the package for clusters is not installed.
    """

    servers: list[str]
    node: str
    advertise: str
    credentials: str = ""
    ca: str = ""
    monitors: list[str] = []
    replicas: int = 3
    cluster: str = ""
    directory: str = ""

    def __post_init__(self) -> None:
        if find_spec("nats") is None:
            raise Misuse("a cluster needs the package nats-py; run: pip install 'lattice-remote[cluster]'")

    def check(self) -> None:
        """Raise Misuse if an address is malformed."""
        for server in self.servers:
            if _SERVER.fullmatch(server) is None:
                raise Misuse(f"bad --cluster {server!r}: expected for example nats://HOST:4222")
        if not self.servers:
            raise Misuse("name the NATS servers with --cluster nats://HOST:4222,...")
        if _URL.fullmatch(self.advertise) is None:
            raise Misuse(f"bad --advertise {self.advertise!r}: expected this node's address, for example https://HOST")
        if "//0.0.0.0" in self.advertise or "//[::]" in self.advertise or "//::" in self.advertise:
            raise Misuse(
                "name the address at which the other nodes reach this one, for example --advertise https://HOST"
            )


def settings_file(data: Path) -> Path:
    return data / "cluster.json"


def load_settings(data: Path) -> ClusterSettings | None:
    """Return a directory's settings, None if it belongs to no cluster. Raises Misuse: they are damaged."""
    try:
        return msgspec.json.decode(settings_file(data).read_bytes(), type=ClusterSettings)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise Misuse(f"{settings_file(data)}: {error}") from error


def save_settings(data: Path, settings: ClusterSettings) -> None:
    """Store the settings durably. Raises OSError."""
    content = msgspec.json.format(msgspec.json.encode(settings)) + b"\n"
    write_atomically(settings_file(data), content, mode=0o600)
