"""Faults planted one at a time in the text of examples/standalone_client.py, with the check that must detect each."""

import base64
import contextlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from test_standalone_vectors import binary, text_of, vectors

import standalone_client

__all__ = ["FAULTS", "Fault", "module_with", "source_with", "vectors_notice"]

_SOURCE = Path(standalone_client.__file__).read_text()
VECTORS, SESSIONS, CONFORMANCE, NOTHING = "vectors", "sessions", "conformance", ""


@dataclass(frozen=True)
class Fault:
    name: str
    before: str
    after: str
    noticed_by: str
    """The first of vectors, sessions and conformance; "": nothing notices it."""
    check: str = ""
    """Part of the name of the check of the conformance command."""


def source_with(fault: Fault) -> str:
    """Return the client's text with the fault."""
    assert _SOURCE.count(fault.before) == 1, f"{fault.name}: its text occurs {_SOURCE.count(fault.before)} times"
    return _SOURCE.replace(fault.before, fault.after)


def module_with(fault: Fault) -> ModuleType:
    """Return the client as a module with the fault."""
    module = ModuleType("faulty_client")
    exec(compile(source_with(fault), "faulty_client", "exec"), module.__dict__)  # noqa: S102 - our own text
    return module


def vectors_notice(client: Any) -> bool:
    """Return whether a published vector differs from this client's behaviour."""
    try:
        return not (_reads_frames(client) and _refuses_frames(client) and _applies_operations(client))
    except Exception:  # noqa: BLE001 - a fault may end in any way
        return True


def _reads_frames(client: Any) -> bool:
    frames = [vector for vector in vectors("frames") + vectors("accepted") if vector["frame"]["type"] in client.FRAMES]
    frames = [vector for vector in frames if vector["from"] == "server"]
    return all(text_of(client.decode(bytes.fromhex(vector["msgpack"]))) == vector["frame"] for vector in frames)


def _refuses_frames(client: Any) -> bool:
    for vector in vectors("rejected"):
        if vector["from"] == "server":
            with contextlib.suppress(client.Violation):
                client.decode(bytes.fromhex(vector["msgpack"]))
                return False
    return True


def _applies_operations(client: Any) -> bool:
    for vector in vectors("operations"):
        operation = {name: binary(name, value) for name, value in vector["operation"].items()}
        tree = {path: base64.b64decode(text) for path, text in vector["before"].items()}
        for _ in range(2):
            if sorted(client.apply(operation, tree)) != vector["drifted"] or text_of(tree) != vector["after"]:
                return False
    return True


_PART = 'part and part[0] != "." and len(part.encode("utf-8", "surrogatepass")) <= 255'
FAULTS = [
    # Frames and paths
    Fault("a path may leave the tree", 'part[0] != "."', "True", VECTORS),
    Fault("only .. is refused, not each name with a dot", 'part[0] != "."', 'part != ".."', VECTORS),
    Fault(
        "empty components are allowed", f"all({_PART}", "all((not part or part[0] != '.') and len(part) <= 255", VECTORS
    ),
    Fault("paths have no depth limit", "and len(parts) <= 8", "and True", VECTORS),
    Fault(
        "lengths are counted in characters",
        'len(part.encode("utf-8", "surrogatepass")) <= 255',
        "len(part) <= 255",
        VECTORS,
    ),
    Fault("letter case hides remote.json", "parts[0].casefold()", "parts[0]", VECTORS),
    Fault("invisible characters are allowed", r"\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff", "", VECTORS),
    Fault("control characters are allowed", r"\x00-\x1f\x7f-\x9f", "", VECTORS),
    Fault("a colon is allowed", r"[\\:", r"[\\", VECTORS),
    Fault("editors' backups are in the tree", 'or path.endswith(".md")', "or True", VECTORS),
    Fault("the target of a move is not checked", "path:path to:path", "path:path to:text", VECTORS),
    Fault("paths in Entries are not checked", 'ENTRY = {"": "path:path', 'ENTRY = {"": "path:text', VECTORS),
    Fault("paths in Part are not checked", '"part": "path:path', '"part": "path:text', VECTORS),
    Fault("an id may have capitals", "[0-9a-f]{32}", "[0-9a-fA-F]{32}", VECTORS),
    Fault(
        "true is a number",
        '"seq": lambda value: type(value) is int and',
        '"seq": lambda value: isinstance(value, int) and',
        VECTORS,
    ),
    Fault("1 is a bool", "type(value) is bool", "value in (0, 1)", VECTORS),
    Fault(
        "an unknown outcome is accepted",
        '("stored", "merged", "unchanged", "conflict")',
        '("stored", "merged", "unchanged", "conflict", "lost")',
        VECTORS,
    ),
    Fault("a change may have number 0", '"change": "seq:number', '"change": "seq:seq', VECTORS),
    Fault("a digest may be short", "len(value) == 32", "len(value) <= 32", VECTORS),
    Fault("a change id may be long", "type(value) is bytes and len(value) <= 32", "type(value) is bytes", VECTORS),
    Fault("an append may be empty", 'type(value) is bytes and value != b""', "type(value) is bytes", VECTORS),
    # Operations
    Fault("append ignores what comes before", ' or sha256(old[:offset][-4096:]) != operation["tail"]', "", VECTORS),
    Fault("append checks the whole file", "[-4096:]", "", VECTORS),
    Fault("append ignores what is there already", "data[len(begun) :]", "data", VECTORS),
    Fault(
        "merge keeps nulls", "if value is None:\n            result", "if value is ...:\n            result", VECTORS
    ),
    Fault("merge keeps the order of keys", "sort_keys=True, ", "", VECTORS),
    Fault(
        "merge does not escape", "sort_keys=True, indent=2)", "sort_keys=True, indent=2, ensure_ascii=False)", VECTORS
    ),
    Fault("merge does not check its result", 'if sha256(new) != operation["digest"]:', "if False:", VECTORS),
    Fault(
        "merge writes floats as integers",
        "json.loads(old), json",
        "json.loads(old, parse_float=lambda text: int(float(text))), json",
        VECTORS,
    ),
    Fault(
        "move keeps other content",
        "        del tree[path]\n        return []",
        "        tree.pop(path) if to in tree else None\n        return []",
        VECTORS,
    ),
    Fault("move moves any content", 'if sha256(old) == operation["digest"]:', "if True:", VECTORS),
    Fault(
        "move of a missing file is done",
        'return [] if sha256(tree.get(to, b"")) == operation["digest"] and to in tree else [to]',
        "return []",
        VECTORS,
    ),
    Fault(
        "announce compares sizes only",
        'if kind == "announce" and not fits(old, operation)',
        'if kind == "announce" and len(old or b"") != operation["size"]',
        VECTORS,
    ),
    Fault(
        "announce changes nothing, and nothing drifts",
        'return [path] if kind == "announce" and not fits(old, operation) else []',
        "return []",
        VECTORS,
    ),
    # A cache
    Fault(
        "files that the server does not have stay",
        "for path in set(self.tree) - set(self.manifest):",
        "for path in ():",
        SESSIONS,
    ),
    Fault("all files are fetched", "if not fits(self.content(path), entry):", "if True:", SESSIONS),
    Fault(
        "the comparison looks at sizes only",
        "if not fits(self.content(path), entry):",
        'if len(self.content(path) or b"") != entry["size"]:',
        SESSIONS,
    ),
    Fault(
        "changes during the manifest are lost",
        "            for change in later:",
        "            for change in ():",
        SESSIONS,
    ),
    Fault("a gap is accepted", 'elif frame["seq"] > self.seq + 1:', "elif False:", SESSIONS),
    Fault(
        "a repeated change is applied again",
        'elif frame["seq"] == self.seq + 1:',
        'elif frame["seq"] <= self.seq + 1:',
        SESSIONS,
    ),
    Fault("manifests may be mixed", ' or frame["seq"] != self.listed["seq"]', "", SESSIONS),
    Fault("a file may be listed twice", "or entries.keys() & self.manifest", "", SESSIONS),
    Fault(
        "a second Welcome is accepted",
        'if kind != "bye" and (kind == "welcome") != (self.welcome is None):',
        'if kind != "bye" and kind != "welcome" and self.welcome is None:',
        SESSIONS,
    ),
    Fault(
        "a change is accepted before the Welcome",
        'if kind != "bye" and (kind == "welcome") != (self.welcome is None):',
        'if kind == "welcome" and self.welcome is not None:',
        SESSIONS,
    ),
    Fault(
        "another epoch is continued",
        'elif frame["epoch"] != self.epoch or frame["head"] < self.seq:',
        'elif frame["head"] < self.seq:',
        SESSIONS,
    ),
    Fault(
        "a head behind the position is accepted",
        'elif frame["epoch"] != self.epoch or frame["head"] < self.seq:',
        'elif frame["epoch"] != self.epoch:',
        SESSIONS,
    ),
    Fault("resync is not noticed", 'if frame["resync"]:', "if not self.epoch:", SESSIONS),
    Fault("the old position stays during a resync", 'self.epoch, self.seq, self.mark = "", 0, b""', "pass", SESSIONS),
    Fault("the position is never stored", "        if data != self.saved:", "        if False:", SESSIONS),
    Fault("the position has no change id", '"mark": self.mark}]', '"mark": b""}]', SESSIONS),
    Fault("what is missing is not stored", '"missing": sorted(self.missing)', '"missing": []', SESSIONS),
    Fault(
        "parts are not checked",
        'if frame["gone"] or fits(data, frame):\n                self.store',
        "if True:\n                self.store",
        SESSIONS,
    ),
    Fault(
        "parts may go beyond the size",
        'fills = len(before) < len(data) <= frame["size"] or',
        "fills = True or",
        SESSIONS,
    ),
    Fault(
        "older parts are used",
        '        if is_first and frame["seq"] < self.seq:\n            return []\n',
        "",
        SESSIONS,
    ),
    Fault(
        "parts of later numbers are used",
        'if is_first and frame["seq"] > self.seq:',
        "if False:",
        SESSIONS,
    ),
    Fault(
        "announced between its pieces, a file is not fetched again",
        'elif path in self.parts or kind == "move":',
        'elif kind == "move":',
        SESSIONS,
    ),
    Fault(
        "a part at offset 0 does not restart",
        'before = b"" if is_first else self.parts[path]',
        'before = self.parts.get(path, b"")',
        SESSIONS,
    ),
    Fault(
        "a file that is gone stays",
        'None if frame["gone"] else data)',
        'self.tree.get(path) if frame["gone"] else data)',
        SESSIONS,
    ),
    Fault(
        "operations during a transfer are lost",
        "            for number, operation in kept:",
        "            for number, operation in ():",
        SESSIONS,
    ),
    Fault(
        "a put does not end the wait",
        "            self.have(to)\n",
        "            self.have(to) if kind == 'move' else None\n",
        SESSIONS,
    ),
    Fault(
        "the target of a move stays missing", "            self.have(to)\n", "            self.have(path)\n", SESSIONS
    ),
    Fault(
        "the target of a move of a missing file is not fetched",
        '            self.want(operation["to"], seq)',
        "            pass",
        SESSIONS,
    ),
    Fault(
        "announced again, the file is not fetched again",
        "        else:\n            self.want(path, seq)\n\n    def is_edit",
        "        else:\n            self.missing.setdefault(path, seq)\n\n    def is_edit",
        SESSIONS,
    ),
    Fault("more files are fetched than one frame may name", "[:1024]", "", CONFORMANCE, "1,500 files"),
    # Requests
    Fault(
        "a reply does not wait for missing files",
        "min([self.seq, *(seq - 1 for seq in missing)])",
        "self.seq",
        SESSIONS,
    ),
    Fault(
        "a reply waits for every missing file", "*(seq - 1 for seq in missing)]", "*(-1 for seq in missing)]", SESSIONS
    ),
    Fault(
        "a reply waits for an edit",
        "for path, seq in self.missing.items() if not self.is_edit(path)]\n        reached",
        "for path, seq in self.missing.items()]\n        reached",
        SESSIONS,
    ),
    Fault(
        "a reply with number 0 waits for ever",
        'frame.get("seq", 0) <= max(0, reached)]',
        'frame.get("seq") != 0 and frame.get("seq", 0) <= max(0, reached)]',
        SESSIONS,
    ),
    Fault(
        "a request is not sent again",
        "return sends + self.edits() + [self.send(request) for request in again]",
        "return sends + self.edits() + [self.send(r) for r in again if r['id'] not in self.sent_at]",
        SESSIONS,
    ),
    Fault(
        "a request is sent again under another id",
        '            return {**request, "age_s"',
        '            return {**request, "id": secrets.token_hex(16), "age_s"',
        SESSIONS,
    ),
    Fault("a repeated request has no age", '"age_s": max(0.001, clock() - first)', '"age_s": 0.0', SESSIONS),
    Fault(
        "each request has an age",
        '        self.sent_at[request["id"]] = clock()\n        return request',
        '        self.sent_at[request["id"]] = clock()\n        return {**request, "age_s": 0.001}',
        SESSIONS,
    ),
    Fault("the exit code is lost", 'return int(answer["exit_code"])', "return 0", CONFORMANCE, "S11"),
    Fault(
        "a refusal is a success",
        "{answer['message']}\", file=sys.stderr)\n        return 1",
        "{answer['message']}\", file=sys.stderr)\n        return 0",
        CONFORMANCE,
        "Run: Refused",
    ),
    # Edits
    Fault("an edit is overwritten by a change", "if self.is_edit(path) or self.is_edit(to):", "if False:", SESSIONS),
    Fault("a Put has no base", '"base": self.bases.get(path), "text"', '"base": None, "text"', SESSIONS),
    Fault(
        "a stored edit stays an edit",
        '        elif answer["outcome"] != "conflict":\n            self.bases[path] = put["text"]',
        '        elif answer["outcome"] != "conflict":\n            pass',
        SESSIONS,
    ),
    Fault(
        "after a conflict the text is lost",
        '            self.tree[f"{path}.mine"] = text  # not replicated (2.5)\n',
        "",
        CONFORMANCE,
        "after a conflict",
    ),
    Fault(
        "a refused edit is sent for ever",
        "elif self.is_edit(path) and self.refused.get(path) != text:",
        "elif self.is_edit(path):",
        SESSIONS,
    ),
    Fault(
        "a command overtakes an edit",
        "return sends + self.edits() + [self.send(request) for request in again]",
        "return sends + [self.send(request) for request in again]",
        CONFORMANCE,
        "sent before the next Run",
    ),
    Fault(
        "a comparison overwrites an edit",
        "return self.bases.get(path) if self.is_edit(path) else super().content(path)",
        "return super().content(path)",
        SESSIONS,
    ),
    Fault(
        "a comparison removes an edit",
        "        elif self.is_edit(path) and self.tree[path] != data:",
        "        elif False:",
        SESSIONS,
    ),
    # The connection
    Fault(
        "a violation is ignored",
        "                except Violation:\n                    connection.close(1002)\n                    raise",
        "                except Violation:\n                    sends = []",
        CONFORMANCE,
        "a violation ends the connection",
    ),
    Fault(
        "the delay that the server names is ignored",
        "max(least, random",
        "max(0.0, random",
        CONFORMANCE,
        "Bye with retry_after_s",
    ),
    Fault(
        "it comes back although it must not",
        "            if least is None:\n                return 1",
        "            least = least or 0.0",
        CONFORMANCE,
        "Bye without retry_after_s",
    ),
    Fault(
        "it comes back without a delay",
        "            time.sleep(max(least, random.uniform(pause / 2, pause)))",
        "            time.sleep(least)",
        CONFORMANCE,
        "growing delays",
    ),
    Fault(
        "it gives up when the server is away",
        'None if error["code"] in FINAL else 1.0)',
        "None)",
        CONFORMANCE,
        "stopping or busy",
    ),
    Fault(
        "no subprotocol is offered",
        ", subprotocols=protocols",
        "",
        CONFORMANCE,
        "it connects with token and subprotocol",
    ),
    Fault("messages have at most 1 MiB", '"max_size": 2**25', '"max_size": 2**20', CONFORMANCE, "a file of 3 MiB"),
    Fault("no ping is sent", '"ping_interval": 10, "ping_timeout": 10', '"ping_interval": None', CONFORMANCE, "pings"),
    # Detectable only by a crash, a suspended machine or a concurrent reader
    Fault("a silent server is not noticed", '"ping_timeout": 10', '"ping_timeout": None', NOTHING),
    Fault(
        "files are written in place",
        "        self.spare.replace(self.root / path)",
        "        (self.root / path).write_bytes(data)",
        NOTHING,
    ),
    Fault(
        "the position is stored before the files",
        '            for operation in frame["ops"]:\n',
        '            self.reached(frame)\n            self.save()\n            for operation in frame["ops"]:\n',
        NOTHING,
    ),
    Fault(
        "a base is stored before its file",
        "            super().store(path, data)\n            if data",
        "            self.bases[path] = data or b''\n            super().store(path, data)\n            if data",
        NOTHING,
    ),
    Fault(
        "the age stops while the machine sleeps",
        'getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)',
        "time.CLOCK_MONOTONIC",
        NOTHING,
    ),
]
