"""A plugin of pytest for ``gpu.py``: runs a share of the tests, and tells of each when it begins and how it ended.

The environment says which share: ``TARFLOW_SHARE`` is ``i/n``, and TARFLOW_ENDED a file with the names of tests that
have been run.
"""

import os
from pathlib import Path

from processes import tell


def pytest_collection_modifyitems(items):
    """Keep every n-th test, so that neighbours, which take alike, are spread over all shares."""
    share, shares = map(int, os.environ["TARFLOW_SHARE"].split("/"))
    ended = set(Path(os.environ["TARFLOW_ENDED"]).read_text().splitlines())
    items[:] = [item for item in items[share::shares] if item.nodeid not in ended]


def pytest_runtest_logstart(nodeid):
    """Tell what runs now, in case it is the last."""
    tell(test=nodeid)


def pytest_runtest_logreport(report):
    """Tell how a test ended; what fails in its set-up or afterwards has failed too."""
    if report.when == "call" or report.outcome != "passed":
        tell(ended=report.nodeid, outcome=report.outcome, why=report.longreprtext[-500:] if report.failed else "")
