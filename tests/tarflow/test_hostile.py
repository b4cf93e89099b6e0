"""A small part of each campaign of hostile use; ``pytest -m slow`` runs it, docs/robustness.md says what it does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "hostile"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the tool reads /proc")
@pytest.mark.parametrize(("campaign", "count"), [("files", 36), ("invocations", 30), ("kills", 10), ("folders", 6)])
def test_hostile_use_ends_in_right_results_or_in_one_clear_line(tmp_path, campaign, count):
    report = tmp_path / "report.json"
    command = [sys.executable, TOOL, campaign, f"--count={count}", "--seed=1", f"--report={report}"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert len(json.loads(report.read_text())["cases"]) == count
