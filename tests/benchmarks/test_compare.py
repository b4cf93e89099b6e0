"""Two checkouts are compared by what pytest-benchmark says of each."""

import pytest

import compare

ROWS = """
import itertools
import pytest

@pytest.mark.parametrize("contender", ["torch", "reference"])
@pytest.mark.parametrize("row", SECONDS)
def test_row(benchmark, row, contender):
    benchmark.group = row
    benchmark._timer = itertools.count(0, SECONDS[row]).__next__
    benchmark.pedantic(lambda: None, rounds=3)
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout in which each row takes so many seconds."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # beside other processes pytest-benchmark measures nothing

    def checkout(name, **seconds):
        folder = tmp_path / name / "benchmarks"
        folder.mkdir(parents=True)
        (folder / "test_any_name.py").write_text(f"SECONDS = {seconds}\n{ROWS}")
        return folder.parent

    return checkout


def test_a_row_that_takes_over_3_percent_longer_here_is_an_error(checkout, monkeypatch, capsys):
    monkeypatch.setattr(compare, "HERE", checkout("here", attention=0.51, affine=0.52, new=1))
    other = str(checkout("there", attention=0.5, affine=0.5, old=1))
    assert compare.main([other, "--rounds", "1"]) == 1
    printed = capsys.readouterr().out.splitlines()[1:]
    assert printed == [
        "  500.000 ms  510.000 ms  1.020  1.02 to 1.02  attention, torch",
        "  500.000 ms  520.000 ms  1.040  1.04 to 1.04  affine, torch  SLOWER",
        "only here: new",
        "only there: old",
    ]
    assert compare.main([other, "--rounds", "1", "-k", "attention"]) == 0, "what is not ours goes to pytest"
    assert "affine" not in capsys.readouterr().out


def test_a_checkout_in_which_nothing_ran_is_an_error_that_shows_what_pytest_said(checkout):
    with pytest.raises(RuntimeError, match=r"(?s)nothing was measured.*no_such_file"):
        compare.run_rows(checkout("here", row=0.5), ["no_such_file.py"])


def test_the_ratio_is_that_of_the_medians_over_all_rounds_and_the_rounds_show_its_range():
    there = [{"row": {"torch": [1.0, 1.0, 4.0]}}, {"row": {"torch": [2.0, 2.0, 2.0]}}]
    here = [{"row": {"torch": [1.0, 1.0, 1.0]}}, {"row": {"torch": [3.0, 3.0, 3.0]}}]
    (row,) = compare.compare(there, here)
    assert (row.there, row.here, row.ratios) == (2.0, 2.0, [1.0, 1.5])
