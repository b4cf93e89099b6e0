"""Every notebook runs from first to last, and is committed as it ran: with its outputs, without facts of a machine."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STEPS = re.compile(r"^STEPS = \d+$")
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def execute(notebook):
    """Run it where a reader would have it, in the environment of the tests."""
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": ROOT}}).execute()


@every_notebook
def test_it_runs_from_the_first_cell_to_the_last(path):
    notebook = read(path)
    steps = [cell for cell in notebook.cells if cell.cell_type == "code" and STEPS.match(cell.source)]
    assert len(steps) == 1, "a cell of its own says how long the notebook trains"
    steps[0].source = "STEPS = 4"
    execute(notebook)


@pytest.mark.slow
@every_notebook
def test_it_runs_with_all_its_steps(path):
    execute(read(path))


@every_notebook
def test_it_is_small_and_tells_nothing_of_a_machine(path):
    notebook, text = read(path), path.read_text(encoding="utf-8")
    assert len(text) < 300_000
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(cell.metadata == {} for cell in notebook.cells)
    assert not re.search(r"/home/|/root/|/tmp/|/Users/|site-packages", text)


@every_notebook
def test_every_cell_was_run_in_order_and_none_failed_or_warned(path):
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream", "display_data"}
    assert not [output for output in outputs if output.get("name") == "stderr"]


@every_notebook
def test_the_page_of_notebooks_links_it(path):
    assert f"../notebooks/{path.name}" in (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
