"""Guided sampling: the sequential decoder against the eager one, the same weights and the same samples."""

from rows import sampling_rows as rows_of  # noqa: F401, which rows these are


def test_guided_sampling(show, row, contender):
    """Latents to tokens; images/s in the extra info."""
    show(row, contender)
