"""nginx and Caddy with the configurations of ``examples/deploy/``, run unprivileged on loopback.

The tests run the example itself. They replace only host names, addresses, ports and the paths of certificates
(``with_places`` requires each to be present) and confine the program to a directory. nginx's default timeout is short
here, so a longer wait must come from the example.
"""

import contextlib
import os
import random
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import requests
import trustme

from programs import program
from sandbox import wait_for

__all__ = ["DEPLOY", "NGINX_DEFAULT_S", "Caddy", "GatedNginx", "Nginx", "Proxy", "free_port", "with_places"]

DEPLOY = Path(__file__).resolve().parents[2] / "examples" / "deploy"
NGINX_DEFAULT_S = 0.3


def with_places(text: str, places: Mapping[str, str]) -> str:
    """Return the text with these replacements; each must apply."""
    for old, new in places.items():
        assert old in text, f"the example no longer says {old!r}"
        text = text.replace(old, new)
    return text


def free_port() -> int:
    """Return an unused port outside the range of automatically assigned ports."""
    while True:
        port = random.randint(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Proxy:
    """A proxy in front of a local server; the caller starts and stops it."""

    name: str
    """Name of the program."""

    def __init__(self, directory: Path, upstream_port: int) -> None:
        self.dir = directory / self.name
        self.dir.mkdir()
        self.port, self.plain_port = free_port(), free_port()
        self.upstream_port = upstream_port
        self.url = f"https://localhost:{self.port}"
        self.ca_file = self.dir / "authority.pem"
        """The certificate authority of its certificate."""
        self.answering: dict[str, Any] = {}
        """Options of requests that the proxy accepts."""
        self._process: subprocess.Popen[bytes] | None = None

    def argv(self) -> list[str]:
        """Write the configuration, and return the command line for one foreground process."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """Return the environment variables that the example reads."""
        return {}

    def start(self) -> None:
        """Start the proxy, and return once it responds."""
        argv = self.argv()
        env = {"PATH": os.environ["PATH"], "HOME": str(self.dir), **self.environment()}
        with (self.dir / "log").open("ab") as log:
            self._process = subprocess.Popen(
                argv, cwd=self.dir, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_for(self._answers, f"{self.name} to answer: {self.log()}")

    def log(self) -> str:
        """Return the proxy's log."""
        return (self.dir / "log").read_text(errors="replace")[-2000:]

    def stop(self) -> None:
        """End the proxy."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)
            self._process = None

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"{self.name} has ended: {self.log()}")
        try:
            return requests.get(f"{self.url}/healthz", verify=str(self.ca_file), timeout=5, **self.answering).ok
        except (requests.RequestException, OSError):  # OSError: the authority's file does not exist yet
            return False


class Nginx(Proxy):
    """nginx with a self-made certificate."""

    name = "nginx"

    def argv(self) -> list[str]:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.ca_file)
        issued = authority.issue_cert("localhost")
        issued.cert_chain_pems[0].write_to_path(self.dir / "cert.pem")
        issued.private_key_pem.write_to_path(self.dir / "key.pem")
        places = {
            "/etc/letsencrypt/live/board.example.com/fullchain.pem": str(self.dir / "cert.pem"),
            "/etc/letsencrypt/live/board.example.com/privkey.pem": str(self.dir / "key.pem"),
            "board.example.com": "localhost",
            "listen 80;": f"listen 127.0.0.1:{self.plain_port};",
            "listen [::]:80;": f"listen 127.0.0.2:{self.plain_port};",  # some machines have no IPv6
            "listen 443 ": f"listen 127.0.0.1:{self.port} ",
            "listen [::]:443 ": f"listen 127.0.0.2:{self.port} ",
            "127.0.0.1:8443;": f"127.0.0.1:{self.upstream_port};",
        }
        head, _, text = (DEPLOY / "nginx.conf").read_text().partition("upstream ")
        (self.dir / "site.conf").write_text(head + with_places("upstream " + text, places))
        temporary = "".join(
            f"{kind}_temp_path {self.dir}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (self.dir / "nginx.conf").write_text(
            f"daemon off; master_process off; pid {self.dir}/pid; error_log stderr notice;"
            f"events {{ worker_connections 512; }} http {{ access_log off; {temporary}"
            f"proxy_read_timeout {round(NGINX_DEFAULT_S * 1000)}ms;"
            f"include {self.dir}/site.conf; }}\n"
        )
        return [program("nginx"), "-p", str(self.dir), "-c", str(self.dir / "nginx.conf"), "-e", "stderr"]


class GatedNginx(Nginx):
    """nginx with the server below a path that requires a client certificate and a header."""

    def __init__(self, directory: Path, upstream_port: int, header: str, value: str) -> None:
        super().__init__(directory, upstream_port)
        self.url += "/lattice"
        self.cert, self.key = self.dir / "client.pem", self.dir / "client-key.pem"
        self.answering = {"headers": {header: value}, "cert": (str(self.cert), str(self.key))}
        self._gate = f'if ($http_{header.lower().replace("-", "_")} != "{value}") {{ return 403; }}'

    def argv(self) -> list[str]:
        argv = super().argv()
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.dir / "clients.pem")
        issued = authority.issue_cert("ana@board.example.com")
        issued.cert_chain_pems[0].write_to_path(self.cert)
        issued.private_key_pem.write_to_path(self.key)
        places = {
            "location / {": f"ssl_client_certificate {self.dir}/clients.pem; ssl_verify_client on;"
            f"location /lattice/ {{ {self._gate}",
            "proxy_pass http://lattice_remote;": "proxy_pass http://lattice_remote/;",
        }
        site = self.dir / "site.conf"
        site.write_text(with_places(site.read_text(), places))
        return argv


class Caddy(Proxy):
    """Caddy with a local certificate authority."""

    name = "caddy"

    def argv(self) -> list[str]:
        self.ca_file = self.dir / "storage" / "pki" / "authorities" / "local" / "root.crt"
        options = (
            f"{{\nadmin off\nlocal_certs\nskip_install_trust\ndefault_bind 127.0.0.1\n"
            f"http_port {self.plain_port}\nhttps_port {self.port}\nstorage file_system {self.dir}/storage\n}}\n"
        )
        (self.dir / "Caddyfile").write_text(options + (DEPLOY / "Caddyfile").read_text())
        return [program("caddy"), "run", "--config", str(self.dir / "Caddyfile"), "--adapter", "caddyfile"]

    def environment(self) -> dict[str, str]:
        return {"LATTICE_HOST": f"localhost:{self.port}", "LATTICE_SERVER": f"127.0.0.1:{self.upstream_port}"}
