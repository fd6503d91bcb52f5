"""The tables of promises in docs/inside/reliability.md and docs/run/security.md name test files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = [path.relative_to(ROOT / "tests").with_suffix("").as_posix() for path in (ROOT / "tests").rglob("test_*.py")]


@pytest.mark.parametrize("page", ["docs/inside/reliability.md", "docs/run/security.md"])
def test_each_named_test_file_exists(page: str) -> None:
    cells = [line.split("|")[2] for line in (ROOT / page).read_text().splitlines() if line.startswith("| ")]
    named = [name for cell in cells for name in re.findall(r"(?<![:\w/])(?:[a-z0-9_]+/)*test_[a-z0-9_]+", cell)]
    assert len(named) > 30
    assert [name for name in named if not any(f"/{test}".endswith(f"/{name}") for test in TESTS)] == []
