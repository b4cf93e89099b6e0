"""Links lead somewhere, generated tables are those of the results, and the first code that a reader sees runs."""

import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import predictions
import records
import report
from tarflow import datasets
from tarflow.cli.demo import SHIPPED

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


def test_the_python_of_the_front_page_runs():
    """On the model that ships with tarflow in the place of a run."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("runs/fashion-mnist", str(SHIPPED))
    names = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    assert names["z"].shape == (10, 49, 16)
    assert (names["y"] - names["x"]).std().item() == pytest.approx(0.1, rel=0.1)
    assert names["log_prob"].isfinite().all()
    assert names["bound"].isfinite().all()


def test_the_page_of_predictions_is_what_is_predicted(tmp_path, monkeypatch):
    """``python benchmarks/predictions.py`` writes it."""
    monkeypatch.setattr(sys, "argv", ["predictions.py", "--docs", str(tmp_path)])
    predictions.main()
    assert (tmp_path / "predictions.md").read_text() == (ROOT / "docs" / "predictions.md").read_text()


def test_the_python_of_the_quickstart_runs(tmp_path, monkeypatch):
    """On the model that ships with tarflow in the place of a run, and a test image in that of a photograph."""
    pixels, _ = datasets.load("fashion-mnist", "test").get_batch(torch.tensor([7]))
    Image.fromarray(pixels[0, 0].numpy()).resize((320, 320)).save(tmp_path / "boot.png")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8").replace("runs/fashion-mnist", str(SHIPPED))
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
        names["x"] = torch.rand(2, 3, 64, 64) * 2 - 1  # the images of the last block
    assert names["posterior"].sum().item() == pytest.approx(1, abs=1e-5)
    assert names["loss"].isfinite()
