"""Which address a request comes from, and what it is counted as."""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from lattice_remote.errors import Misuse

__all__ = ["Proxies", "counted_as", "is_loopback"]


def counted_as(host: str) -> str:
    """Return the name under which an address is counted: an IPv6 address stands for its /64, one customer's own."""
    address = _parsed(host)
    if isinstance(address, IPv6Address):
        return str(ip_network((address, 64), strict=False))
    return str(address or host)


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches an address on which a server listens."""
    address = _parsed(host)
    return address is not None and address.is_loopback


class Proxies:
    """Addresses and networks of proxies whose X-Forwarded-For is believed."""

    def __init__(self, trusted: Sequence[str]) -> None:
        """Raises Misuse when one is neither an address nor a network."""
        try:
            self._networks = [ip_network(text, strict=False) for text in trusted]
        except ValueError as error:
            raise Misuse(f"bad address of a trusted proxy: {error}; name it like 10.0.0.7 or 10.0.0.0/8") from error

    def __contains__(self, host: str) -> bool:
        address = _parsed(host) if self._networks else None
        return address is not None and any(address in network for network in self._networks)

    def origin(self, host: str, forwarded_for: Sequence[str]) -> str:
        """Return where a request comes from that the proxy ``host`` passed on: the last hop that is no trusted proxy.

        Hops to the left of it are what a stranger wrote. Without one that can be read it is the proxy itself.
        """
        at = host
        for hop in reversed(",".join(forwarded_for).split(",")):
            address = _parsed(_without_port(hop.strip()))
            if address is None:
                break
            at = str(address)
            if at not in self:
                break
        return at


def _parsed(host: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _without_port(hop: str) -> str:
    """Return the address of ``1.2.3.4``, ``1.2.3.4:5``, ``::1``, ``[::1]`` or ``[::1]:5``."""
    if hop.startswith("["):
        return hop[1:].partition("]")[0]
    return hop.partition(":")[0] if hop.count(":") == 1 else hop
