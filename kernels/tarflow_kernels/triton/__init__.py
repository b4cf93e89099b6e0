"""The Triton kernels, a file per op, and what launches them; imported when the first of them runs."""
