#!/usr/bin/env python3
"""A lattice.v1 client in one file, written from protocol/SPEC.md. Imports: websockets, and msgspec for MessagePack.

    export LATTICE_TOKEN=ltr_...
    python3 standalone_client.py http://HOST:PORT/projects/SLUG DIR                        # keep DIR/.lattice current
    python3 standalone_client.py http://HOST:PORT/projects/SLUG DIR comment LAT-1 done     # run a command, then end

1. ``Smallest``: a correct cache. It compares all files on each connection, and fetches all that it cannot apply.
2. ``Client``: adds a stored position, all operations, requests that are repeated, and edits of plans and notes.
3. Operations, files, frames, and the loop that joins them to a WebSocket.

Numbers in comments are sections of the specification.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import random
import re
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import msgspec
from websockets.exceptions import InvalidStatus, WebSocketException
from websockets.sync.client import connect
from websockets.typing import Subprotocol

Frame = dict[str, Any]


class Violation(Exception):
    """The server broke the protocol; the connection ends (2.6)."""


class Refusal(Exception):
    """The server ended or refused the connection; with ``retry_after_s`` None a retry is useless."""

    def __init__(self, code: str, message: str, retry_after_s: float | None) -> None:
        super().__init__(f"{code}: {message}")
        self.retry_after_s = retry_after_s


# --- 1. The smallest correct client -----------------------------------------------------------------------------------


class Smallest:
    """Frames in, frames out. Nothing is stored but the files; each connection starts with a comparison."""

    def __init__(self, tree: MutableMapping[str, bytes]) -> None:
        self.tree = tree
        self.seq = 0
        self.missing: dict[str, int] = {}  # path -> the change since which its content is not known
        self.lost()

    def lost(self) -> None:
        """Forget the connection."""
        self.welcome: Frame | None = None
        self.requested: set[str] = set()
        self.parts: dict[str, bytes] = {}
        self.manifest: dict[str, Frame] = {}
        self.listed: Frame | None = None  # the manifest's first piece
        self.later: list[Frame] | None = None  # changes that come while the manifest is read

    def connected(self) -> list[Frame]:
        return [{"type": "hello", "versions": [1], "client_version": "standalone/1", "lattice_version": ""}]

    def receive(self, frame: Frame) -> list[Frame]:
        kind = frame["type"]
        if kind != "bye" and (kind == "welcome") != (self.welcome is None):
            raise Violation(f"{kind} is out of turn")
        return getattr(self, f"on_{kind}")(frame) + self.fetch()

    def on_welcome(self, frame: Frame) -> list[Frame]:
        self.welcome, self.missing, self.later = frame, {}, []
        return [{"type": "manifest"}]

    def on_entries(self, frame: Frame) -> list[Frame]:  # 5.3
        entries = {entry["path"]: entry for entry in frame["entries"]}
        self.listed = self.listed or frame
        if self.later is None or frame["seq"] != self.listed["seq"] or not (entries or frame["last"]):
            raise Violation("an unexpected manifest")
        if len(entries) < len(frame["entries"]) or entries.keys() & self.manifest:
            raise Violation("the manifest lists a file twice")
        self.manifest |= entries
        if frame["last"]:
            self.reached(frame)
            for path in set(self.tree) - set(self.manifest):
                self.store(path, None)
            for path, entry in self.manifest.items():
                if not fits(self.content(path), entry):
                    self.want(path, self.seq)
            later, self.later = self.later, None
            for change in later:
                self.on_change(change)
        return []

    def on_change(self, frame: Frame) -> list[Frame]:
        if self.later is not None:
            self.later.append(frame)
        elif frame["seq"] > self.seq + 1:
            raise Violation(f"change {frame['seq']} follows {self.seq}")
        elif frame["seq"] == self.seq + 1:
            for operation in frame["ops"]:
                self.apply(operation, frame["seq"])
            self.reached(frame)
        return []

    def reached(self, frame: Frame) -> None:
        self.seq = frame["seq"]

    def apply(self, operation: Frame, seq: int) -> None:
        path, kind = operation["path"], operation["op"]
        if kind in {"put", "delete"}:
            self.have(path)
            self.store(path, operation.get("data"))
        elif kind == "move":
            self.have(path)
            self.store(path, None)
            self.want(operation["to"], seq)
        else:
            self.want(path, seq)

    def is_edit(self, _: str) -> bool:
        return False

    def content(self, path: str) -> bytes | None:
        return self.tree.get(path)

    def store(self, path: str, data: bytes | None) -> None:
        if data is None:
            self.tree.pop(path, None)
        else:
            self.tree[path] = data

    def want(self, path: str, seq: int) -> None:
        self.have(path)
        self.missing[path] = seq

    def have(self, path: str) -> None:
        self.missing.pop(path, None)
        self.requested.discard(path)
        self.parts.pop(path, None)

    def fetch(self) -> list[Frame]:
        """Request missing files, up to 1024 at a time (2.4, 3.1)."""
        if self.welcome is None or self.later is not None or len(self.requested) > 512:
            return []
        paths = [path for path in self.missing if path not in self.requested and not self.is_edit(path)][:1024]
        self.requested.update(paths)
        return [{"type": "fetch", "paths": paths}] if paths else []

    def on_part(self, frame: Frame) -> list[Frame]:  # 5.2
        path, is_first = frame["path"], not frame["offset"]
        if path not in self.requested or (not is_first and path not in self.parts):
            return []  # the rest of an earlier transfer
        if is_first and frame["seq"] > self.seq:
            raise Violation(f"{path} is of {frame['seq']}, the changes came up to {self.seq}")
        if is_first and frame["seq"] < self.seq:
            return []
        before = b"" if is_first else self.parts[path]
        data = before + frame["data"]
        fills = len(before) < len(data) <= frame["size"] or len(data) == frame["size"] == 0
        if not frame["gone"] and not (fills and len(before) == frame["offset"]):
            raise Violation(f"a part of {path} does not fit")
        self.parts[path] = data
        if frame["gone"] or len(data) == frame["size"]:
            seq = self.missing[path]
            self.have(path)
            if frame["gone"] or fits(data, frame):
                self.store(path, None if frame["gone"] else data)
            else:
                self.want(path, seq)
        return []

    def on_bye(self, frame: Frame) -> list[Frame]:
        raise Refusal(frame["code"], frame["reason"], frame["retry_after_s"])


# --- 2. What each further part adds -----------------------------------------------------------------------------------


class Client(Smallest):
    """A cache in ``directory`` that continues after a cut, and sends requests and edits."""

    def __init__(self, directory: Path) -> None:
        private = directory / ".remote"
        super().__init__(Tree(directory, private / "new"))
        self.epoch, self.mark = "", b""
        self.state, self.saved = Tree(private, private / "new"), b""
        self.bases = Tree(private / "base", private / "new")  # the server's texts that edits are based on
        self.open: dict[str, Frame] = {}  # requests without an answer
        self.sent_at: dict[str, float] = {}  # when each was first sent
        self.waiting: list[Frame] = []  # replies whose changes are not in the files yet
        self.answers: dict[str, Frame] = {}
        self.refused: dict[str, bytes] = {}  # edits that are not sent again
        with contextlib.suppress(KeyError, ValueError):
            state = json.loads(self.state["state.json"])
            if state["boot"] == boot_id():  # a crash of the machine may have taken files away: compare
                self.epoch, self.seq, self.mark = state["epoch"], state["seq"], bytes.fromhex(state["mark"])
                self.missing = dict.fromkeys(state["missing"], self.seq)

    def lost(self) -> None:
        super().lost()
        self.kept: dict[str, list[tuple[int, Frame]]] = {}  # operations on files whose first piece has come

    # A stored position saves the comparison. It is stored after the files (S5).

    def connected(self) -> list[Frame]:
        return [{**super().connected()[0], "epoch": self.epoch, "seq": self.seq, "mark": self.mark}]

    def on_welcome(self, frame: Frame) -> list[Frame]:
        if frame["resync"]:
            self.epoch, self.seq, self.mark = "", 0, b""
            sends = super().on_welcome(frame)
        elif frame["epoch"] != self.epoch or frame["head"] < self.seq:
            raise Violation("the server continues another history")
        else:
            self.welcome, sends = frame, []
            self.missing = dict.fromkeys(self.missing, self.seq)
        again = list(self.open.values())
        return sends + self.edits() + [self.send(request) for request in again]

    def reached(self, frame: Frame) -> None:
        assert self.welcome is not None, "Changes and Entries come after it"
        self.epoch, self.seq, self.mark = self.welcome["epoch"], frame["seq"], frame["mark"]

    def receive(self, frame: Frame) -> list[Frame]:
        sends = super().receive(frame)
        if frame["type"] != "part" or not self.requested:  # a file that is stored as missing is fetched again
            self.save()
        if self.deliver():
            sends += self.fetch()
        return sends

    def save(self) -> None:
        position = {"epoch": self.epoch, "seq": self.seq, "mark": self.mark.hex(), "boot": boot_id()}
        data = json.dumps({**position, "missing": sorted(self.missing)}).encode()
        if data != self.saved:
            self.state["state.json"] = self.saved = data

    # Appends, merges and moves save fetching whole files (4, 5.1).

    def apply(self, operation: Frame, seq: int) -> None:
        path, kind, to = operation["path"], operation["op"], operation.get("to", operation["path"])
        if self.is_edit(path) or self.is_edit(to):
            if kind == "put" and operation["data"] == self.tree[path]:  # the edit itself comes back
                self.have(path)
                self.bases[path] = operation["data"]
                return
            for each in {path, to}:
                self.want(each, seq)
        elif path not in self.missing or kind in {"put", "delete"}:
            self.have(to)
            for drifted in apply(operation, self.tree):
                self.want(drifted, seq)
            for each in {path, to}:
                self.store(each, self.tree.get(each))
        elif path in self.parts and kind in {"append", "merge"}:
            self.kept.setdefault(path, []).append((seq, operation))
        elif path not in self.parts and kind == "announce":
            self.missing[path] = seq
        elif path in self.parts or kind == "move":
            super().apply(operation, seq)

    def have(self, path: str) -> None:
        super().have(path)
        self.kept.pop(path, None)

    def on_part(self, frame: Frame) -> list[Frame]:
        path = frame["path"]
        if self.is_edit(path):
            self.requested.discard(path)
        if not frame["offset"]:
            self.kept.pop(path, None)
        kept = self.kept.get(path, [])
        super().on_part(frame)
        if path not in self.missing:
            for number, operation in kept:
                self.apply(operation, number)
        return []

    # Requests: a Reply is given to the caller once its changes are in the files (5, 3.4).

    def run(self, argv: list[str], id_: str = "") -> list[Frame]:
        return [*self.edits(), *self.request({"type": "run", "argv": argv}, id_)]

    def request(self, frame: Frame, id_: str = "") -> list[Frame]:
        frame = {**frame, "id": id_ or secrets.token_hex(16)}
        self.open[frame["id"]] = frame
        return [self.send(frame)] if self.welcome else []

    def send(self, request: Frame) -> Frame:
        if (first := self.sent_at.get(request["id"])) is not None:
            return {**request, "age_s": max(0.001, clock() - first)}
        self.sent_at[request["id"]] = clock()
        return request

    def on_reply(self, frame: Frame) -> list[Frame]:
        self.waiting.append(frame)
        return []

    on_stored = on_refused = on_reply

    def deliver(self) -> bool:
        """Settle the replies whose changes are in the files; return whether there are any."""
        missing = [seq for path, seq in self.missing.items() if not self.is_edit(path)]
        reached = -1 if self.later is not None else min([self.seq, *(seq - 1 for seq in missing)])
        ready = [frame for frame in self.waiting if frame.get("seq", 0) <= max(0, reached)]
        for frame in ready:
            self.waiting.remove(frame)
            self.answers[frame["id"]] = frame
            request = self.open.pop(frame["id"], None)
            if request and request["type"] == "put":
                self.settle(request, frame)
        return bool(ready)

    # Edits of plans and notes, found by comparing them with their bases (5.5).

    def is_edit(self, path: str) -> bool:
        text = self.tree.get(path) if EDITABLE.fullmatch(path) else None
        return text is not None and text != self.bases.get(path)

    def content(self, path: str) -> bytes | None:
        return self.bases.get(path) if self.is_edit(path) else super().content(path)

    def store(self, path: str, data: bytes | None) -> None:
        """Store the server's content; the base follows the file, so that a crash between them reverts nothing."""
        if EDITABLE.fullmatch(path) is None:
            super().store(path, data)
        elif self.is_edit(path) and self.tree[path] != data:
            self.want(path, self.seq)
        else:
            super().store(path, data)
            if data is None:
                self.bases.pop(path, None)
            else:
                self.bases[path] = data

    def edits(self, id_: str = "") -> list[Frame]:
        """Return a Put for each edit that is not under way; restore deleted texts."""
        if self.welcome is None:
            return []
        busy = {request.get("path") for request in self.open.values()}
        sends = []
        for path in [path for path in {*self.tree, *self.bases} if EDITABLE.fullmatch(path) and path not in busy]:
            text = self.tree.get(path)
            if text is None and path not in self.missing:
                self.want(path, self.seq)
            elif self.is_edit(path) and self.refused.get(path) != text:
                sends += self.request({"type": "put", "path": path, "base": self.bases.get(path), "text": text}, id_)
        return sends + self.fetch()

    def settle(self, put: Frame, answer: Frame) -> None:
        path, text = put["path"], self.tree.get(put["path"])
        if answer["type"] == "refused":
            self.refused[path] = put["text"]
        elif answer["outcome"] != "conflict":
            self.bases[path] = put["text"]
        elif text is not None:
            self.tree[f"{path}.mine"] = text  # not replicated (2.5)
            self.want(path, self.seq)
            self.save()
            self.bases[path] = text


# --- 3. Operations and files (4, 2.5) ---------------------------------------------------------------------------------


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def fits(data: bytes | None, entry: Frame) -> bool:
    return data is not None and len(data) == entry["size"] and sha256(data) == entry["digest"]


def apply(operation: Frame, tree: MutableMapping[str, bytes]) -> list[str]:
    """Apply one operation (4); return the paths that drifted."""
    kind, path = operation["op"], operation["path"]
    old = tree.get(path)
    if kind == "put":
        tree[path] = operation["data"]
    elif kind == "delete":
        tree.pop(path, None)
    elif kind == "append":
        old, offset, data = old or b"", operation["offset"], operation["data"]
        begun = old[offset:]
        if len(old) < offset or not data.startswith(begun) or sha256(old[:offset][-4096:]) != operation["tail"]:
            return [path]
        if begun != data:
            tree[path] = old + data[len(begun) :]
    elif kind == "merge":
        if old is None or sha256(old) == operation["digest"]:
            return [] if old is not None else [path]
        try:
            merged = merge(json.loads(old), json.loads(operation["patch"]))
        except (ValueError, RecursionError):
            return [path]
        new = (json.dumps(merged, sort_keys=True, indent=2) + "\n").encode()
        if sha256(new) != operation["digest"]:
            return [path]
        tree[path] = new
    elif kind == "move":
        to = operation["to"]
        if old is None:
            return [] if sha256(tree.get(to, b"")) == operation["digest"] and to in tree else [to]
        if sha256(old) == operation["digest"]:
            tree[to] = old
        del tree[path]
        return [] if sha256(old) == operation["digest"] else [to]
    return [path] if kind == "announce" and not fits(old, operation) else []


def merge(target: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge(result.get(key), value)
    return result


EDITABLE = re.compile(r"(plans|notes)/task_[0-9A-HJKMNP-TV-Za-hjkmnp-tv-z]{26}\.md")
FORBIDDEN = re.compile(r"[\\:\x00-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]")


def is_replicated(path: str) -> bool:  # 2.5
    parts = path.split("/")
    return (
        0 < len(path.encode("utf-8", "surrogatepass")) <= 512
        and len(parts) <= 8
        and all(part and part[0] != "." and len(part.encode("utf-8", "surrogatepass")) <= 255 for part in parts)
        and not FORBIDDEN.search(path)
        and parts[0].casefold() not in {"remote.json", "cache_state.json", "locks"}
        and (parts[0] not in {"plans", "notes"} or len(parts) == 1 or path.endswith(".md"))
    )


class Tree(MutableMapping[str, bytes]):
    """The replicated files below a directory; each is replaced atomically (S8)."""

    def __init__(self, root: Path, spare: Path) -> None:
        self.root, self.spare = root, spare
        root.mkdir(parents=True, exist_ok=True)

    def __getitem__(self, path: str) -> bytes:
        try:
            return (self.root / path).read_bytes()
        except OSError:
            raise KeyError(path) from None

    def __setitem__(self, path: str, data: bytes) -> None:
        self.spare.parent.mkdir(parents=True, exist_ok=True)
        self.spare.write_bytes(data)
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        self.spare.replace(self.root / path)

    def __delitem__(self, path: str) -> None:
        try:
            (self.root / path).unlink()
        except FileNotFoundError:
            raise KeyError(path) from None

    def __iter__(self) -> Iterator[str]:
        for place, _, names in os.walk(self.root):
            paths = [(Path(place) / name).relative_to(self.root).as_posix() for name in names]
            yield from filter(is_replicated, paths)

    def __len__(self) -> int:
        return sum(1 for _ in self)


# --- 4. Frames (3) ----------------------------------------------------------------------------------------------------

TYPES: dict[str, Callable[[Any], bool]] = {
    "int": lambda value: type(value) is int and -(2**63) <= value < 2**63,
    "seq": lambda value: type(value) is int and 0 <= value < 2**63,
    "number": lambda value: type(value) is int and 0 < value < 2**63,
    "bool": lambda value: type(value) is bool,
    "text": lambda value: type(value) is str and len(value) <= 256,
    "line": lambda value: type(value) is str and len(value) <= 4096,
    "epoch": lambda value: type(value) is str and re.fullmatch("[0-9A-Za-z]{0,64}", value) is not None,
    "bytes": lambda value: type(value) is bytes,
    "some": lambda value: type(value) is bytes and value != b"",
    "mark": lambda value: type(value) is bytes and len(value) <= 32,
    "digest": lambda value: type(value) is bytes and len(value) == 32,
    "id": lambda value: type(value) is str and re.fullmatch("[0-9a-f]{32}", value) is not None,
    "path": lambda value: type(value) is str and is_replicated(value),
    "outcome": lambda value: value in ("stored", "merged", "unchanged", "conflict"),
    "delay": lambda value: value is None or (type(value) in (int, float) and 0 <= value <= 3600),
    "operations": lambda value: type(value) is list and all(checked(each, "op", OPERATIONS) for each in value),
    "entries": lambda value: type(value) is list and all(checked(each, "", ENTRY) for each in value),
}
OPERATIONS = {
    "put": "path:path data:bytes",
    "append": "path:path offset:seq tail:digest data:some",
    "merge": "path:path patch:bytes digest:digest",
    "move": "path:path to:path digest:digest",
    "delete": "path:path",
    "announce": "path:path size:seq digest:digest",
}
ENTRY = {"": "path:path size:seq digest:digest"}
FRAMES = {
    "welcome": "version:int epoch:epoch head:seq resync:bool",
    "change": "seq:number mark:mark ops:operations",
    "reply": "id:id seq:seq exit_code:int stdout:bytes stderr:bytes",
    "stored": "id:id seq:seq outcome:outcome",
    "refused": "id:id code:text message:line",
    "entries": "seq:seq mark:mark entries:entries last:bool",
    "part": "path:path seq:seq size=seq digest=bytes offset=seq data=bytes gone=bool",
    "bye": "code:text reason:line retry_after_s=delay",
}
"""The frames that this client uses; the others answer requests that it never sends. A field with = may be missing."""
DEFAULTS = {"seq": 0, "bytes": b"", "bool": False, "delay": None}


def checked(value: Any, tag: str, kinds: dict[str, str]) -> bool:
    """Add the defaults to a map; return True.

    Raises:
        Violation: it is of another form.
    """
    kind = value.get(tag, "") if type(value) is dict else None
    if type(kind) is not str or kind not in kinds:
        raise Violation(f"not one of {', '.join(kinds)}")
    for field in kinds[kind].split():
        name, is_needed, rule = re.fullmatch("([a-z_]+)([:=])([a-z]+)", field).groups()  # type: ignore[union-attr]
        if is_needed == "=":
            value.setdefault(name, DEFAULTS[rule])
        if name not in value or not TYPES[rule](value[name]):
            raise Violation(f"{name} of {kind} is missing, or no {rule}")
    return True


def decode(message: bytes | str) -> Frame:
    """Return a server's frame.

    Raises:
        Violation: it is none (2.3).
    """
    try:
        frame = msgspec.msgpack.decode(message if isinstance(message, bytes) else b"", type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Violation("a text message, or malformed MessagePack") from None
    checked(frame, "type", FRAMES)
    return frame


# --- 5. The loop ------------------------------------------------------------------------------------------------------

FINAL = ("REMOTE_UNAUTHORIZED", "REMOTE_FORBIDDEN", "REMOTE_NOT_FOUND", "REMOTE_VERSION")


def clock() -> float:
    """Return seconds on a clock that continues while the machine sleeps (3.4)."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def converse(client: Client, url: str, token: str, request: str) -> None:
    """Follow the project on one connection, until the request is answered (2.1, 2.2).

    Raises:
        OSError: there is no connection any longer; try again.
        Violation, Refusal: the server is to blame, or said no.
    """
    headers = {"Authorization": f"Bearer {token}"}
    options = {"compression": None, "max_size": 2**25, "ping_interval": 10, "ping_timeout": 10}
    protocols = [Subprotocol("lattice.v1")]
    try:
        address = f"ws{url.removeprefix('http')}/ws"
        with connect(address, subprotocols=protocols, additional_headers=headers, **options) as connection:
            sends = client.connected()
            while request not in client.answers:
                for frame in sends:
                    connection.send(msgspec.msgpack.encode(frame))
                try:
                    message = connection.recv(timeout=0.2)
                except TimeoutError:
                    sends = client.edits()
                    continue
                try:
                    sends = client.receive(decode(message))
                except Violation:
                    connection.close(1002)
                    raise
    except InvalidStatus as answer:
        raise refusal(answer.response.body or b"") from None
    except WebSocketException as error:
        raise OSError(f"the connection was lost: {error}") from None
    finally:
        client.lost()


def refusal(body: bytes) -> Exception:
    try:
        error = json.loads(body)["error"]
        return Refusal(str(error["code"]), str(error["message"]), None if error["code"] in FINAL else 1.0)
    except (ValueError, KeyError, TypeError):  # from another program, such as a proxy
        return OSError("unexpected response from the server")


def main() -> int:
    if len(sys.argv) < 3 or not os.environ.get("LATTICE_TOKEN"):
        print(__doc__)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    url, directory, *argv = sys.argv[1:]
    client = Client(Path(directory) / ".lattice")
    lock = (Path(directory) / ".lattice/.remote/lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)  # one process at a time
    request = secrets.token_hex(16) if argv else ""
    if argv:
        client.run(argv, request)
    pause = 0.1
    while request not in client.answers:
        try:
            converse(client, url, os.environ["LATTICE_TOKEN"], request)
        except KeyboardInterrupt:
            return 130
        except (OSError, Violation, Refusal) as error:
            print(error, file=sys.stderr)
            least = error.retry_after_s if isinstance(error, Refusal) else 0.0
            if least is None:
                return 1
            pause = min(30.0, 2 * pause)
            time.sleep(max(least, random.uniform(pause / 2, pause)))
    answer = client.answers[request]
    if answer["type"] == "refused":
        print(f"{answer['code']}: {answer['message']}", file=sys.stderr)
        return 1
    sys.stdout.buffer.write(answer["stdout"])
    sys.stderr.buffer.write(answer["stderr"])
    return int(answer["exit_code"])


if __name__ == "__main__":
    sys.exit(main())
