"""Wire protocol: frames, file operations, and the replica that applies them. No I/O.

Start with ``messages`` (frames) and ``operations`` (changes of files); ``replica`` is the client's state machine.
"""

__all__ = ["mark_of_server"]


def mark_of_server(url: str) -> str:
    """Return the last part of a token that was made for one server, 16 characters: a digest of its URL.

    A client sends such a token to that server although the user has not named it. Another URL with the same mark is as
    hard to find as a collision of 96 bits for a given text.
    """
    import base64  # not at every start of lattice
    import hashlib

    scheme, _, rest = url.strip().partition("://")
    host, _, path = rest.partition("/")
    path = path.strip("/")
    normal = f"{scheme.lower()}://{host.lower()}" + (f"/{path}" if path else "")
    digest = hashlib.sha256(b"lattice-remote server " + normal.encode()).digest()
    return base64.urlsafe_b64encode(digest[:12]).decode("ascii")
