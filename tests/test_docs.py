"""Pages lead somewhere: links, their anchors and pictures exist, and generated tables are those of the results."""

import re
from pathlib import Path

import pytest

import records
import report

ROOT = Path(__file__).parents[1]
PAGES = [
    *ROOT.glob("*.md"),
    ROOT / "kernels" / "README.md",
    ROOT / "benchmarks" / "trained" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
ACTIONS = "../../actions/"  # of the repository, on its host
MADE = "docs/api/"  # pages whose anchors are made of docstrings
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def prose(page):
    """The text without code."""
    return re.sub(r"^```.*?^```|`[^`\n]*`", "code", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """What headings are called in links: lower case, without punctuation, words joined by hyphens."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@every_page
def test_links_lead_to_files_and_headings_that_exist(page):
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(page))
    pictures = re.findall(r'<img src="(?!https?:)([^"]+)"', prose(page))
    lost = []
    for link in links + pictures:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        found = target.exists()
        if found and anchor and target.suffix == ".md" and MADE not in target.as_posix():
            found = anchor in anchors(target)
        if not found and not link.startswith(ACTIONS):
            lost.append(link)
    assert not lost


@pytest.mark.parametrize("name", report.OP_PAGES)
def test_the_page_of_an_op_has_the_tables_of_its_results(name):
    """``python benchmarks/report.py`` writes them."""
    text = (ROOT / "docs" / "kernels" / f"{name}.md").read_text(encoding="utf-8")
    results = {path.stem: records.load(path) for path in sorted(records.FOLDER.glob("*.json"))}
    assert report.op_page(text, report.OP_PAGES[name], results) == text


@pytest.mark.parametrize("name", report.PAGES)
def test_a_page_has_the_tables_of_what_is_measured_beside_published_code(name):
    """``python benchmarks/report.py`` writes them."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    results = {path.stem: records.load(path) for path in sorted(records.FOLDER.glob("*.json"))}
    assert report.PAGES[name](text, results) == text
