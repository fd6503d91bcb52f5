"""Trusted servers: tokens are sent only to servers that the user named on this machine, and encrypted."""

import json
import stat
from pathlib import Path

import pytest

from lattice_remote.client import credentials, trusted_servers
from lattice_remote.client.trusted_servers import Server
from lattice_remote.errors import Misuse, Rejected, StorageError

HTTPS = "https://board.example"


def test_a_server_that_the_user_did_not_name_gets_no_token() -> None:
    with pytest.raises(Rejected, match=r"you have not.*lattice remote trust https://board\.example") as error:
        trusted_servers.admit(HTTPS)
    assert error.value.code == "REMOTE_UNTRUSTED"


def test_a_server_is_trusted_through_a_record_a_token_or_the_environment() -> None:
    assert trusted_servers.admit(HTTPS, trusted_servers.from_environment(" https://Board.example/web ")) == Server(
        HTTPS
    )
    with pytest.raises(Rejected):
        trusted_servers.admit(HTTPS, trusted_servers.from_environment("https://other.example"))
    credentials.store(HTTPS, "web", "ltr_x")
    assert trusted_servers.admit(HTTPS) == Server(HTTPS)
    credentials.forget(HTTPS)
    trusted_servers.record(Server(HTTPS))
    assert trusted_servers.admit(HTTPS) == Server(HTTPS)
    trusted_servers.forget(HTTPS)
    with pytest.raises(Rejected):
        trusted_servers.admit(HTTPS)


@pytest.mark.parametrize("named", ["", "   ", None])
def test_an_empty_variable_sets_no_actor(named: str | None) -> None:
    assert trusted_servers.from_environment(named) is None


def test_a_variable_that_is_no_url_is_reported() -> None:
    with pytest.raises(Misuse, match="LATTICE_REMOTE_URL: not a server's URL"):
        trusted_servers.from_environment("board.example")


@pytest.mark.parametrize(
    ("url", "loopback"),
    [
        ("http://127.0.0.1:8443", True),
        ("http://127.9.9.9", True),
        ("http://localhost:80", True),
        ("http://[::1]:8443", True),
        ("http://127.0.0.1.evil.example", False),
        ("http://localhost.evil.example", False),
        ("http://127.1", False),
        ("http://2130706433", False),
        ("http://0.0.0.0:8443", False),
        ("http://[::ffff:8.8.8.8]", False),
        ("http://10.0.0.7:8443", False),
        ("http://board.example", False),
        ("http://127.0.0.1/lattice/", True),
        ("http://board.example/127.0.0.1/", False),
    ],
)
def test_plain_http_is_limited_to_this_machine_unless_the_user_allows_it(url: str, loopback: bool) -> None:
    trusted_servers.record(Server(url))
    assert trusted_servers.is_loopback(url) is loopback
    if loopback:
        trusted_servers.admit(url)
        return
    with pytest.raises(Rejected, match="plain HTTP") as error:
        trusted_servers.admit(url)
    assert f"lattice remote trust {url} --insecure" in error.value.message
    trusted_servers.record(Server(url, insecure=True))
    assert trusted_servers.admit(url).insecure


def test_omitted_settings_are_kept(tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    authority.write_text("x")
    trusted_servers.record(trusted_servers.name(HTTPS, ca_file=str(authority)))
    trusted_servers.record(trusted_servers.name(HTTPS, insecure=True))
    assert trusted_servers.admit(HTTPS) == Server(HTTPS, insecure=True, ca_file=str(authority))
    assert stat.S_IMODE(Path(trusted_servers.servers_path()).stat().st_mode) == 0o600


def test_authorities_must_be_valid(tmp_path: Path) -> None:
    with pytest.raises(Misuse, match="there is no file"):
        trusted_servers.name(HTTPS, ca_file=str(tmp_path / "nothing.pem"))
    with pytest.raises(Misuse, match="requires https"):
        trusted_servers.name("http://board.example", ca_file=__file__)


@pytest.mark.parametrize("kept", ["yes", {"insecure": "yes"}, {"insecure": 1}, {"ca_file": 7}])
def test_a_damaged_record_admits_no_client(kept: object) -> None:
    trusted_servers.record(Server(HTTPS))
    Path(trusted_servers.servers_path()).write_text(json.dumps({"servers": {HTTPS: kept}}))
    with pytest.raises(StorageError, match="not valid"):
        trusted_servers.admit(HTTPS)


def test_headers_are_stored_privately_replaced_and_removed() -> None:
    trusted_servers.record(trusted_servers.name(HTTPS, headers=["CF-Access-Client-Id: id.access", "X-Key: s3cret"]))
    trusted_servers.record(trusted_servers.name(HTTPS, headers=["x-key: other"], max_cache_mib=9))
    server = trusted_servers.admit(HTTPS, Server(HTTPS))
    assert dict(server.headers) == {"cf-access-client-id": "id.access", "x-key": "other"}
    assert "other" not in repr(server) and "access" not in repr(server)
    assert stat.S_IMODE(Path(trusted_servers.servers_path()).stat().st_mode) == 0o600
    assert trusted_servers.admit(HTTPS, Server("https://else.example")).headers == server.headers
    trusted_servers.record(trusted_servers.name(HTTPS, headers=["X-Key:"]))
    assert dict(trusted_servers.admit(HTTPS).headers) == {"cf-access-client-id": "id.access"}
    assert trusted_servers.admit(HTTPS).max_cache_mib == 9
    assert trusted_servers.admit(HTTPS + ":444", Server(HTTPS + ":444")).headers == ()


@pytest.mark.parametrize(
    "line",
    ["secret", ": secret", "Authorization: secret", "host: secret", "Sec-WebSocket-Key: secret", "A: secret\r\nB: c"],
)
def test_a_header_that_is_malformed_or_ours_is_refused_without_its_value(line: str) -> None:
    with pytest.raises(Misuse) as refused:
        trusted_servers.name(HTTPS, headers=[line])
    assert "secret" not in refused.value.message


def test_a_client_certificate_is_kept_until_it_is_removed(tmp_path: Path) -> None:
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).write_text("x")
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    trusted_servers.record(trusted_servers.name(HTTPS, client_cert=cert, client_key=key))
    trusted_servers.record(Server(HTTPS, max_cache_mib=7))
    assert (trusted_servers.admit(HTTPS).client_cert, trusted_servers.admit(HTTPS).client_key) == (cert, key)
    trusted_servers.record(trusted_servers.name(HTTPS, client_cert=""))
    assert trusted_servers.admit(HTTPS) == Server(HTTPS, max_cache_mib=7)
    for wrong in ({"client_key": key}, {"client_cert": f"{cert}.none"}):
        with pytest.raises(Misuse):
            trusted_servers.name(HTTPS, **wrong)
    with pytest.raises(Misuse, match="requires https"):
        trusted_servers.name("http://board.example", client_cert=cert)
