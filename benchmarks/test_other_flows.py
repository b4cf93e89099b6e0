"""Flows of zuko, nflows, normflows and Pyro, accelerated and not."""

from other_flows import other_flow_rows as rows_of  # noqa: F401, which rows these are


def test_other_flow(show, row, contender):
    """One contender of a row."""
    show(row, contender)
