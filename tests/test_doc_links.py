"""Links of the documentation lead to files and headings, and every page is reached from the index."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
PAGES = [name for name in FILES if name.endswith(".md")]
_CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(\s*([^)\s]+)\)")


def links(page: str) -> list[tuple[str, str]]:
    """Return the files (relative to the root) and fragments to which a page links."""
    found = _LINK.findall(_CODE.sub("", (ROOT / page).read_text()))
    local = [link.partition("#") for link in found if "://" not in link]
    return [(os.path.normpath(Path(page).parent / path) if path else page, fragment) for path, _, fragment in local]


def anchors(page: str) -> set[str]:
    """Return the fragments of a page's headings, by GitHub's rule."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_each_link_leads_to_a_file_and_a_heading(page: str) -> None:
    for target, fragment in links(page):
        assert (ROOT / target).exists(), target
        assert not fragment or fragment in anchors(target), f"{target}#{fragment}"


def test_each_page_is_reached_from_the_index() -> None:
    reached, pending = set[str](), ["docs/README.md"]
    while pending:
        page = pending.pop()
        if page.endswith(".md") and page not in reached:
            reached.add(page)
            pending += [target for target, _ in links(page)]
    assert {page for page in PAGES if page.startswith("docs/")} - reached == set()


def test_each_page_and_decision_named_in_code_exists() -> None:
    numbers = {path.name[:4] for path in (ROOT / "docs" / "decisions").glob("0*.md")}
    code = [name for name in FILES if Path(name).suffix in {".py", ".js", ".yml", ".service", ".toml"}]
    named = 0
    for name in code:
        text = (ROOT / name).read_text()
        for page in re.findall(r"\bdocs/[\w/-]+\.md\b", text):
            assert (ROOT / page).exists(), f"{name}: {page}"
            named += 1
        for number in re.findall(r"(?:docs/decisions/|\bdecisions? )(\d{4})\b", text):
            assert number in numbers, f"{name}: decision {number}"
            named += 1
    assert named > 10


@pytest.mark.parametrize("record", sorted((ROOT / "docs" / "decisions").glob("0*.md")), ids=lambda path: path.stem)
def test_a_decision_is_short_and_listed_under_a_number_of_its_own(record: Path) -> None:
    text = record.read_text()
    assert len(text.split()) <= 150
    assert text.startswith(f"# {int(record.name[:4])}. ")
    assert all(f"\n**{part}.** " in text for part in ("Context", "Decision", "Alternatives"))
    title = text.partition("\n")[0].partition(". ")[2]
    listed = " ".join((record.parent / "README.md").read_text().split())
    assert f"- [{record.name[:4]}]({record.name}) {title}" in listed
    assert len(list(record.parent.glob(f"{record.name[:4]}-*.md"))) == 1, "a number names one record"


def test_each_file_and_constant_in_the_architecture_exists() -> None:
    text = (ROOT / "docs" / "inside" / "architecture.md").read_text()
    source = ROOT / "src" / "lattice_remote"
    paths = re.findall(r"`((?:client|livepage|protocol|server|storage)/[\w/]*(?:\.py)?|\w+\.py)`", text)
    assert len(paths) > 60
    assert [path for path in paths if not (source / path).exists()] == []
    numbers = re.findall(r"^\| .* \| (.*) in `([\w/]+\.py)` \|$", text, re.MULTILINE)
    assert len(numbers) >= 8
    for names, path in numbers:
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(class )?{name}\b|, {name} = ", (source / path).read_text(), re.MULTILINE), name
