"""HTTP statuses of lattice's error codes."""

import ast
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import lattice.cli
import msgspec
import pytest

from lattice_remote.server.http.rest import envelope_response

STATUSES = {
    409: "ALREADY_CLAIMED CONFLICT EXPIRED NOT_HELD RESOURCE_HELD TIMEOUT",
    404: "NOT_FOUND",
    422: (
        "COMPLETION_BLOCKED INVALID_ACTOR INVALID_ID INVALID_ROLE INVALID_TRANSITION MISSING_ACTOR PLAN_REQUIRED "
        "REVIEW_CYCLE_LIMIT SESSION_NOT_FOUND VALIDATION_ERROR"
    ),
}
ELSEWHERE = {"BIND_ERROR", "PORT_IN_USE", "NOT_INITIALIZED", "REBUILD_ERROR"}
"""Of commands that nobody runs over HTTP, and of where there is no project."""
KNOWN = {code: status for status, codes in STATUSES.items() for code in codes.split()}


def codes_of(tree: ast.AST) -> Iterator[str]:
    """Yield the error codes in lattice's source: arguments of error calls, and values of ``code``."""
    for node in ast.walk(tree):
        values: list[ast.expr] = []
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("output_error", "json_error_obj")):
            values = [*node.args, *(keyword.value for keyword in node.keywords)]
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "code":
            values = [node.value]
        for value in values:
            for part in ast.walk(value):
                if isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.isupper():
                    yield part.value


def test_every_code_of_this_lattice_has_a_status() -> None:
    """A new code in a later lattice fails here until it has a status."""
    [directory] = lattice.cli.__path__
    found = {code for path in Path(directory).glob("*.py") for code in codes_of(ast.parse(path.read_text()))}
    assert {code for code in found if code.replace("_", "").isalpha()} - ELSEWHERE == set(KNOWN)


@pytest.mark.parametrize(("code", "status"), [*KNOWN.items(), ("OF_A_LATER_LATTICE", 422), ("REMOTE_FAILED", 500)])
def test_a_code_is_answered_with_its_status(code: str, status: int) -> None:
    printed = msgspec.json.encode({"ok": False, "error": {"code": code, "message": "no"}})
    assert envelope_response(printed).status_code == HTTPStatus(status)
