"""The pages: all that are not generated are in the index, and every link and `Class.member` in them exists."""

import ast
import re
from pathlib import Path

from scripts.house.tree import ROOT

MEMBER = re.compile(r"`([A-Z]\w*)\.(\w+)(?:\(\))?`")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), ROOT / "benchmarks/README.md"])


def links(page: Path) -> list[str]:
    """Links into the tree."""
    found = LINK.findall(page.read_text(encoding="utf-8"))
    return [link for link in found if not link.startswith(("http://", "https://", "mailto:"))]


def test_every_link_leads_to_a_file() -> None:
    broken = {(page.name, link) for page in PAGES for link in links(page) if not (page.parent / link).exists()}
    assert broken == set()


def test_the_index_lists_every_page() -> None:
    index = ROOT / "docs/index.md"
    listed = {(index.parent / link).resolve() for link in links(index)}
    apart = ("reference", "en", "zh-TW")  # generated pages; the course has contents of its own (test_course.py)
    written = [page for page in PAGES if page.is_relative_to(ROOT / "docs") and page.parent.name not in apart]
    assert [page for page in written if page not in {*listed, index}] == []


def test_the_readme_leads_to_index_and_glossary() -> None:
    assert {"docs/index.md", "docs/glossary.md"} <= set(links(ROOT / "README.md"))


def names_by_class() -> dict[str, set[str]]:
    """Every name that stands in a class of src, or in a class that it is made from."""
    found: dict[str, set[str]] = {}
    bases: dict[str, list[str]] = {}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, set()).update(re.findall(r"\w+", ast.unparse(node)))
                bases[node.name] = [name for base in node.bases for name in re.findall(r"\w+", ast.unparse(base))]
    return {name: own.union(*(found.get(base, set()) for base in bases[name])) for name, own in found.items()}


def test_every_member_that_pages_and_code_name_exists() -> None:
    names = names_by_class()
    texts = {path: path.read_text(encoding="utf-8") for path in [*PAGES, *(ROOT / "src").rglob("*.py")]}
    stale = {
        f"{path.name}: {kind}.{member}"
        for path, text in texts.items()
        for kind, member in MEMBER.findall(text)
        if kind in names and member not in names[kind]
    }
    assert stale == set()
