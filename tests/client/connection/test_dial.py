"""Connecting over real sockets: TLS, redirects, proxies, refusals before the upgrade, and token safety."""

import asyncio
import contextlib
import datetime
import os
import shutil
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from http import HTTPStatus
from pathlib import Path

import pytest
import trustme
from client_kit import ask, make_clone, ready, run, tree, until
from fake_server import TOKEN, FakeServer

from lattice_remote.client import credentials, trusted_servers
from lattice_remote.client.agent.service import Service
from lattice_remote.client.config import Remote
from lattice_remote.client.connection import dial
from lattice_remote.client.connection.dial import RetryLater, error_of, fetch_projects
from lattice_remote.errors import ConnectionFailed, Misuse, ProtocolError, Rejected, RemoteError

DAY = datetime.timedelta(days=1)


class Site:
    """A server with a certificate of a private authority, and the user's configuration."""

    def __init__(self, place: Path) -> None:
        self.authority = trustme.CA()
        self.ca_file = str(place / "authority.pem")
        self.authority.cert_pem.write_to_path(self.ca_file)
        self.server = FakeServer()
        self.place = place

    async def start(self, host: str = "localhost", age: datetime.timedelta = -DAY) -> None:
        """Listen with a certificate for ``host`` that expires in ``-age``."""
        now = datetime.datetime.now(datetime.UTC)
        certificate = self.authority.issue_cert(host, not_before=now - 30 * DAY, not_after=now - age)
        self.server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(self.server.tls)
        await self.server.start()

    def service(self, *, ca_file: bool = True, url: str = "") -> Service:
        url = url or self.server.url
        trusted_servers.record(
            trusted_servers.name(url, ca_file=self.ca_file if ca_file and url.startswith("https") else None)
        )
        made = Service(str(make_clone(self.place / "clone", url)))
        made.start(TOKEN)
        return made


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    made = Site(tmp_path)
    yield made
    await made.server.stop()


async def fails(service: Service, *expected: str) -> RemoteError:
    """Assert that the link fails with all of ``expected`` in one printable line, then close it."""
    try:
        await until(lambda: service._connection.error is not None)
        error = service._connection.error
        assert error is not None
        for words in expected:
            assert words in error.message, error.message
        assert error.message.isprintable() and TOKEN not in error.message
        with pytest.raises(RemoteError) as failed:
            await run(service, "put", "tasks/x.json", "x")
        assert expected[0] in failed.value.message
        return error
    finally:
        await service.close()


def empty(place: str) -> None:
    Path(place).write_text("no certificate")


# --- TLS ---


async def test_a_private_authority_that_the_user_trusts_is_accepted(site: Site) -> None:
    await site.start()
    service = site.service()
    await run(service, "put", "tasks/x.json", "x")
    assert tree(site.place / "clone/.lattice") == site.server.files
    await service.close()


async def test_an_unknown_authority_gets_no_token(site: Site) -> None:
    await site.start()
    error = await fails(site.service(ca_file=False), "unknown certificate authority", "--ca-file")
    assert error.code == "REMOTE_UNTRUSTED" and site.server.requests == []


async def test_no_list_of_projects_is_requested_under_an_unknown_authority(site: Site) -> None:
    await site.start()
    with pytest.raises(Rejected, match="unknown certificate authority") as error:
        await asyncio.to_thread(fetch_projects, site.server.url, TOKEN, trusted_servers.name(site.server.url))
    assert error.value.code == "REMOTE_UNTRUSTED" and site.server.requests == []


async def test_a_client_certificate_without_its_key_is_reported(site: Site) -> None:
    await site.start()
    place = str(site.place / "own.pem")
    site.authority.cert_pem.write_to_path(place)
    named = trusted_servers.name(site.server.url, ca_file=site.ca_file, client_cert=place)
    with pytest.raises(Misuse, match=f"cannot use the client certificate {place}") as error:
        await asyncio.to_thread(fetch_projects, site.server.url, TOKEN, named)
    assert error.value.code == "REMOTE_UNTRUSTED" and site.server.requests == []


async def test_another_private_authority_is_not_accepted(site: Site) -> None:
    await site.start()
    trustme.CA().cert_pem.write_to_path(site.ca_file)
    await fails(site.service(), "unknown certificate authority")
    assert site.server.requests == []


async def test_a_certificate_for_another_host_is_refused(site: Site) -> None:
    await site.start("elsewhere.example")
    error = await fails(site.service(), "for another host", "use the name")
    assert error.code == "REMOTE_UNTRUSTED" and site.server.requests == []


async def test_an_expired_certificate_is_refused(site: Site) -> None:
    await site.start(age=DAY)
    await fails(site.service(), "has expired", "renew")
    assert site.server.requests == []


async def test_an_invalid_file_of_authorities_is_reported(site: Site) -> None:
    await site.start()
    empty(site.ca_file)
    await fails(site.service(), "cannot use the authorities in", site.ca_file)
    assert site.server.requests == []


async def test_a_repaired_authority_is_used_without_another_command(site: Site) -> None:
    await site.start()
    service = site.service(ca_file=False)
    await until(lambda: service._connection.error is not None)
    trusted_servers.record(trusted_servers.name(site.server.url, ca_file=site.ca_file))
    await until(lambda: service._connection.is_open)
    await service.close()


async def test_plain_http_on_a_tls_port_is_reported(site: Site) -> None:
    await site.start()
    await fails(
        site.service(url=f"http://127.0.0.1:{site.server.port}"),
        "it speaks TLS there",
        "its URL is https://",
        "set-url",
    )
    assert site.server.requests == []


async def test_tls_on_a_plain_http_port_is_reported(server: FakeServer, site: Site) -> None:
    service = site.service(url=f"https://127.0.0.1:{server.port}")
    await fails(service, "no TLS there", "begins with http://")
    assert server.requests == []


# --- recipients of tokens ---


async def test_a_clone_does_not_send_the_environments_token_to_the_server_it_names(
    server: FakeServer, tmp_path: Path
) -> None:
    service = Service(str(make_clone(tmp_path / "clone", server.url)))
    service.start(TOKEN)
    error = await fails(service, f"no token was sent to {server.url}", "lattice remote trust")
    assert error.code == "REMOTE_UNTRUSTED" and server.requests == []


async def test_a_clone_whose_server_the_environment_names_works_at_once(server: FakeServer, tmp_path: Path) -> None:
    service = Service(str(make_clone(tmp_path / "clone", server.url)))
    service.start(TOKEN)
    with pytest.raises(RemoteError, match="no token was sent"):
        await run(service, "put", "tasks/x.json", "x", named="https://elsewhere.example")
    await run(service, "put", "tasks/x.json", "x", named=server.url + "/web")
    await service.close()


async def test_a_login_keeps_a_server_that_the_environment_names(server: FakeServer, tmp_path: Path) -> None:
    directory = make_clone(tmp_path / "clone", server.url)
    service = Service(str(directory))
    service.start(TOKEN)
    await run(service, "put", "tasks/x.json", "x", named=server.url + "/web")
    service._pool.choose(None)  # as any login of this user does
    server.cut()
    server.put("tasks/y.json", b"y")
    await until((directory / "tasks/y.json").exists)
    await service.close()


async def test_a_further_token_is_not_sent_to_an_untrusted_server(server: FakeServer, tmp_path: Path) -> None:
    server.tokens["ltr_bob"] = "human:bob"
    service = Service(str(make_clone(tmp_path / "clone", server.url)))
    service.start(None)
    with pytest.raises(RemoteError, match="no token was sent"):
        await run(service, "put", "tasks/x.json", "x", token="ltr_bob")
    await service.close()
    assert server.requests == []


async def test_trusting_a_server_takes_effect_without_another_command(server: FakeServer, tmp_path: Path) -> None:
    service = Service(str(make_clone(tmp_path / "clone", server.url)))
    service.start(TOKEN)
    await until(lambda: service._connection.is_refused)
    trusted_servers.record(trusted_servers.name(server.url))
    await until(lambda: service._connection.is_open)
    await service.close()


@contextlib.contextmanager
def asking_for_certificates(authority: trustme.CA, version: ssl.TLSVersion) -> Iterator[str]:
    """Serve TLS to clients with a certificate of the authority and answer 404. Yield the URL.

    It does not use asyncio, whose server closes the connection without an alert.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode, context.maximum_version = ssl.CERT_REQUIRED, version
    authority.configure_trust(context)
    authority.issue_cert("localhost").configure_cert(context)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):  # closed at the end
                while True:
                    accepted, _ = listener.accept()
                    with (
                        contextlib.suppress(OSError),
                        accepted,
                        context.wrap_socket(accepted, server_side=True) as peer,
                    ):
                        peer.recv(65536)
                        peer.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"https://localhost:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(20)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_required_client_certificate_is_reported(site: Site, version: ssl.TLSVersion) -> None:
    for name, authority in (("other", trustme.CA()), ("own", site.authority)):
        authority.issue_cert("ana").private_key_and_cert_chain_pem.write_to_path(site.place / f"{name}.pem")
    with asking_for_certificates(site.authority, version) as url:

        async def says(expected: str) -> None:
            await fails(site.service(url=url), expected)
            with pytest.raises(RemoteError, match=expected):
                await asyncio.to_thread(fetch_projects, url, TOKEN, None)
            shutil.rmtree(site.place / "clone")

        # Before TLS 1.3 the server refuses the handshake without naming the missing client certificate.
        await says("asks for a client certificate" if version is ssl.TLSVersion.TLSv1_3 else "no TLS there")
        trusted_servers.record(trusted_servers.name(url, client_cert=str(site.place / "other.pem")))
        await says("does not accept this one; name it with: lattice remote trust")
        trusted_servers.record(trusted_servers.name(url, client_cert=str(site.place / "own.pem")))
        await says("HTTP 404")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(server: FakeServer, service: Service, site: Site, status: int) -> None:
    await site.server.start()
    server.status = HTTPStatus(status)
    server.error_headers = {"Location": f"{site.server.url}/projects/web/ws"}
    server.cut()
    await fails(service, "it redirects to", "set-url")
    with pytest.raises(ConnectionFailed, match="it redirects to"):
        await asyncio.to_thread(
            fetch_projects, server.url, TOKEN, trusted_servers.name(server.url, headers=["X-Key: 1"])
        )
    assert site.server.requests == []


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"", "remote end closed connection"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "it is not a lattice-remote server"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "another program answers instead, HTTP 200"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{"data": [1]}', "another program answers instead, HTTP 200"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", "another program answers instead, HTTP 503"),
        (None, "connection refused"),
    ],
)
async def test_an_unreadable_list_of_projects_is_reported_with_the_reason(answer: bytes | None, says: str) -> None:
    async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer or b"")
        writer.close()

    server = await asyncio.start_server(reply, "127.0.0.1")
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    if answer is None:
        server.close()
    with pytest.raises(RemoteError) as error:
        await asyncio.to_thread(fetch_projects, url, TOKEN, trusted_servers.name(url))
    server.close()
    assert says in error.value.message and TOKEN not in error.value.message


async def test_a_server_that_accepts_but_does_not_answer_times_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dial, "OPEN_TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        named = trusted_servers.name(url)
        with pytest.raises(ConnectionFailed, match="timed out"):
            await asyncio.to_thread(fetch_projects, url, TOKEN, named)
        trusted_servers.record(named)
        service = Service(str(make_clone(tmp_path / "clone", url)))
        service.start(TOKEN)
        await fails(service, "timed out")


@pytest.mark.parametrize(
    ("code", "retry_after_s", "kind", "found"),
    [
        ("REMOTE_UNAUTHORIZED", 3.0, Rejected, "REMOTE_UNAUTHORIZED"),
        ("REMOTE_FORBIDDEN", None, Rejected, "REMOTE_FORBIDDEN"),
        ("REMOTE_BUSY", 3.0, RetryLater, "REMOTE_BUSY"),
        ("REMOTE_NEWER", 3.0, RetryLater, "REMOTE_UNREACHABLE"),
        ("REMOTE_PROTOCOL", None, ProtocolError, "REMOTE_PROTOCOL"),
        ("REMOTE_SHUTDOWN", None, ConnectionFailed, "REMOTE_SHUTDOWN"),
        ("REMOTE_NEWER", None, ConnectionFailed, "REMOTE_UNREACHABLE"),
    ],
)
def test_the_servers_reason_decides_about_a_retry(
    code: str, retry_after_s: float | None, kind: type[RemoteError], found: str
) -> None:
    error = error_of(code, "why", Remote("origin", "https://board.example", "web"), retry_after_s)
    assert type(error) is kind and error.code == found and error.message.startswith("why")
    assert ("lattice remote login https://board.example/web" in error.message) == (kind is Rejected)
    assert getattr(error, "retry_after_s", None) == (retry_after_s if kind is RetryLater else None)


def test_a_list_of_projects_does_not_use_socks(behind: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5h://127.0.0.1:1")
    with pytest.raises(ConnectionFailed, match="only connections to a project use SOCKS"):
        fetch_projects(BOARD, TOKEN, trusted_servers.name(BOARD, insecure=True))


async def test_a_token_for_this_machine_is_not_sent_through_a_proxy(
    server: FakeServer, site: Site, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await site.server.start()
    for name in ("http_proxy", "https_proxy", "all_proxy", "ws_proxy", "wss_proxy"):
        monkeypatch.setenv(name, site.server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    service = Service(str(directory))
    service.start(TOKEN)
    assert (await ask(service, "ready"))["current"]
    assert site.server.requests == []
    await service.close()


class Proxy:
    """A proxy for SOCKS 5 and HTTP CONNECT that connects each requested host to the same server."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.asked: list[str] = []
        """The hosts, with how they were asked for."""
        self.writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        self.writers.append(writer)
        if (first := await reader.readexactly(1)) == b"\x05":
            await reader.readexactly((await reader.readexactly(1))[0])
            writer.write(b"\x05\x00")
            await reader.readexactly(4)
            host = await reader.readexactly((await reader.readexactly(1))[0])
            await reader.readexactly(2)
            self.asked.append(f"socks {host.decode()}")
            writer.write(b"\x05\x00\x00\x01" + bytes(6))
        else:
            head = first + await reader.readuntil(b"\r\n\r\n")
            self.asked.append(f"connect {head.split()[1].decode()}")
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(pump(reader, there_writer))
                group.create_task(pump(there_reader, writer))
        finally:
            writer.close()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@pytest.fixture
async def proxy(server: FakeServer) -> AsyncIterator[tuple[Proxy, int]]:
    made = Proxy(int(server.url.rpartition(":")[2]))
    async with await asyncio.start_server(made.serve, "127.0.0.1") as listening:
        yield made, listening.sockets[0].getsockname()[1]
        for writer in made.writers:
            writer.transport.abort()


BOARD = "http://board.invalid:8443"


@pytest.fixture
def behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache whose server's name cannot be resolved."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    trusted_servers.record(trusted_servers.name(BOARD, insecure=True))
    return make_clone(tmp_path / "behind", BOARD)


@pytest.mark.parametrize(
    ("variable", "value", "asked"),
    [
        ("ALL_PROXY", "socks5h://127.0.0.1:{port}", "socks board.invalid"),
        ("all_proxy", "socks://127.0.0.1:{port}", "socks board.invalid"),
        ("ALL_PROXY", "http://127.0.0.1:{port}", "connect board.invalid:8443"),
        ("HTTP_PROXY", "127.0.0.1:{port}", "connect board.invalid:8443"),
        ("http_proxy", "socks5h://127.0.0.1:{port}", "socks board.invalid"),
        ("SOCKS_PROXY", "socks5h://127.0.0.1:{port}", "socks board.invalid"),
    ],
)
async def test_a_proxy_that_the_environment_names_is_used(
    proxy: tuple[Proxy, int], behind: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, asked: str
) -> None:
    monkeypatch.setenv(variable, value.format(port=proxy[1]))
    service = Service(str(behind))
    service.start(TOKEN)
    assert (await ask(service, "ready"))["current"]
    await service.close()
    assert set(proxy[0].asked) == {asked}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("socks5h://127.0.0.1:1", "proxy socks5h://127.0.0.1:1: connection refused"),
        ("http://u:secret@127.0.0.1:1", "proxy http://127.0.0.1:1: connection refused"),
        ("socks5://127.0.0.1:{silent}", "proxy socks5://127.0.0.1:{silent}: "),
        ("http://127.0.0.1:{silent}", "proxy http://127.0.0.1:{silent}: "),
        ("gopher://127.0.0.1:1", "a proxy variable of the environment"),
        ("http://127.0.0.1:secret", "a proxy variable of the environment"),
    ],
)
async def test_an_unusable_proxy_is_reported(
    site: Site, behind: Path, monkeypatch: pytest.MonkeyPatch, value: str, says: str
) -> None:
    async def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1") as silent:
        port = silent.sockets[0].getsockname()[1]
        monkeypatch.setenv("ALL_PROXY", value.format(silent=port))
        service = Service(str(behind))
        service.start(TOKEN)
        error = await fails(service, says.format(silent=port))
    assert "secret" not in error.message


async def test_a_proxy_without_its_library_is_reported(behind: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect_socks_proxy(*_args: object, **_options: object) -> None:
        raise ImportError("connecting through a SOCKS proxy requires python-socks")

    monkeypatch.setattr("websockets.asyncio.client.connect_socks_proxy", connect_socks_proxy)
    monkeypatch.setenv("ALL_PROXY", "socks5h://127.0.0.1:1")
    service = Service(str(behind))
    service.start(TOKEN)
    await fails(service, "python-socks", "not installed")


async def test_a_host_in_no_proxy_is_connected_directly(
    proxy: tuple[Proxy, int], behind: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", f"socks5h://127.0.0.1:{proxy[1]}")
    monkeypatch.setenv("NO_PROXY", "board.invalid")
    service = Service(str(behind))
    service.start(TOKEN)
    await fails(service, "not known")
    assert proxy[0].asked == []


# --- Retry-After ---


@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_is_honoured_for_every_caller(server: FakeServer, service: Service, status: int) -> None:
    await ready(service)
    server.status, server.error_headers = HTTPStatus(status), {"Retry-After": "120"}
    server.cut()
    await until(lambda: service._connection.is_barred)
    asked = len(server.requests)
    for _ in range(3):
        with pytest.raises(ConnectionFailed, match=r"next attempt in 1[12][0-9] s") as error:
            await run(service, "put", "tasks/x.json", "x")
        assert error.value.code == "REMOTE_UNREACHABLE"
        answer = await ask(service, "ready")
        assert not answer["current"] and "next attempt in" in str(answer["message"])
    assert "next attempt in" in str((await ask(service, "status"))["error"])
    assert len(server.requests) == asked


async def test_a_command_waits_for_a_short_retry_after(server: FakeServer, service: Service) -> None:
    await ready(service)
    server.status, server.error_headers = HTTPStatus.SERVICE_UNAVAILABLE, {"Retry-After": "1"}
    server.cut()
    await until(lambda: service._connection.is_barred)
    server.status = None
    assert (await run(service, "put", "tasks/x.json", "x"))["exit_code"] == 0


# --- a token refused during a session ---


async def test_a_new_token_in_the_file_is_used_without_a_command(server: FakeServer, directory: Path) -> None:
    credentials.store(server.url, "web", TOKEN)
    service = Service(str(directory))
    service.start(None)
    await ask(service, "ready", None)
    server.tokens = {"ltr_new": "human:ana"}
    server.cut()
    await until(lambda: service._connection.is_refused)
    answer = await ask(service, "ready", None)
    assert not answer["current"] and answer["filled"] and "lattice remote login" in str(answer["message"])
    asked = len(server.requests)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0):
            await asyncio.Event().wait()
    assert len(server.requests) == asked  # no busy loop
    credentials.store(server.url, "web", "ltr_new")
    await until(lambda: service._connection.is_open)
    await service.close()


async def test_logging_out_ends_the_connection(server: FakeServer, directory: Path) -> None:
    credentials.store(server.url, "web", TOKEN)
    service = Service(str(directory))
    service.start(None)
    await ask(service, "ready", None)
    credentials.forget(server.url)
    await until(lambda: service._connection.error is not None and "no token" in service._connection.error.message)
    assert not server.connections
    await service.close()
