"""A training step: causal attention against a dense mask."""

from training import training_rows as rows_of  # noqa: F401, which rows these are


def test_training_step(show, row, contender):
    """Loss, gradients of all weights and an update; images/s in the extra info."""
    show(row, contender)
