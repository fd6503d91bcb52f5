"""Random hostile command lines: lattice's own commands with hostile values in every parameter, from a seed."""

import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import click
from lattice.cli.main import cli

from lattice_remote.protocol.messages import Attachment
from lattice_remote.server.worker.policy import ROUTED, Kind

__all__ = ["ALL", "Known", "Line", "Lines"]


def _leaves(group: click.Group, words: tuple[str, ...] = ()) -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for word, command in group.commands.items():
        path = (*words, word)
        found |= _leaves(command, path) if isinstance(command, click.Group) else {" ".join(path): command}
    return found


ALL = _leaves(cli)
"""Every command of the installed lattice, by its words."""

PATHS = (
    *(
        "..",
        ".",
        "/",
        "../config",
        "../../config",
        "../../../tokens",
        "../journal/undo",
        "a/b",
        "a\\b",
        "./x",
        "~",
        "~root",
    ),
    *(
        "....//x",
        "..%2fconfig",
        "/etc/passwd",
        "/proc/self/environ",
        "/dev/zero",
        "/dev/stdin",
        "-",
        "file:///etc/passwd",
    ),
    *(
        "~root",
        "file:///etc/passwd",
        "http://127.0.0.1:1/x",
        "https://x/../..",
        "locks/x",
        ".remote/x",
        "remote.json",
        "CON",
        "index",
        "index.json",
        ".hidden",
        ".tmp.x",
        "a/../b",
        "x" * 241,
        "_lifecycle",
    ),
)
UNICODE = (
    *("\uff0e\uff0e\uff0fconfig", "\u2025/x", "e\u0301", "\u212aey", "\u017fam", "\u00df", "\u0130x", "\u202egpj.x"),
    *("\u200b", "\ufeffx", "\U0001f600", "\U000e0041", "\u0000", "a\0b", "\ufffe", "\u0663", "x\u0300" * 50),
)
CONTROL = (
    "\n",
    "\r\n",
    "a\nb",
    "\r",
    "\t",
    "\x1b[2J",
    "\x7f",
    "\x85",
    "\u2028",
    "x\n",
    "\nx",
    " x",
    "x ",
    "",
    " ",
    "\v",
)
OPTIONS = (
    *("-h", "--help", "--", "-", "--name=..", "--actor", "--id", "-1", "--version", "--json", "--quiet", "-vvv"),
    *("--name", "--nam", "--fi=/etc/passwd", "@/etc/passwd", "--actor=human:root", "--install-completion"),
)
TEXTS = (
    *("$(touch x)", "`id`", "; true", "%s%n", "{0.__class__}", "LATTICE_ROOT=/", "title=", "id=x", "tags=a,,b"),
    *("custom_fields.=x", "custom_fields.../x=y", "schema_version=9", "__class__=x", "status=done", "title=\n"),
    *("blocks", "depends_on", "x_y", "x_", "task_created", "thumbsup", "review", "none", "0", "-5", "1e9", "9" * 400),
)
JSONS = (
    *("{}", "[]", "null", '{"a": 1}', '{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}', '{"a": "\\ud800"}', "{" * 9999),
    *('{"a":' * 900 + "1" + "}" * 900, '{"a":' * 60 + "1" + "}" * 60, '{"a": 1' + "0" * 4000 + "}", '{"": {"": ""}}'),
    *('{"__proto__": 1, "a": 1, "a": 2}', '{"a": "\\u0000\\n"}', "[" * 100_000),
)
ACTORS = (
    *(
        "human:ana",
        "agent:x",
        "Human:ana",
        "human:Ana",
        "human:ana ",
        " human:ana",
        "human:ana\n",
        "human:anab",
        "human:",
    ),
    *(
        "human:\u0430na",
        "agent:*",
        "*",
        "team:x",
        "dashboard:web",
        "system:init",
        "agent:lattice-migration",
        "human:ana,",
    ),
    *("human:", "human:ana,", "agent:x\u202e", "agent:X", "agent:\uff58", "agent:x-1", "human:x", "x"),
)
STATUSES = ("backlog", "in_planning", "planned", "in_progress", "review", "done", "cancelled", "needs_human", "blocked")
HUGE = (300, 5_000, 200_000)


@dataclass
class Known:
    """Existing objects, in order of appearance."""

    shorts: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    archived: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    artifacts: list[str] = field(default_factory=list)
    resources: list[str] = field(default_factory=list)
    sessions: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    """Paths on the server that no command may access, and ids of another project."""

    @property
    def all(self) -> list[str]:
        parts = (self.shorts, self.tasks, self.archived, self.events, self.artifacts, self.resources, self.sessions)
        return [id_ for part in (*parts, self.outside) for id_ in part[-20:]]


@dataclass(frozen=True)
class Line:
    """One command line and the files that are sent with it."""

    argv: list[str]
    files: list[Attachment]


class Lines:
    """Makes command lines from ``rng``; the caller keeps ``known`` up to date."""

    def __init__(self, rng: random.Random, known: Known) -> None:
        self._rng = rng
        self._known = known

    def line(self) -> Line:
        """Return the next line. Most are ordinary except for one or two values; some are hostile throughout."""
        rng = self._rng
        path = rng.choice(list(ROUTED if rng.random() < 0.93 else ALL))
        parameters = ALL[path].params
        hostile = set(rng.sample(range(len(parameters)), min(len(parameters), rng.choice([0, 0, 0, 1, 1, 2]))))
        if rng.random() < 0.06:
            hostile = set(range(len(parameters)))
        options: list[list[str]] = []
        arguments: list[str] = []
        for number, parameter in enumerate(parameters):
            is_hostile = number in hostile
            if isinstance(parameter, click.Argument):
                count = (
                    rng.choice([0, 1, 2, 3]) if parameter.nargs < 0 else int(parameter.required or rng.random() < 0.6)
                )
                arguments += [self._value(path, parameter, hostile=is_hostile) for _ in range(count)]
            elif isinstance(parameter, click.Option):
                options += self._option(path, parameter, hostile=is_hostile)
        argv = self._arrange(path, options, arguments)
        return Line(argv, self._files(argv))

    # --- lines ---

    def _option(self, path: str, option: click.Option, *, hostile: bool) -> list[list[str]]:
        rng = self._rng
        kept = 0.9 if option.required or option.name in ("actor", "review_text", "data_str") else 0.12
        if not hostile and rng.random() > kept:
            return []
        name = rng.choice(option.opts)
        if option.is_flag:
            return [[name]] if not hostile or rng.random() < 0.8 else [[f"{name}=x"]]
        made = []
        for _ in range(rng.choice([1, 1, 1, 1, 2])):
            value = self._value(path, option, hostile=hostile)
            made.append([f"{name}={value}"] if rng.random() < 0.4 else [name, value])
        return made

    def _arrange(self, path: str, options: list[list[str]], arguments: list[str]) -> list[str]:
        rng = self._rng
        words = path.split()
        parts = (
            [*options, *([argument] for argument in arguments)]
            if rng.random() < 0.5
            else [[a] for a in arguments] + options
        )
        if rng.random() < 0.06:
            parts.insert(rng.randrange(len(parts) + 1), [rng.choice(OPTIONS)])
        argv = [*words, *(word for part in parts for word in part)]
        if rng.random() < 0.02:
            argv.insert(rng.randrange(len(words) + 1), rng.choice((*OPTIONS, *PATHS)))
        if rng.random() < 0.02:
            rng.shuffle(argv)
        return argv

    def _files(self, argv: list[str]) -> list[Attachment]:
        rng = self._rng
        if not argv or rng.random() > (0.6 if argv[0] in ("attach", "comment") else 0.02):
            return []
        likely = [n for n, word in enumerate(argv) if n > 1 and (word.startswith("--file=") or argv[n - 1] == "--file")]
        if argv[0] == "attach" and len(argv) > 2:
            likely.append(2)
        index = rng.choice(likely) if likely and rng.random() < 0.8 else rng.randrange(len(argv) + 1)
        name = rng.choice(["a.txt", "x.tar.gz", "x.\u00fc", ".x", "x.", "x.a:b", "x.\n", self.hostile()[:200] or "y"])
        data = rng.choice([None, b"", b"text\r\n", b"\0\xff\xfe", rng.randbytes(99), rng.randbytes(rng.choice(HUGE))])
        file = Attachment(min(index, 1023), name, data)
        return [file] if rng.random() < 0.97 else [file, file]

    # --- values ---

    def _value(self, path: str, parameter: click.Parameter, *, hostile: bool) -> str:
        value = self._ordinary(path, parameter)
        if not hostile:
            return value
        return self._rng.choice([self.hostile(), self.hostile(), value + self.hostile(), self.hostile() + value])

    def hostile(self) -> str:
        """Return a hostile text."""
        rng = self._rng
        if rng.random() < 0.004:
            return "x" * rng.choice([1 << 20, (1 << 20) + 1])
        kinds: list[Sequence[str]] = [PATHS, UNICODE, CONTROL, OPTIONS, TEXTS, JSONS, ACTORS, self._known.all]
        value = rng.choice(rng.choice(kinds) or [""])
        match rng.randrange(12):
            case 0:
                return rng.choice([value.lower(), value.upper(), value.swapcase()])
            case 1:
                return value * rng.choice([2, 5])
            case 2:
                return (value or "x") * (rng.choice(HUGE) // max(len(value), 1))
            case 3:
                return f"{value},{rng.choice(PATHS)}"
        return value

    def _ordinary(self, path: str, parameter: click.Parameter) -> str:
        rng, known = self._rng, self._known
        name = parameter.name or ""
        if name in ("task_id", "task_ids", "target_task_id") and isinstance(parameter, click.Argument):
            recent = known.shorts[:4] + known.shorts[-12:] + known.tasks[-3:] + known.archived[-1:]
            return rng.choice(recent or ["LAT-1"])
        kind = ROUTED.get(path, {}).get(name)
        if kind is Kind.NEW_ID:
            prefix = {"task_id": "task", "ev_id": "ev", "art_id": "art", "resource_id": "res"}[name]
            fresh = f"{prefix}_01M8173J64RGGH4YR2NPR2" + "".join(rng.choices("0123456789ABCDEFGHJKMNPQRSTVWXYZ", k=4))
            there = {"task": known.tasks + known.archived, "ev": known.events, "art": known.artifacts}.get(prefix, [])
            return rng.choice([fresh, fresh, *there[-2:]])
        if kind is Kind.SESSION:
            return rng.choice(known.sessions[-4:] or ["X-1"])
        if kind is Kind.NAME:
            there = known.resources[-4:] if path.startswith("resource") else []
            dotted = ("gpu.0", "x.json", "a..b", "two words")
            return rng.choice([*there, *dotted, "X", "gpu", "Ana", "x", "\u00e9t\u00e9"])
        choices: dict[str, Sequence[str]] = {
            "actor": ("human:ana", "agent:x", "agent:x", "agent:x", "agent:other"),
            "on_behalf_of": ACTORS,
            "actor_id": ("human:bob", "none"),
            "new_status": STATUSES,
            "status": STATUSES,
            "comment_id": known.events[-12:] or ["ev_x"],
            "reply_to": known.events[-12:] or ["ev_x"],
            "rel_type": ("blocks", "depends_on", "related_to", "subtask_of"),
            "data_str": ('{"a": 1}', "{}"),
            "event_type": ("x_seen",),
            "emoji": ("thumbsup",),
            "pairs": ("title=New", "priority=high", "custom_fields.k=v", "tags=a,b"),
            "max_holders": ("1", "2"),
            "ttl": ("300", "1", "9" * 18),
            "timeout": ("0", "1", "9" * 30),
            "code": ("LAT", "FE", "x"),
            "model": ("m", "human"),
            "task_type": ("task", "bug"),
            "priority": ("high",),
            "urgency": ("low",),
            "complexity": ("low",),
            "art_type": ("note", "file"),
            "source": ("given.txt", "https://example.org/x", "http://x", *self._known.outside[:3]),
        }
        return rng.choice(choices.get(name) or (f"words {rng.randrange(1000)}",))

    def request_id(self) -> str:
        return secrets.token_hex(16)
