"""The Content-Security-Policy of lattice's own dashboard page: as strict as that page allows, whatever its version.

The page is one file with its script and its style inside, six libraries from a public server, ``style`` and ``on...``
attributes all over, and a background picture of the user's choice. So this can't be forbidden (decision 0033):

- scripts of its own: each is named by its digest. No other inline script runs, and no ``javascript:`` link.
- the libraries: each is named by its address.
- inline styles, pictures from any server, and ``on...`` attributes where these were not replaced (decision 0033).

No I/O: the caller has the page, with what was added to it.
"""

import base64
import hashlib
from html.parser import HTMLParser

__all__ = ["policy_for"]


def policy_for(page: bytes, *, has_handlers: bool = True) -> str:
    """Return the policy under which a page works, and nothing that it does not bring itself runs.

    ``has_handlers``: whether it needs its ``on…`` attributes, which can't be told from those of somebody else.
    """
    scripts = _Scripts()
    scripts.feed(page.decode(errors="replace").replace("\r\n", "\n"))
    scripts.close()
    sources = " ".join(["'self'", *dict.fromkeys(scripts.sources)])
    directives = {
        "default-src": "'none'",
        "script-src": sources,
        "script-src-attr": "'unsafe-inline'" if has_handlers else "'none'",
        "style-src": "'self' 'unsafe-inline'",
        "img-src": "'self' data: https:",
        "connect-src": "'self'",
        "form-action": "'self'",
        "frame-ancestors": "'none'",
        "base-uri": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in directives.items())


class _Scripts(HTMLParser):
    """Collects what names the scripts of a page: digests of those inside, addresses of those elsewhere."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.sources: list[str] = []
        self._text: list[str] | None = None  # of the script that is being read

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "script":
            return
        address = dict(attrs).get("src")
        if address is None:
            self._text = []
        elif address.startswith("https://") and not set(address) & set(" \t\n;,'"):
            self.sources.append(address)

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "script" and self._text is not None:
            digest = hashlib.sha256("".join(self._text).encode()).digest()
            self.sources.append(f"'sha256-{base64.b64encode(digest).decode()}'")
            self._text = None
