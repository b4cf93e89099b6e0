"""Sampling, guided and not: our decoders, eager code and the published code, the same weights and the same samples."""

from sampling import sampling_rows as rows_of  # noqa: F401, which rows these are


def test_sampling(show, row, contender):
    """Latents to tokens; images/s and the passes that it took in the extra info."""
    show(row, contender)
