"""Every op, forward and backward, at the shapes of the published models."""

from ops import op_rows as rows_of  # noqa: F401, which rows these are


def test_op(show, row, contender):
    """One contender of a row."""
    show(row, contender)
