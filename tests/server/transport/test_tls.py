"""TLS: certificate errors, connections on both event loops, and renewal."""

import asyncio
import os
import secrets
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trustme
import uvloop
from cryptography.hazmat.primitives import serialization
from harness import Copy, Running, make_data, serving, tree_of, until
from server_process import COMMAND, Process

from lattice_remote.errors import Misuse
from lattice_remote.protocol.messages import Reply
from lattice_remote.server.config import Config
from lattice_remote.server.server import _warn_of_plain_text
from lattice_remote.server.transport.listener import Certificate


class Pair:
    """A certificate for this machine, its key, and a context that trusts it."""

    def __init__(self, directory: Path, name: str = "server") -> None:
        self.authority = trustme.CA()
        self.cert, self.key = directory / f"{name}.pem", directory / f"{name}.key"
        self.trusting = ssl.create_default_context()
        self.authority.configure_trust(self.trusting)
        self.write()

    def write(self) -> None:
        issued = self.authority.issue_cert("127.0.0.1")
        issued.cert_chain_pems[0].write_to_path(self.cert)
        issued.private_key_pem.write_to_path(self.key)
        self.key.chmod(0o600)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


@asynccontextmanager
async def secure(tmp_path: Path, pair: Pair) -> AsyncIterator[tuple[Running, Certificate]]:
    certificate = Certificate(pair.cert, pair.key)
    async with serving(*make_data(tmp_path / "data"), certificate=certificate) as running:
        yield running, certificate


async def handshake(running: Running, pair: Pair) -> object:
    """Connect, wait for the handshake, and return the serial number of the server's certificate."""
    _, writer = await asyncio.open_connection("127.0.0.1", running.port, ssl=pair.trusting)
    serial = writer.get_extra_info("peercert")["serialNumber"]
    await until(lambda: running.registry.admission.unauthenticated)
    writer.close()
    await writer.wait_closed()
    await until(lambda: not running.registry.admission.unauthenticated)
    return serial


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_board_is_filled_followed_and_written_over_tls(loop: object, tmp_path: Path, pair: Pair) -> None:
    async def scenario() -> None:
        async with secure(tmp_path, pair) as (running, _):
            (running.tree / "big.bin").write_bytes(secrets.token_bytes(3_000_000))
            async with running.connected(ssl=pair.trusting) as client, running.connected(ssl=pair.trusting) as other:
                copy, writer = Copy(), Copy(follow=False)
                await copy.greet(client)
                await writer.greet(other)
                assert isinstance(await writer.run("put", "a/b", "text" * 50_000), Reply)
                await copy.sync()
                while copy.replica.position.seq < 1:
                    await copy.pump()
                assert copy.tree == tree_of(running.tree)
            await until(lambda: not running.server.server_state.connections)

    with asyncio.Runner(loop_factory=loop) as runner:  # type: ignore[arg-type]
        runner.run(scenario())


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_client_without_tls_is_cut_at_its_deadline_and_leaves_nothing(
    loop: object, tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lattice_remote.server.transport.listener.TLS_TIMEOUT_S", 0.3)

    async def scenario() -> None:
        async with secure(tmp_path, pair) as (running, _):
            await handshake(running, pair)  # uvloop opens a file of its own with the first
            files = len(os.listdir("/proc/self/fd"))
            for first in (b"", b"\x16\x03\x01\x02\x00\x01", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", b"\0" * 5000):
                reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
                writer.write(first)
                async with asyncio.timeout(5):
                    with suppress(ConnectionResetError):
                        assert b"HTTP/1.1 200" not in await reader.read()
                writer.close()
            await until(lambda: not running.registry.admission.unauthenticated)
            await until(lambda: len(os.listdir("/proc/self/fd")) <= files)
            async with running.connected(ssl=pair.trusting):
                pass

    with asyncio.Runner(loop_factory=loop) as runner:  # type: ignore[arg-type]
        runner.run(scenario())


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_handshake_that_is_cut_to_make_room_leaves_nothing(loop: object, tmp_path: Path, pair: Pair) -> None:
    async def scenario() -> None:
        async with secure(tmp_path, pair) as (running, _):
            await handshake(running, pair)  # uvloop opens a file of its own with the first
            files = len(os.listdir("/proc/self/fd"))
            reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
            await until(lambda: len(running.registry.admission.unauthenticated))
            quota = running.registry.admission.unauthenticated.next_to_cut()
            quota.leave()
            quota.cut()
            async with asyncio.timeout(5):
                with suppress(ConnectionResetError):
                    assert await reader.read() == b""
            writer.close()
            await until(lambda: len(os.listdir("/proc/self/fd")) <= files)

    with asyncio.Runner(loop_factory=loop) as runner:  # type: ignore[arg-type]
        runner.run(scenario())


async def test_a_renewed_certificate_is_served_and_half_a_renewal_is_not(tmp_path: Path, pair: Pair) -> None:
    async with secure(tmp_path, pair) as (running, certificate), running.connected(ssl=pair.trusting) as client:
        before = await handshake(running, pair)
        old_key = pair.key.read_bytes()
        pair.write()
        new_key = pair.key.read_bytes()
        pair.key.write_bytes(old_key)
        certificate.refresh()
        assert await handshake(running, pair) == before
        pair.key.write_bytes(new_key)
        certificate.refresh()
        assert await handshake(running, pair) != before
        await (await client.ping())


def test_old_tls_versions_are_refused(pair: Pair) -> None:
    assert Certificate(pair.cert, pair.key).context.minimum_version == ssl.TLSVersion.TLSv1_2


def broken(pair: Pair, how: str) -> tuple[Path, Path]:
    match how:
        case "missing":
            return pair.cert, pair.key.with_name("none.key")
        case "open":
            pair.key.chmod(0o644)
        case "mismatch":
            return pair.cert, Pair(pair.cert.parent, "other").key
        case "swapped":
            pair.cert.chmod(0o600)
            return pair.key, pair.cert
        case "garbage":
            pair.cert.write_text("-----BEGIN CERTIFICATE-----\nnonsense\n")
        case "encrypted":
            key = serialization.load_pem_private_key(pair.key.read_bytes(), None)
            form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
            pair.key.write_bytes(key.private_bytes(*form, serialization.BestAvailableEncryption(b"password")))
    return pair.cert, pair.key


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing", "cannot read .*none.key: No such file"),
        ("open", "chmod o="),
        ("mismatch", "is not that of the certificate"),
        ("swapped", "must be PEM files"),
        ("garbage", "must be PEM files"),
        ("encrypted", "has a password"),
    ],
)
def test_a_certificate_error_is_one_line_with_advice(pair: Pair, how: str, says: str) -> None:
    with pytest.raises(Misuse, match=says) as caught:
        Certificate(*broken(pair, how))
    assert "\n" not in caught.value.message


async def test_the_command_speaks_tls(tmp_path: Path, pair: Pair) -> None:
    data, token = make_data(tmp_path / "data")
    process = Process(data, "--tls-cert", pair.cert, "--tls-key", pair.key)
    try:
        assert process.line.startswith("Listening on https://127.0.0.1:")
        async with process.connected(token, ssl=pair.trusting) as client:
            await (await client.ping())
    finally:
        assert process.end() == 0


@pytest.mark.parametrize("options", [["--tls-cert", "cert.pem"], ["--tls-key", "a.key", "--tls-cert", "none.pem"]])
def test_incomplete_or_missing_tls_files_end_the_start_with_one_line(tmp_path: Path, options: list[str]) -> None:
    data, _ = make_data(tmp_path / "data")
    done = subprocess.run(
        [*COMMAND, "start", "--data", data.path, "--port", "0", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)


class Listener:
    def __init__(self, host: str) -> None:
        self.host = host

    def getsockname(self) -> tuple[str, int]:
        return self.host, 8443


@pytest.mark.parametrize(
    ("host", "config", "warns"),
    [
        ("127.0.0.1", Config(), False),
        ("::1", Config(), False),
        ("192.0.2.1", Config(), True),
        ("192.0.2.1", Config(trusted_proxies=["10.0.0.1"]), False),
    ],
)
def test_listening_beyond_this_machine_without_tls_is_warned_of(
    host: str, config: Config, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    _warn_of_plain_text(config, Listener(host))  # type: ignore[arg-type]
    assert ("in the clear" in caplog.text) is warns
