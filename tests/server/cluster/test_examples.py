"""The examples for a cluster: NATS configurations with TLS, a password and NATS credentials, on real servers."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import nkeys
import pytest
import trustme
from nats_servers import NatsCluster, nats_cluster
from server_process import Process
from test_server import make_data
from typer.testing import CliRunner

from lattice_remote.errors import Misuse
from lattice_remote.server.cli import app
from lattice_remote.server.cluster.engine import Engine

EXAMPLES = Path(__file__).parents[3] / "examples/cluster"
PASSWORD = "secret:with-a-colon"


def test_the_example_configurations_are_valid() -> None:
    texts = []
    for number in (1, 2, 3):
        file = EXAMPLES / f"nats-{number}.conf"
        program = Path(sys.executable).with_name("nats-server")
        done = subprocess.run(
            [program, "-t", "-c", file], env={"LATTICE_NATS_PASSWORD": "x"}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        texts.append(file.read_text().replace(f"n{number}\n", "n\n").replace(f"server {number} of", "server of"))
    assert texts[0] == texts[1] == texts[2]
    assert "sync_interval: always" in texts[0]


def use_example(cluster: NatsCluster) -> None:
    """Configure servers as the examples do, with TLS, on their own ports and in their own directories."""
    directory = cluster.servers[0].directory.parent
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(directory / "ca.pem")
    certificate.private_key_and_cert_chain_pem.write_to_path(directory / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(directory / "cert.pem")
    for number, server in enumerate(cluster.servers, 1):
        text = (EXAMPLES / f"nats-{number}.conf").read_text()
        for was, now in (("4222", server.port), ("8222", server.monitor_port), ("6222", server.route_port)):
            text = text.replace(f"0.0.0.0:{was}", f"127.0.0.1:{now}")
        for name, other in zip(("n1", "n2", "n3"), cluster.servers, strict=True):
            text = text.replace(f"{name}:6222", f"localhost:{other.route_port}")
        text = text.replace("/var/lib/nats", f"{server.directory}/js").replace("/etc/nats", str(directory))
        assert text.count("# tls {") == 2
        log = f'log_file: "{server.directory}/nats.log"\n'
        (server.directory / "nats.conf").write_text(text.replace("# tls {", "tls {") + log)


def test_a_node_runs_on_the_example_configurations_with_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATTICE_NATS_PASSWORD", PASSWORD)
    data = make_data(tmp_path / "a")
    (tmp_path / "login").write_text(f"lattice:{PASSWORD}\n")
    with nats_cluster(3, tmp_path / "nats", prepare=use_example) as nats:
        authority = nats.servers[0].directory.parent / "ca.pem"
        urls = ",".join(f"tls://localhost:{server.port}" for server in nats.servers)
        monitors = [option for url in nats.monitor_urls for option in ("--cluster-monitor", url)]
        options = ("--cluster", urls, "--cluster-credentials", tmp_path / "login", "--cluster-ca", authority)
        node = Process(data, *options, "--node", "a", *monitors)
        done = CliRunner().invoke(app, ["--data", str(data.path), "cluster", "status", "--json"])
        found = json.loads(done.stdout)
        assert (found["warnings"], [node["name"] for node in found["nodes"]]) == ([], ["a"])
        assert [(server["name"], server["is_sync_always"]) for server in found["nats"]] == [
            ("n1", True),
            ("n2", True),
            ("n3", True),
        ]
        assert node.end() == 0
        assert b"WARNING" not in (tmp_path / "log").read_bytes()


class Issuer:
    """A key of NATS that signs claims about other keys."""

    def __init__(self, kind: int) -> None:
        self.pair = nkeys.from_seed(nkeys.encode_seed(os.urandom(32), kind))
        self.name = self.pair.public_key.decode()

    def sign(self, subject: str, about: dict[str, object]) -> str:
        head = _encoded({"typ": "JWT", "alg": "ed25519-nkey"})
        claims = {"jti": subject, "iat": 1, "iss": self.name, "sub": subject, "name": "test", "nats": about}
        text = f"{head}.{_encoded(claims)}"
        return f"{text}.{base64.urlsafe_b64encode(self.pair.sign(text.encode())).decode().rstrip('=')}"

    def credentials(self, user: "Issuer") -> str:
        """Return a ``.creds`` file of a user of this account."""
        about = {"type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1, "pub": {}, "sub": {}}
        return (
            f"-----BEGIN NATS USER JWT-----\n{self.sign(user.name, about)}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{user.pair.seed.decode()}\n------END USER NKEY SEED------\n"
        )


def _encoded(value: dict[str, object]) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


async def test_nats_credentials_log_in(tmp_path: Path) -> None:
    operator, system, account, stranger, user = (
        Issuer(kind)
        for kind in (
            nkeys.PREFIX_BYTE_OPERATOR,
            nkeys.PREFIX_BYTE_ACCOUNT,
            nkeys.PREFIX_BYTE_ACCOUNT,
            nkeys.PREFIX_BYTE_ACCOUNT,
            nkeys.PREFIX_BYTE_USER,
        )
    )
    kinds = ("subs", "data", "payload", "imports", "exports", "conn", "leaf")
    stored = ("mem_storage", "disk_storage", "streams", "consumer")

    def account_of(issuer: Issuer, *limits: str) -> str:
        about = {"type": "account", "version": 2, "limits": dict.fromkeys(limits, -1)}
        return f"{issuer.name}: {operator.sign(issuer.name, about)}"

    extra = f"""
operator: {operator.sign(operator.name, {"type": "operator", "version": 2})}
system_account: {system.name}
resolver: MEMORY
resolver_preload {{
  {account_of(system, *kinds)}
  {account_of(account, *kinds, *stored)}
}}
"""
    good, bad = tmp_path / "good.creds", tmp_path / "bad.creds"
    good.write_text(account.credentials(user))
    bad.write_text(stranger.credentials(user))
    with nats_cluster(1, tmp_path / "nats", extra=extra) as nats:
        engine = await Engine.connect(nats.urls, node="a", credentials=good, replicas=1)
        bucket = await engine.kv("any")
        await bucket.put("key", b"value")
        assert await bucket.keys() == ["key"]
        await engine.close()
        with pytest.raises(Misuse, match="NATS refuses the login"):
            await Engine.connect(nats.urls, node="a", credentials=bad, replicas=1)
