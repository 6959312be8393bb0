"""The pages: every one that is not generated is listed in the index, and every link leads somewhere."""

import re
from pathlib import Path

from scripts.house.tree import ROOT

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
    written = [page for page in PAGES if page.is_relative_to(ROOT / "docs") and page.parent.name != "reference"]
    assert [page for page in written if page not in {*listed, index}] == []


def test_the_readme_leads_to_index_and_glossary() -> None:
    assert {"docs/index.md", "docs/glossary.md"} <= set(links(ROOT / "README.md"))
