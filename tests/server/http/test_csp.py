"""Content security policy of lattice's dashboard: it allows the installed page's scripts and no others."""

import base64
import hashlib
import re
from importlib.resources import files

from lattice_remote.server.http.dashboard import policy_for


def directives(page: bytes) -> dict[str, list[str]]:
    """Return the policy's sources by directive."""
    return {name: values for name, *values in (part.split() for part in policy_for(page).split("; "))}


def digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def test_the_installed_page_may_run_its_own_script_and_its_libraries_and_no_other() -> None:
    page = (files("lattice.dashboard") / "static/index.html").read_bytes()
    [inline] = re.findall(r"<script>(.*?)</script>", page.decode(), re.DOTALL)
    libraries = re.findall(r'<script src="(https://[^"]*)">', page.decode())
    assert libraries
    assert directives(page)["script-src"] == ["'self'", *libraries, digest(inline)]


def test_scripts_are_named_as_a_browser_reads_them() -> None:
    page = b"<head><script>a &lt; '<b>'\r\n</script><script\n>c</script><SCRIPT SRC=/d></SCRIPT><style>e</style></head>"
    assert directives(page)["script-src"] == ["'self'", digest("a &lt; '<b>'\n"), digest("c")]


def test_an_address_can_not_add_to_the_policy() -> None:
    page = b"""<script src="https://x/; script-src *"></script><script src="http://plain/x.js"></script>"""
    assert directives(page)["script-src"] == ["'self'"]


def test_the_policy_forbids_unneeded_sources() -> None:
    policy = directives(b"<p>")
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == ["'none'"]
    assert "'unsafe-inline'" not in policy["script-src"]
    assert "'unsafe-eval'" not in policy["script-src"]
