"""Random changes of the guarding modules, one at a time: does a test notice? ``make mutants SEED=1 SECONDS=600``.

The changes are made in a clone of the checkout below ``build/``, so the checkout is never touched. Each is followed by
the tests of its module, the nearest file first, until one fails. Survivors are printed with a unified diff line, then
the share that was noticed. ``mutants_equivalent.txt`` lists changes that no test can notice, each with the reason.
"""

import argparse
import ast
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PACKAGE = "src/lattice_remote"
CLONE = ROOT / "build" / "mutants"
EQUIVALENT = HERE / "mutants_equivalent.txt"
TIMEOUT_S = 300.0

TESTS = {
    "client/guard": ["client/test_routing.py"],
    "client/routing": ["client/test_routing.py", "e2e/test_every_command.py"],
    "client/agent_client": ["client/agent/test_agent.py", "client/agent/test_agent_failures.py"],
    "client/cache/conflicts": ["client/cache/test_conflicts.py", "client/agent/test_edit_sync.py"],
    "client/cache/stale_edits": ["client/cache/test_stale_edits.py"],
    "client/cache/evidence": ["client/agent/test_evidence.py"],
    "client/cache/": [
        "client/cache/test_cache.py",
        "client/agent/test_edit_sync.py",
        "client/agent/test_cache_repair.py",
        "client/agent/test_evidence.py",
        "client/agent/test_service.py",
    ],
    "client/connection/": ["client/connection", "client/agent/test_service.py", "client/agent/test_agent_failures.py"],
    "protocol/": ["protocol"],
    "server/journal/": ["server/journal", "server/worker/test_store.py"],
    "server/tree/": ["server/tree", "server/worker/test_store.py", "server/worker/test_worker.py"],
    "server/transport/": ["server/transport", "hostile/test_floods.py"],
    "server/project/queue": ["server/project/test_queue.py", "server/project/test_project.py", "e2e/test_waiting.py"],
    "server/auth": ["server/test_auth.py", "server/http/test_cookie.py"],
    "server/http/auth": ["server/http/test_cookie.py", "server/http/test_refusals.py", "hostile/test_http.py"],
    "server/worker/policy": ["server/worker/test_policy.py", "hostile/test_arguments.py"],
    "server/worker/identity": ["server/worker/test_session_owners.py", "server/worker/test_policy.py"],
    "server/worker/store": ["server/worker/test_store.py", "server/worker/test_worker.py", "server/journal"],
    "server/worker/": ["server/worker", "server/journal"],
    "server/tokens": [
        "server/test_tokens.py",
        "server/test_token_expiry.py",
        "server/test_auth.py",
        "server/maintenance",
    ],
    "textmerge": ["test_textmerge.py"],
}
"""Tests by the beginning of a module's path; the first that fits counts. The fastest and nearest come first."""

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

    @property
    def key(self) -> str:
        """Return the change without its line number, as listed in ``mutants_equivalent.txt``."""
        return f"{self.module}: {_flat(self.before)} -> {_flat(self.after)}"

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
    skipped = {id(node) for each in ast.walk(tree) for node in _not_worth_it(each)}

    def mutant(node: ast.expr | ast.stmt, after: str) -> Mutant:
        assert node.end_lineno is not None and node.end_col_offset is not None
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        return Mutant(module, node.lineno, start, end, data[start:end].decode(), after)

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


def _not_worth_it(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what is not changed below a node: annotations, defaults, messages, and what only runs for type checkers."""
    if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
        yield from ast.walk(node.annotation)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        for each in (*node.decorator_list, *([node.returns] if node.returns else [])):
            yield from ast.walk(each)
    if isinstance(node, ast.JoinedStr | ast.Assert):
        yield from ast.walk(node)
    if isinstance(node, ast.Module):
        for statement in node.body:
            if isinstance(statement, ast.Assign | ast.AnnAssign | ast.Expr):
                yield from ast.walk(statement)


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
    return [name for name in names if _tests_of(name) and not name.endswith("__init__")]


def _tests_of(module: str) -> list[str]:
    return next((tests for prefix, tests in TESTS.items() if module.startswith(prefix)), [])


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
    python = CLONE / ".venv" / "bin" / "python"
    if not python.exists():
        subprocess.run(["scripts/bootstrap.sh"], cwd=CLONE, env=_environment(), check=True, stdout=subprocess.DEVNULL)
    return python


def _environment() -> dict[str, str]:
    hidden = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")
    return {name: value for name, value in os.environ.items() if name not in hidden}


def is_noticed(python: Path, mutant: Mutant) -> bool:
    """Return whether a test fails with the change in place."""
    path = CLONE / PACKAGE / f"{mutant.module}.py"
    data = path.read_bytes()
    path.write_bytes(data[: mutant.start] + mutant.after.encode() + data[mutant.end :])
    try:
        return any(not passes(python, test) for test in _tests_of(mutant.module))
    finally:
        path.write_bytes(data)


def passes(python: Path, test: str) -> bool:
    """Run one file or directory of tests, up to the first failure; one that takes too long has failed."""
    command = [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{test}"]
    process = subprocess.Popen(
        command,
        cwd=CLONE,
        env={**_environment(), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(TIMEOUT_S) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def equivalent() -> set[str]:
    """Return the changes that no test can notice, from lines of the form ``MODULE: BEFORE -> AFTER  # REASON``."""
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
    python, end, noticed = prepare(), time.monotonic() + options.seconds, 0
    broken: set[str] = set()
    survivors: list[Mutant] = []
    for mutant in chosen:
        if time.monotonic() > end:
            break
        if is_noticed(python, mutant):
            noticed += 1
            print(f"noticed   {mutant}", flush=True)
        else:
            survivors.append(mutant)
            print(f"SURVIVED  {mutant}", flush=True)
    for test in sorted({test for mutant in chosen[: noticed + len(survivors)] for test in _tests_of(mutant.module)}):
        if time.monotonic() < end + TIMEOUT_S and not passes(python, test):
            broken.add(test)
            print(f"WARNING: {test} fails without any change: what it noticed does not count")
    tried = noticed + len(survivors)
    share = f"{100 * noticed / tried:.0f} %" if tried else "none"
    print(f"{noticed} of {tried} changes noticed ({share}), of {len(found)} possible; {len(known)} known as equivalent")
    return 1 if survivors or broken else 0


if __name__ == "__main__":
    sys.exit(main())
