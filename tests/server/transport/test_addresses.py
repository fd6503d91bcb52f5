"""Client addresses, and the networks that they count for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattice_remote.errors import Misuse
from lattice_remote.server.transport.admission import Proxies, counted_as, is_loopback

HOPS = st.one_of(st.ip_addresses().map(str), st.text(max_size=30), st.just("10.0.0.9"))


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
    ],
)
def test_an_ipv6_address_stands_for_its_network(host: str, name: str) -> None:
    assert counted_as(host) == name


@pytest.mark.parametrize(
    ("forwarded", "origin"),
    [
        ([], "10.0.0.9"),
        ([""], "10.0.0.9"),
        (["198.51.100.1"], "198.51.100.1"),
        (["1.1.1.1, 198.51.100.1"], "198.51.100.1"),
        (["1.1.1.1", "198.51.100.1"], "198.51.100.1"),
        (["198.51.100.1, 10.1.2.3, 10.0.0.8"], "198.51.100.1"),
        (["10.1.2.3"], "10.1.2.3"),
        (["198.51.100.1:4711"], "198.51.100.1"),
        (["[2001:db8::1]:4711"], "2001:db8::1"),
        (["2001:db8::1"], "2001:db8::1"),
        (["198.51.100.1, nonsense"], "10.0.0.9"),
        (["nonsense, 198.51.100.1"], "198.51.100.1"),
        (["198.51.100.1, unknown, 10.0.0.8"], "10.0.0.8"),
    ],
)
def test_the_last_hop_that_is_no_trusted_proxy_asks(forwarded: list[str], origin: str) -> None:
    assert Proxies(["10.0.0.0/8"]).origin("10.0.0.9", forwarded) == origin


@given(st.lists(HOPS, max_size=5), st.ip_addresses(v=4))
def test_untrusted_entries_before_the_proxy_are_ignored(written: list[str], stranger: object) -> None:
    proxies = Proxies(["10.0.0.0/8"])
    if str(stranger) not in proxies:
        assert proxies.origin("10.0.0.9", [*written, str(stranger)]) == str(stranger)


def test_networks_and_single_addresses_are_trusted_and_nothing_else() -> None:
    proxies = Proxies(["10.0.0.0/8", "2001:db8::/32", "192.0.2.1"])
    for host in ("10.200.0.1", "::ffff:10.0.0.1", "2001:db8:ffff::1", "192.0.2.1"):
        assert host in proxies
    for host in ("11.0.0.1", "2001:db9::1", "192.0.2.2", "localhost", ""):
        assert host not in proxies
    assert "127.0.0.1" not in Proxies([])


@pytest.mark.parametrize("text", ["proxy.example", "10.0.0.0/33", "", "10.0.0"])
def test_a_proxy_that_is_no_address_is_named(text: str) -> None:
    with pytest.raises(Misuse, match="trusted proxy"):
        Proxies([text])


def test_loopback_is_distinguished_from_other_addresses() -> None:
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("127.8.9.1")
    assert not any(map(is_loopback, ("::", "10.0.0.1", "localhost.example")))
