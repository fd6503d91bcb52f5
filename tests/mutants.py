"""Random changes of the guarding modules, one at a time: does a test notice? ``make mutants SEED=1 SECONDS=600``.

The changes are made in a clone of the checkout below ``build/``, so the checkout is never touched. First the tests of
``RECORDED`` run once, and the lines that each executes are recorded (``line_recorder.py``). A file of tests that
changes is recorded again, and all of them if the package or what tests share changes. Each change is followed by the
tests that execute its line, first those in the module's folder, until one fails. Survivors are printed, then the share
that was noticed. ``mutants_equivalent.txt`` lists changes that no test can notice, each with the reason.
"""

import argparse
import ast
import contextlib
import hashlib
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec

from line_recorder import durations, recorded

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PACKAGE = "src/lattice_remote"
CLONE = ROOT / "build" / "mutants"
EQUIVALENT = HERE / "mutants_equivalent.txt"
TIMEOUT_S = 600.0

GUARDING = (
    "client/agent/edit_sync",
    "client/agent_client",
    "client/cache/",
    "client/connection/",
    "client/guard",
    "client/routing",
    "protocol/",
    "server/auth",
    "server/http/auth",
    "server/journal/",
    "server/project/queue",
    "server/tokens",
    "server/transport/",
    "server/tree/",
    "server/worker/",
    "textmerge",
)
"""Beginnings of the paths of the modules that are changed."""
RECORDED = [
    "client/agent",
    "client/cache",
    "client/connection",
    "client/test_agent_client.py",
    "client/test_guard.py",
    "client/test_routing.py",
    "e2e/test_at_most_once.py",
    "e2e/test_errors.py",
    "e2e/test_plugins.py",
    "e2e/test_two_machines.py",
    "hostile/test_actors.py",
    "hostile/test_arguments.py",
    "hostile/test_malicious_server.py",
    "protocol",
    "server",
    "storage",
    "test_textmerge.py",
]
"""Tests whose executed lines are recorded. The others take too long to run for each change."""
FIRST_TESTS = 10
"""These notice most changes: the files of the others are then not even loaded."""
MAX_TESTS = 240
MAX_TESTS_S = 90.0
"""At most this many tests run for a change, of at most this duration together."""

_WITHOUT_EFFECT = ("frozen", "slots")
_OPPOSITE: dict[type[ast.cmpop], ast.cmpop] = {
    ast.Eq: ast.NotEq(),
    ast.NotEq: ast.Eq(),
    ast.Is: ast.IsNot(),
    ast.IsNot: ast.Is(),
    ast.In: ast.NotIn(),
    ast.NotIn: ast.In(),
    ast.Lt: ast.LtE(),
    ast.LtE: ast.Lt(),
    ast.Gt: ast.GtE(),
    ast.GtE: ast.Gt(),
}


@dataclass(frozen=True)
class Mutant:
    """One change: a span of a module's text, and its replacement."""

    module: str
    """Below the package, without ``.py``."""
    line: int
    start: int
    end: int
    """Offsets in the module's UTF-8 text."""
    before: str
    after: str
    scope: str
    """Qualified name of the function, empty for the module itself."""
    statement: int
    """Line at which its statement begins, or at which it takes effect."""

    @property
    def key(self) -> str:
        """Return the change without its line number, as listed in ``mutants_equivalent.txt``."""
        return f"{self.module} {self.scope}: {_flat(self.before)} -> {_flat(self.after)}"

    def __str__(self) -> str:
        return f"{self.module}.py:{self.line}: {_flat(self.before)} -> {_flat(self.after)}"


def _flat(code: str) -> str:
    return " ".join(code.split())


def mutants_of(module: str, text: str) -> Iterator[Mutant]:
    """Yield every change of one module."""
    data, starts = text.encode(), [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    tree = ast.parse(text)
    places = dict(_places(tree, "", 1))
    skipped = {id(node) for each in ast.walk(tree) for node in _not_worth_it(each)}

    def mutant(node: ast.expr | ast.stmt, after: str) -> Mutant:
        assert node.end_lineno is not None and node.end_col_offset is not None
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        return Mutant(module, node.lineno, start, end, data[start:end].decode(), after, *places[node])

    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.expr):
            for after in _changed(node):
                yield mutant(node, f"({after})")
        elif isinstance(
            node, ast.Expr | ast.Assign | ast.AugAssign | ast.Raise | ast.Return | ast.Break | ast.Continue
        ):
            is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if not is_text:
                yield mutant(node, "pass")


def _places(node: ast.AST, scope: str, statement: int) -> Iterator[tuple[ast.AST, tuple[str, int]]]:
    """Yield each node below this one with the qualified name of its function and the first line of its statement."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        scope = f"{scope}.{node.name}".removeprefix(".")
    for child in ast.iter_child_nodes(node):
        first = child.lineno if isinstance(child, ast.stmt) else statement
        if isinstance(child, ast.arguments) and not isinstance(node, ast.Lambda):
            first = node.body[-1].lineno  # type: ignore[attr-defined] # a default takes effect in the function
        yield child, (scope, first)
        yield from _places(child, scope, first)


def _not_worth_it(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that are not changed: annotations, defaults, messages, and code for type checkers only."""
    if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
        yield from ast.walk(node.annotation)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        for each in (*node.decorator_list, *([node.returns] if node.returns else [])):
            yield from ast.walk(each)
    # Dataclasses with slots only take less memory.
    if isinstance(node, ast.JoinedStr | ast.Assert) or (isinstance(node, ast.keyword) and node.arg in _WITHOUT_EFFECT):
        yield from ast.walk(node)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "zip":
        for keyword in node.keywords:  # strict=True is an assertion
            yield from ast.walk(keyword)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        for statement in _last(node.body):  # a function without it returns None all the same
            if isinstance(statement, ast.Return) and _returns_none(statement):
                yield statement
    if isinstance(node, ast.For | ast.AsyncFor | ast.While):
        yield from (statement for statement in _last(node.body) if isinstance(statement, ast.Continue))
    if isinstance(node, ast.Module):
        for statement in node.body:
            if isinstance(statement, ast.Assign | ast.AnnAssign | ast.Expr):
                yield from ast.walk(statement)


def _returns_none(statement: ast.Return) -> bool:
    return statement.value is None or (isinstance(statement.value, ast.Constant) and statement.value.value is None)


def _last(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a block after which no other statement of the block runs."""
    match body[-1]:
        case ast.If(body=first, orelse=second):
            yield from _last(first)
            yield from _last(second) if second else ()
        case ast.With(body=inner) | ast.AsyncWith(body=inner):
            yield from _last(inner)
        case ast.Match(cases=cases):
            for case in cases:
                yield from _last(case.body)
        case ast.Try(body=inner, handlers=handlers, orelse=orelse, finalbody=[]):
            yield from _last(orelse or inner)
            for handler in handlers:
                yield from _last(handler.body)
        case last:
            yield last


def _changed(node: ast.expr) -> Iterator[str]:
    """Yield replacements of an expression."""
    match node:
        case ast.Compare(ops=[operator]) if type(operator) in _OPPOSITE:
            yield ast.unparse(ast.Compare(node.left, [_OPPOSITE[type(operator)]], node.comparators))
        case ast.BoolOp():
            for dropped in node.values:
                rest = [value for value in node.values if value is not dropped]
                yield ast.unparse(rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest))
        case ast.UnaryOp(op=ast.Not()):
            yield ast.unparse(node.operand)
        case ast.IfExp():
            yield ast.unparse(node.body)
            yield ast.unparse(node.orelse)
        case ast.Constant(value=bool(value)):
            yield str(not value)
        case ast.Constant(value=int(value)):
            yield str(value + 1)
        case ast.Name(id="any" | "all" as name, ctx=ast.Load()):
            yield {"any": "all", "all": "any"}[name]


def modules() -> list[str]:
    """Return the guarding modules."""
    package = ROOT / PACKAGE
    names = [path.relative_to(package).with_suffix("").as_posix() for path in sorted(package.rglob("*.py"))]
    return [name for name in names if name.startswith(GUARDING) and not name.endswith("__init__")]


def prepare() -> Path:
    """Clone the checkout with its uncommitted changes, and give the clone an environment of its own."""
    subprocess.run(["mkdir", "-p", CLONE], check=True)
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    )
    present = b"\0".join(path for path in listed.stdout.split(b"\0") if path and (ROOT / os.fsdecode(path)).exists())
    for place in ("src", "tests"):
        subprocess.run(["rm", "-rf", CLONE / place], check=True)
    subprocess.run(["tar", "-C", ROOT, "--null", "-T", "-", "-cf", CLONE / "files.tar"], input=present, check=True)
    subprocess.run(["tar", "-C", CLONE, "-xf", CLONE / "files.tar"], check=True)
    (CLONE / "files.tar").unlink()
    # Bytecode that is checked by content is used and replaced where it fits, even within a tick of the clock.
    compiled = ["-m", "compileall", "-q", "--invalidation-mode", "checked-hash", "src", "tests"]
    subprocess.run([sys.executable, *compiled], cwd=CLONE, check=True)
    python = CLONE / ".venv" / "bin" / "python"
    if not python.exists():
        subprocess.run(["scripts/bootstrap.sh"], cwd=CLONE, env=_environment(), check=True, stdout=subprocess.DEVNULL)
    return python


def _environment() -> dict[str, str]:
    hidden = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")
    return {name: value for name, value in os.environ.items() if name not in hidden}


class Coverage(msgspec.Struct):
    """Tests that execute a line, and the duration of each test in seconds."""

    tests: dict[str, set[str]]
    """By ``MODULE.py:LINE``."""
    durations: dict[str, float]

    def of(self, mutant: Mutant) -> list[str]:
        """Return the tests that cover a change, then others of the same files and of the module's own.

        First come the shortest of those in the module's folder, then one of each file in turn: tests of one file are
        alike. A process that several tests share is recorded for the first of them only, and the hook for audit events
        for none.
        """
        numbers = (
            range(mutant.line, mutant.statement - 1, -1) if mutant.statement <= mutant.line else [mutant.statement]
        )
        lines = (f"{mutant.module}.py:{number}" for number in numbers)
        covered = next((self.tests[line] for line in lines if line in self.tests), None)
        if covered is None:  # perhaps in a process that several tests share
            of_module = f"{mutant.module}.py:"
            covered = set[str]().union(*(tests for line, tests in self.tests.items() if line.startswith(of_module)))
        covering = covered
        folder, _, name = mutant.module.rpartition("/")
        own = f"tests/{folder}/test_{name}.py::"
        files = {test.partition("::")[0] for test in covering} | {own.removesuffix("::")}
        near = [test for test in self.durations if test in covering or test.partition("::")[0] in files]
        near.sort(
            key=lambda test: (test not in covering, not test.startswith(f"tests/{folder}/"), self.durations[test])
        )
        turns, seen, cheap, cheap_s = dict[str, int](), Counter[str](), 0, 0.0
        for test in near:
            file = test.partition("::")[0]
            turns[test] = seen[file]
            seen[file] += 1
            cheap_s += self.durations[test]
            cheap += cheap_s < MAX_TESTS_S / 3 and cheap < MAX_TESTS / 2
        # The body of a class is executed once a process: its own tests may cover it without a record.
        related = covering | {test for test in near if test.startswith(own)}
        near[cheap:] = sorted(near[cheap:], key=lambda test: (test not in related, turns[test]))
        chosen, total_s = list[str](), 0.0
        for test in near:
            total_s += self.durations[test]
            if len(chosen) == MAX_TESTS or (chosen and total_s > MAX_TESTS_S):
                break
            chosen.append(test)
        return chosen


def record(python: Path) -> Coverage:
    """Return what the tests cover. Run those that were not recorded as they are now."""
    stored, lines = CLONE / "coverage.json", CLONE / "lines"
    shared, digests = _digests()
    known, coverage = dict[str, str](), Coverage({}, {})
    if stored.exists():
        found = msgspec.json.decode(stored.read_bytes(), type=tuple[str, dict[str, str], Coverage])
        if found[0] == shared:
            _, known, coverage = found
    changed = {file for file in digests.keys() | known.keys() if digests.get(file) != known.get(file)}
    if not changed:
        return coverage
    for name in {test for test in coverage.durations if test.partition("::")[0] in changed}:
        del coverage.durations[name]
    print("recording which tests execute which lines", flush=True)
    shutil.rmtree(lines, ignore_errors=True)
    lines.mkdir()
    (lines / "current").write_text("")
    (packages,) = (CLONE / ".venv/lib").glob("python3*/site-packages")
    load = f"import sys; sys.path.append({str(HERE)!r}); import line_recorder; sys.path.remove({str(HERE)!r})"
    switch = packages / "line_recorder.pth"
    switch.write_text(f"{load}; line_recorder.begin({str(lines)!r}, {str(CLONE / PACKAGE) + os.sep!r})\n")
    try:
        tests = sorted(changed & digests.keys())
        command: list[str | Path] = [python, "-m", "pytest", *_OPTIONS, "-p", "line_recorder", *tests]
        subprocess.run(command, cwd=CLONE, env=_environment(), capture_output=True, check=False)
    finally:
        switch.unlink()
    executed = {line: tests & coverage.durations.keys() for line, tests in coverage.tests.items()}
    coverage = Coverage(executed, coverage.durations | durations(lines))
    for test, its_lines in recorded(lines):
        for line in its_lines if test in coverage.durations else ():
            coverage.tests.setdefault(line, set()).add(test)
    stored.write_bytes(msgspec.json.encode((shared, digests, coverage)))
    shutil.rmtree(lines)
    return coverage


def _digests() -> tuple[str, dict[str, str]]:
    """Return a digest of the package and of what tests share, and that of each file of recorded tests."""
    places = [CLONE / "tests" / place for place in RECORDED]
    files = {file for place in places for file in ([place] if place.suffix else place.rglob("test_*.py"))}
    sources = [path for place in ("src", "tests") for path in sorted((CLONE / place).rglob("*.py"))]
    shared = b"\0".join(
        path.read_bytes() for path in sources if not path.name.startswith("test_") and path.name != "mutants.py"
    )
    digests = {str(file.relative_to(CLONE)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return hashlib.sha256(shared).hexdigest(), digests


def noticing_test(pytest: "Pytest", mutant: Mutant, tests: list[str]) -> str | None:
    """Return the first of these tests that fails, or takes too long, with the change in place."""
    path = CLONE / PACKAGE / f"{mutant.module}.py"
    data = path.read_bytes()
    path.write_bytes(data[: mutant.start] + mutant.after.encode() + data[mutant.end :])
    try:
        parts = [part for part in (tests[:FIRST_TESTS], tests[FIRST_TESTS:]) if part]
        found = (pytest.failed(["-x", *part]) for part in parts)
        return next((test for test in found if test is not None), None)
    finally:
        path.write_bytes(data)


_OPTIONS = ["-q", "-p", "no:cacheprovider"]


class Pytest:
    """Runs of pytest in the clone, by a process that has imported the libraries; a context manager."""

    def __init__(self, python: Path) -> None:
        self._output = CLONE / "pytest.out"
        self._process = subprocess.Popen(
            [python, "-W", "ignore", "tests/preloaded_pytest.py"],
            cwd=CLONE,
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # select() sees all that was not read
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def failed(self, arguments: list[str]) -> str | None:
        """Return the first test that failed, the last argument if they took too long."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(self._output), *_OPTIONS, *arguments]).encode() + b"\n")
        pid = int(self._process.stdout.readline())
        try:
            in_time, _, _ = select.select([self._process.stdout], [], [], TIMEOUT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        code = int(self._process.stdout.readline())
        failed = re.search(r"^(?:FAILED|ERROR) (tests/.*?)(?: - |$)", self._output.read_text(), re.MULTILINE)
        return failed[1] if failed and in_time else arguments[-1] if code else None


def equivalent() -> set[str]:
    """Return the changes that no test can notice, from lines ``MODULE FUNCTION: BEFORE -> AFTER  # REASON``."""
    lines = EQUIVALENT.read_text().splitlines() if EQUIVALENT.exists() else []
    return {line.rpartition("  # ")[0] for line in lines if "  # " in line}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of the choice (default: %(default)s)")
    parser.add_argument("--count", type=int, default=1000, help="most changes (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=600, help="start no test after so long (default: %(default)s)")
    parser.add_argument("--only", default="", help="only modules whose path begins with this")
    parser.add_argument("--list", action="store_true", help="print the chosen changes and run nothing")
    options = parser.parse_args()
    found = [
        mutant
        for module in modules()
        if module.startswith(options.only)
        for mutant in mutants_of(module, (ROOT / PACKAGE / f"{module}.py").read_text())
    ]
    random.Random(options.seed).shuffle(found)
    known = equivalent()
    chosen = [mutant for mutant in found if mutant.key not in known][: options.count]
    if options.list:
        print(*chosen, sep="\n")
        return 0
    python = prepare()
    coverage, end = record(python), time.monotonic() + options.seconds
    noticed: dict[Mutant, str] = {}
    survivors: list[Mutant] = []
    with Pytest(python) as pytest:
        for mutant in chosen:
            if time.monotonic() > end:
                break
            tests = coverage.of(mutant)
            if (test := noticing_test(pytest, mutant, tests)) is not None:
                noticed[mutant] = test
                print(f"noticed   {mutant}", flush=True)
            else:
                survivors.append(mutant)
                print(f"SURVIVED  {mutant}  ({len(tests)} tests)", flush=True)
        broken = {test for test in set(noticed.values()) if pytest.failed([test]) is not None}
    for test in sorted(broken):
        print(f"WARNING: {test} fails without any change: what it noticed does not count")
    count = sum(test not in broken for test in noticed.values())
    tried = count + len(survivors)
    share = f"{100 * count / tried:.0f} %" if tried else "none"
    print(f"{count} of {tried} changes noticed ({share}), of {len(found)} possible; {len(known)} known as equivalent")
    return 1 if survivors or broken else 0


if __name__ == "__main__":
    sys.exit(main())
